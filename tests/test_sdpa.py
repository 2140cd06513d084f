"""mra_sdpa and replace_sdpa: torch's function, with MRA attention where it can say the same."""

import itertools
import warnings

import pytest
import torch
from helpers import DEVICES, new_seed, relative_error
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import mra_attention as mra
from mra_attention import MRAConfig, mra_sdpa, replace_sdpa

EXACT = MRAConfig(density=1.0, block_size=32)
SPARSE = MRAConfig(density=1 / 4, block_size=32)
B, H, N, M, D = 2, 4, 70, 90, 16


@pytest.fixture(autouse=True)
def fresh_counts():
    mra.sdpa.stats(reset=True)


def inputs(device="cpu", *, heads=H, key_heads=H, n=N, m=M, d=D, value_d=None, dtype=None):
    g = torch.Generator().manual_seed(new_seed())
    dtype = dtype or (torch.float64 if device == "cpu" else torch.float32)
    shapes = [(B, heads, n, d), (B, key_heads, m, d), (B, key_heads, m, value_d or d)]
    return [torch.randn(*s, generator=g).to(device, dtype).requires_grad_() for s in shapes]


def key_masks(device):
    """The same mask of keys in every form that has one row for all queries and heads."""
    mask = torch.arange(M, device=device) < torch.tensor([[M], [M // 2]], device=device)
    row = mask[:, None, None, :]
    yield "(B, 1, 1, M)", row
    yield "(B, 1, N, M) expanded", row.expand(B, 1, N, M)
    yield "(B, H, N, M) expanded", row.expand(B, H, N, M)
    yield "(1, M)", mask[1:]
    yield "(1, 1, 1, M)", row[1:]


def assert_same(ours, theirs, tensors, device):
    """Values and gradients."""
    tolerance = 1e-12 if device == "cpu" else 2e-5  # 1e-5 for each side
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert relative_error(ours, theirs) <= tolerance
    grad = torch.randn_like(theirs)
    pairs = zip(
        torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad),
        strict=True,
    )  # fmt: skip
    for got, expected in pairs:
        assert relative_error(got, expected) <= tolerance


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("d", [16, 20])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_density_one_is_torch_s_function(device, is_causal, d, scale):
    tensors = inputs(device, m=N if is_causal else M, d=d)
    options = {"is_causal": is_causal, "scale": scale}
    ours = mra_sdpa(*tensors, **options, config=EXACT)
    assert_same(ours, F.scaled_dot_product_attention(*tensors, **options), tensors, device)
    assert mra.sdpa.stats() == {"mra": 1}


@pytest.mark.parametrize("form", range(5))
@pytest.mark.parametrize("device", DEVICES)
def test_masks_of_keys(device, form):
    name, mask = list(key_masks(device))[form]
    tensors = inputs(device)
    ours = mra_sdpa(*tensors, mask, config=EXACT)
    assert mra.sdpa.stats() == {"mra": 1}, name
    assert_same(ours, F.scaled_dot_product_attention(*tensors, mask), tensors, device)


@pytest.mark.parametrize("device", DEVICES)
def test_without_heads_and_grouped_heads(device):
    tensors = [x[:, 0].detach().requires_grad_() for x in inputs(device)]
    for mask in (None, torch.arange(M, device=device)[None] < 40):
        ours = mra_sdpa(*tensors, mask, config=EXACT)
        assert_same(ours, F.scaled_dot_product_attention(*tensors, mask), tensors, device)
    mask = (torch.arange(M, device=device) < 40).expand(B, N, M)
    ours = mra_sdpa(*tensors, mask, config=EXACT)
    assert_same(ours, F.scaled_dot_product_attention(*tensors, mask), tensors, device)
    tensors = inputs(device, key_heads=2)
    ours = mra_sdpa(*tensors, enable_gqa=True, config=EXACT)
    theirs = F.scaled_dot_product_attention(*tensors, enable_gqa=True)
    assert_same(ours, theirs, tensors, device)
    assert mra.sdpa.stats() == {"mra": 4}


def test_it_is_mra_attention():
    q, k, v = inputs(dtype=torch.float32)
    mask = torch.arange(M)[None] < 77
    ours = mra_sdpa(q, k, v, mask, config=SPARSE)
    assert torch.equal(ours, mra.mra_attention(q, k, v, mask.expand(B, M), config=SPARSE))
    assert relative_error(ours, F.scaled_dot_product_attention(q, k, v, mask)) > 1e-3


def exact_calls():
    """(reason, tensors, arguments) of calls that have no block form."""
    q, k, v = inputs()
    some = torch.rand(B, H, N, M) < 0.5
    some[..., 0] = True
    yield "float64 mask", (q, k, v), {"attn_mask": some.double().log()}
    yield "mask of single queries or heads", (q, k, v), {"attn_mask": some}
    yield "mask of single queries or heads", (q, k, v), {"attn_mask": some[0, 0]}
    yield "mask of single queries or heads", (q, k, v), {"attn_mask": some[:, :, :1]}
    yield "is_causal with N != M", (q, k, v), {"is_causal": True}
    yield "one query", inputs(n=1), {}
    yield "head_dim 16 with 24 of value", inputs(value_d=24), {}
    yield "head_dim 264 with 264 of value", inputs(d=264), {}
    yield "5-D query", [x[None] for x in inputs()], {}
    yield "2-D query", [x[0, 0] for x in inputs()], {}
    yield "shapes", (q, k[:1], v[:1]), {}


@pytest.mark.parametrize("call", range(11))
def test_exact_calls_are_torch_s_and_counted(call):
    reason, tensors, arguments = list(exact_calls())[call]
    ours = mra_sdpa(*tensors, **arguments, config=SPARSE)
    theirs = F.scaled_dot_product_attention(*tensors, **arguments)
    assert mra.sdpa.stats(reset=True) == {f"exact: {reason}": 1}
    assert torch.equal(ours, theirs) and mra.sdpa.stats() == {}


def test_what_torch_refuses_is_refused():
    q, k, v = inputs()
    for wrong in ((q, k[..., :8], v), (q, k.float(), v)):
        for function in (F.scaled_dot_product_attention, mra_sdpa):
            with pytest.raises(RuntimeError):
                function(*wrong)
    assert mra.sdpa.stats() == {"exact: shapes": 1, "exact: dtypes": 1}
    for wrong in (lambda: mra_sdpa(q, k, v, config={}), lambda: replace_sdpa("sparse")):
        with pytest.raises(TypeError, match="config: got"):
            wrong()


def test_a_row_without_a_key_gives_zeros():
    q, k, v = inputs()
    mask = torch.zeros(B, 1, 1, M, dtype=torch.bool)
    mask[0] = True
    out = mra_sdpa(q, k, v, mask, config=SPARSE)
    assert out[0].any() and not out[1].any()


def test_dropout_warns_once_and_is_not_applied(monkeypatch):
    monkeypatch.setattr(mra.calls, "_warned", set())
    q, k, v = inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [mra_sdpa(q, k, v, dropout_p=0.5, config=SPARSE) for _ in range(2)]
    assert ["dropout_p" in str(w.message) for w in caught] == [True]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], mra_sdpa(q, k, v, config=SPARSE))


