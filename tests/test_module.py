"""MRAMultiheadAttention: what it is beside torch's module.

That it is the same function at density 1 is in test_module_matrix.py; what torch's own tests ask,
and which of it doesn't apply, in test_module_behaviour.py."""

import copy
import warnings

import pytest
import torch
from helpers import DEVICES, limit, relative_error
from torch import nn

from mra_attention import MRAConfig, MRAMultiheadAttention, replace_attention

E, HEADS, B, N, M = 32, 4, 3, 45, 70
EXACT = MRAConfig(density=1.0, block_size=32)
SPARSE = MRAConfig(density=0.3, block_size=32)


def pair(config=EXACT, device="cpu", dtype=None, **kwargs):
    """nn's module with random biases, and ours with its state."""
    theirs = nn.MultiheadAttention(E, HEADS, **kwargs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-0.3, 0.3)
    ours = MRAMultiheadAttention(E, HEADS, config=config, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device, dtype), ours.to(device, dtype)


def run(module, inputs, **kwargs):
    """Output, weights and every gradient of a fixed function of them."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    out, weights = module(*inputs, **kwargs)
    loss = (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * weights).sum()
    loss.backward()
    grads = [x.grad for x in inputs] + [p.grad for p in module.parameters()]
    return out.detach(), None if weights is None else weights.detach(), grads


def check_same(theirs, ours, inputs, **kwargs):
    """Forward in float32; forward and every gradient in float64."""
    close(ours(*inputs, **kwargs)[0], theirs(*inputs, **kwargs)[0])
    theirs, ours = (copy.deepcopy(m).double() for m in (theirs, ours))
    inputs = [x.double() for x in inputs]
    for name, x in kwargs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            kwargs[name] = x.double()
    a, b = run(theirs, inputs, **kwargs), run(ours, inputs, **kwargs)
    close(b[0], a[0])
    assert (a[1] is None) == (b[1] is None)
    if a[1] is not None:
        close(b[1], a[1])
    for x, y in zip(b[2], a[2], strict=True):
        close(x, y)


def close(x, y):
    """What two orders of summation differ by, relative to the largest value (1 at least)."""
    assert x.shape == y.shape and x.dtype == y.dtype
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}[x.dtype]
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, y.abs().max().item()))


def tensors(batch_first, cross, kdim=E, vdim=E, device="cpu"):
    m = M if cross else N
    shapes = [(B, N, E), (B, m, kdim), (B, m, vdim)]
    made = [torch.randn(s, device=device) for s in shapes]
    return made if batch_first else [x.transpose(0, 1) for x in made]


def padding(length, device="cpu"):
    lengths = torch.tensor([length, length // 2, 3], device=device)
    return torch.arange(length, device=device) >= lengths[:, None]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint(need_weights, padded):
    theirs, ours = pair(batch_first=True)
    inputs = tensors(True, False)
    mask = torch.ones(N, N, dtype=torch.bool).triu(1)
    kwargs = dict(key_padding_mask=padding(N) if padded else None, need_weights=need_weights)
    check_same(theirs, ours, inputs, attn_mask=mask, is_causal=True, **kwargs)
    assert ours.exact_calls == 0
    hinted, _ = ours(*inputs, attn_mask=mask, is_causal=True, **kwargs)
    alone, _ = ours(*inputs, is_causal=True, **kwargs)
    assert torch.equal(hinted, alone)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "attn", "pad"),
    [
        ({}, "2d bool", None),
        ({}, "3d float", None),
        ({}, "2d float", "float"),
        ({}, "3d bool", "bool"),
        (dict(add_bias_kv=True), None, "bool"),
        (dict(add_zero_attn=True), "2d float", "float"),
        (dict(add_bias_kv=True, add_zero_attn=True), "3d bool", "bool"),
    ],
)
def test_what_has_no_block_form_is_exact_and_counted(kwargs, attn, pad, need_weights):
    theirs, ours = pair(SPARSE, batch_first=True, **kwargs)
    mask = None
    if attn is not None:
        mask = torch.rand((N, M) if attn[0] == "2" else (B * HEADS, N, M)) < 0.4
        mask[..., 0] = False
        if attn.endswith("float"):
            mask = torch.randn(mask.shape)
    kpm = None if pad is None else padding(M)
    if pad == "float":
        kpm = torch.randn(B, M)  # a bias per key: exact attention adds it
    check_same(
        theirs, ours, tensors(True, True), attn_mask=mask, key_padding_mask=kpm,
        need_weights=need_weights,
    )  # fmt: skip
    assert ours.exact_calls == 1


@pytest.mark.parametrize("coarse", ["none", "block", "row"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_the_approximation(coarse, order, is_causal, padded):
    """weights @ value is the output; rows sum to 1; nothing weighs what is masked."""
    config = MRAConfig(density=0.3, block_size=16, coarse=coarse, order=order)
    m = MRAMultiheadAttention(E, HEADS, batch_first=True, config=config).double()
    x = torch.randn(B, 90, E, dtype=torch.float64)
    kpm = padding(90) if padded else None
    out, weights = m(x, x, x, kpm, average_attn_weights=False, is_causal=is_causal)
    value = nn.functional.linear(x, *(p.chunk(3)[2] for p in (m.in_proj_weight, m.in_proj_bias)))
    value = value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    again = m.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    live = weights.new_ones(weights.shape, dtype=torch.bool)
    if padded:
        live &= ~kpm[:, None, None, :]
    if is_causal:
        live &= torch.ones(90, 90, dtype=torch.bool).tril()
    assert (weights[~live] == 0).all()
    # A row whose visible keys are all dropped (coarse none) is the one that doesn't sum to 1.
    sums = weights.sum(-1)
    ones = torch.where(weights.abs().sum(-1) == 0, 0.0, 1.0).double()
    torch.testing.assert_close(sums, ones, rtol=0, atol=1e-12)
    assert ones.mean() > 0.9
    without, none = m(x, x, x, kpm, need_weights=False, is_causal=is_causal)
    assert none is None and torch.equal(without, out)
    mean = m(x, x, x, kpm, is_causal=is_causal)[1]
    torch.testing.assert_close(mean, weights.mean(1))


def test_state_dict_both_ways():
    for kwargs in ({}, dict(kdim=24, vdim=40), dict(bias=False), dict(add_bias_kv=True)):
        theirs, ours = pair(**kwargs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        again = nn.MultiheadAttention(E, HEADS, **kwargs)
        again.load_state_dict(ours.state_dict())
        for a, b in zip(again.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_initialisation_is_nns():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, HEADS)
    torch.manual_seed(3)
    ours = MRAMultiheadAttention(E, HEADS)
    assert torch.equal(theirs.in_proj_weight, ours.in_proj_weight)
    ours._reset_parameters()
    assert not ours._qkv_same_embed_dim


@pytest.mark.parametrize("device", DEVICES)
def test_head_dim_is_padded(device):
    """head_dim 10 and 5: zeros up to a multiple of 8."""
    theirs = nn.MultiheadAttention(20, 2, batch_first=True, device=device)
    ours = MRAMultiheadAttention.from_mha(theirs, EXACT)
    x = torch.randn(2, 50, 20, device=device)
    for need_weights in (False, True):
        a, b = theirs(x, x, x, need_weights=need_weights), ours(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(b[0], a[0], rtol=0, atol=1e-5)
    assert b[1].shape == a[1].shape


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_input(layout):
    theirs, ours = pair(batch_first=True)
    rows = [torch.randn(n, E) for n in (45, 7, 20)]
    x = torch.nested.as_nested_tensor(rows, layout=layout)
    with torch.no_grad():
        out, weights = ours(x, x, x, average_attn_weights=False)
        assert out.is_nested and out.layout == layout and weights.shape == (3, HEADS, 45, 45)
        for got, row in zip(out.unbind(), rows, strict=True):
            close(got, theirs(row, row, row)[0])
    with pytest.raises(ValueError, match="key_padding_mask"):
        ours(x, x, x, padding(45))


def test_from_mha_shares_everything():
    mha = nn.MultiheadAttention(E, HEADS, batch_first=True).eval()
    mha.out_proj.weight.requires_grad_(False)
    ours = MRAMultiheadAttention.from_mha(mha, EXACT)
    pairs = zip(ours.named_parameters(), mha.named_parameters(), strict=True)
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in pairs)
    assert ours.out_proj is mha.out_proj and not ours.training and ours.batch_first
    assert mha._qkv_same_embed_dim and type(mha) is nn.MultiheadAttention
    ours.extra = nn.Linear(1, 1)
    assert not hasattr(mha, "extra")
    with pytest.raises(TypeError, match="mha"):
        MRAMultiheadAttention.from_mha(nn.Linear(1, 1), EXACT)


def test_out_proj_is_called_as_a_module():
    """Adapters hook it."""
    m = MRAMultiheadAttention(E, HEADS, config=SPARSE)
    seen = []
    m.out_proj.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(N, B, E)
    m(x, x, x)
    m(x, x, x, attn_mask=torch.randn(N, N))
    assert len(seen) == 2


def test_replace_attention():
    shared = nn.MultiheadAttention(E, HEADS)

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return x

    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "own": Own(E, HEADS)})
    assert replace_attention(model, SPARSE) == 1
    assert model["a"] is model["b"][0] and isinstance(model["a"], MRAMultiheadAttention)
    assert type(model["own"]) is Own
    assert replace_attention(model, EXACT) == 1 and model["a"].config == EXACT
    with pytest.raises(ValueError, match="from_mha"):
        replace_attention(shared, SPARSE)
    with pytest.raises(TypeError, match="config"):
        replace_attention(model, {"density": 0.5})
    with pytest.raises(TypeError, match="model"):
        replace_attention([shared], SPARSE)


def test_replace_attention_with_a_filter():
    layer = nn.TransformerEncoderLayer(E, HEADS, batch_first=True)
    model = nn.ModuleDict(
        {"a": nn.TransformerEncoder(layer, 3), "b": nn.TransformerEncoder(layer, 1)}
    )
    asked = []

    def only(*wanted):
        def choose(name, module):
            assert isinstance(module, nn.MultiheadAttention)
            asked.append(name)
            return name in wanted

        return choose

    first, second = "a.layers.0.self_attn", "a.layers.1.self_attn"
    names = [first, second, "a.layers.2.self_attn", "b.layers.0.self_attn"]
    assert replace_attention(model, SPARSE, only()) == 0 and asked == names
    assert model["a"].use_nested_tensor and model["b"].use_nested_tensor
    assert replace_attention(model, SPARSE, only(second)) == 1
    ours = [name for name, m in model.named_modules() if isinstance(m, MRAMultiheadAttention)]
    assert ours == [second]
    assert not model["a"].use_nested_tensor and model["b"].use_nested_tensor
    assert replace_attention(model, EXACT, only(first)) == 1  # the other keeps its config
    assert model.get_submodule(second).config == SPARSE
    assert replace_attention(model, EXACT) == 4 and model.get_submodule(second).config == EXACT
    with pytest.raises(TypeError, match="filter: got str"):
        replace_attention(model, SPARSE, "a")


def test_replace_attention_asks_for_each_name_of_a_module():
    shared = nn.MultiheadAttention(E, HEADS)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert replace_attention(model, SPARSE, lambda name, module: name == "b.0") == 1
    assert model["a"] is shared and isinstance(model["b"][0], MRAMultiheadAttention)
    assert model["b"][0].in_proj_weight is shared.in_proj_weight


def test_dropout_warns_once_while_training():
    m = MRAMultiheadAttention(E, HEADS, dropout=0.1, config=SPARSE)
    x = torch.randn(N, B, E)
    with pytest.warns(UserWarning, match="dropout"):
        m(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m(x, x, x)
        MRAMultiheadAttention(E, HEADS, dropout=0.1, config=SPARSE).eval()(x, x, x)


@pytest.mark.parametrize(
    ("name", "error", "kwargs"),
    [
        ("key_padding_mask", TypeError, dict(key_padding_mask=torch.ones(B, N).long())),
        ("attn_mask", TypeError, dict(attn_mask=torch.ones(N, N).int())),
    ],
)
def test_wrong_masks(name, error, kwargs):
    m = MRAMultiheadAttention(E, HEADS, batch_first=True, config=SPARSE)
    x = torch.randn(B, N, E)
    with pytest.raises(error, match=name):
        m(**{**dict(query=x, key=x, value=x), **kwargs})


def test_wrong_config():
    with pytest.raises(TypeError, match="config"):
        MRAMultiheadAttention(E, HEADS, config=0.5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device, exact):
    """At most twice the error of torch's module, the gradients in the dtype of the parameters."""
    theirs, ours = pair(batch_first=True, device=device, add_zero_attn=exact)
    x = torch.randn(B, N, E, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        got, same = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert got.dtype == torch.bfloat16
    got.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in ours.parameters())
    best = theirs.double()(*[x.double()] * 3)[0]
    assert relative_error(got, best) <= limit(torch.bfloat16, device, relative_error(same, best))