def test_dropout_compiles_whole(monkeypatch):
    """The warning is given while the program is traced, and breaks nothing."""
    monkeypatch.setattr(mra.calls, "_warned", set())
    q, k, v = inputs()
    compiled = torch.compile(
        lambda *qkv: mra_sdpa(*qkv, dropout_p=0.5, config=SPARSE),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="dropout_p"):
        out = compiled(q, k, v)
    assert torch.equal(out, mra_sdpa(q, k, v, config=SPARSE))


# In the place of torch's function


class Block(nn.Module):
    """As timm and diffusers write it."""

    def __init__(self, call):
        super().__init__()
        self.qkv, self.call = nn.Linear(64, 192), call

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.call(q, k, v, dropout_p=0.0).transpose(1, 2).flatten(2)


def by_attribute(*args, **kwargs):
    return F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("call", [by_attribute, imported_by_name])
def test_replaced_in_a_model(call):
    model, x = Block(call).double(), torch.randn(2, 100, 64, dtype=torch.float64)
    plain = model(x)
    with replace_sdpa(SPARSE):
        sparse = model(x)
    assert mra.sdpa.stats(reset=True) == {"mra": 1}
    with replace_sdpa(EXACT):
        assert relative_error(model(x), plain) <= 1e-12
    assert mra.sdpa.stats(reset=True) == {"mra": 1}
    assert relative_error(sparse, plain) > 1e-3
    assert torch.equal(model(x), plain) and mra.sdpa.stats() == {}  # nothing is left behind


def test_the_innermost_config_holds():
    q, k, v = inputs()
    with replace_sdpa(SPARSE):
        outer = imported_by_name(q, k, v)
        with replace_sdpa(EXACT):
            inner = imported_by_name(q, k, v)
        again = imported_by_name(q, k, v)
    assert torch.equal(outer, again)
    assert torch.equal(outer, mra_sdpa(q, k, v, config=SPARSE))
    assert torch.equal(inner, mra_sdpa(q, k, v, config=EXACT))


def test_nested_contexts_count_a_call_once():
    """And what the inner one runs as exact attention, the outer one leaves so."""
    q, k, v = inputs(m=N)
    bias = torch.randn(N, N, dtype=q.dtype)
    module = nn.MultiheadAttention(H * D, H, batch_first=True)
    x = torch.randn(B, N, H * D)
    with replace_sdpa(SPARSE), replace_sdpa(EXACT):
        out = F.scaled_dot_product_attention(q, k, v, bias)
        module(x, x, x)
    assert mra.sdpa.stats() == {"exact: float64 mask": 1, "exact: nn.MultiheadAttention": 1}
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, bias))
    mra.sdpa.stats(reset=True)
    with replace_sdpa(SPARSE), replace_sdpa(SPARSE, exact_below=N + 1):
        out = F.scaled_dot_product_attention(q, k, v)
    assert mra.sdpa.stats() == {"exact: below exact_below": 1}
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))


def test_it_ends_with_an_error():
    q, k, v = inputs()
    with pytest.raises(ZeroDivisionError), replace_sdpa(SPARSE):
        raise ZeroDivisionError
    F.scaled_dot_product_attention(q, k, v)
    assert mra.sdpa.stats() == {}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_stays_exact_and_is_counted(train, grad, need_weights):
    mha, x = nn.MultiheadAttention(64, 4, batch_first=True).train(train), torch.randn(2, 100, 64)
    with torch.set_grad_enabled(grad):
        plain, _ = mha(x, x, x, need_weights=need_weights)
        with replace_sdpa(SPARSE):
            same, _ = mha(x, x, x, need_weights=need_weights)
    assert mra.sdpa.stats() == {"exact: nn.MultiheadAttention": 1}
    assert relative_error(same, plain) <= 1e-5


def test_gradients_go_through():
    model, x = Block(by_attribute), torch.randn(2, 100, 64)
    with replace_sdpa(SPARSE):
        model(x).sum().backward()
    assert model.qkv.weight.grad.any()


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_graph_break(masked):
    q, k, v = inputs(dtype=torch.float32)
    mask = (torch.arange(M) < 50)[None, None, None].expand(B, 1, 1, M) if masked else None

    def direct(q, k, v, mask):
        return mra_sdpa(q, k, v, mask, config=SPARSE)

    def plain(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)

    expected = direct(q, k, v, mask)
    torch._dynamo.reset()
    compiled = torch.compile(direct, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v, mask), expected) <= 1e-6
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    outside = compiled(q, k, v, mask)
    with replace_sdpa(SPARSE):
        assert relative_error(compiled(q, k, v, mask), expected) <= 1e-6
    again = compiled(q, k, v, mask)
    assert torch.equal(outside, again) and relative_error(again, expected) > 1e-3


def test_every_combination_runs():
    """Masks × causal × grouped heads × dtypes: finite, and as many calls counted as made."""
    made = 0
    for dtype, is_causal, key_heads, masked in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (4, 2), (False, True)
    ):
        tensors = inputs(dtype=dtype, key_heads=key_heads, m=N if is_causal else M)
        mask = torch.ones(B, 1, 1, M, dtype=torch.bool) if masked and not is_causal else None
        out = mra_sdpa(*tensors, mask, is_causal=is_causal, enable_gqa=True, config=SPARSE)
        out.float().sum().backward()
        made += 1
        assert out.dtype == dtype and out.isfinite().all()
        assert all(x.grad.isfinite().all() for x in tensors)
    assert mra.sdpa.stats() == {"mra": made}
