"""MRAMultiheadAttention inside nn.TransformerEncoder, nn.Transformer and torch.compile."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICES
from test_module import EXACT, HEADS, SPARSE, B, E, M, N, padding
from torch import nn

from mra_attention import MRAConfig, MRAMultiheadAttention, replace_attention


@pytest.fixture
def calls(monkeypatch):
    """Grows by one with each call of an MRA module's forward.

    Not by a hook: torch's encoder layer leaves its fused path where a module has one."""
    seen, forward = [], MRAMultiheadAttention.forward

    def counted(self, *args, **kwargs):
        seen.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MRAMultiheadAttention, "forward", counted)
    return seen


def encoder(config=EXACT, layers=2, **kwargs):
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 64, dropout=0.0, batch_first=True, norm_first=False, **kwargs
    )
    model = nn.TransformerEncoder(layer, layers)
    assert replace_attention(model, config) == layers
    return model


def replaced(where):
    """A model of torch's layers with MRA attention in it, and how often a call must run it."""
    layer = nn.TransformerEncoderLayer(E, HEADS, 64, dropout=0.0, batch_first=True)
    if where != "a built encoder":
        assert replace_attention(layer, EXACT) == 1
    if where == "a layer":
        return layer, 1
    model = nn.TransformerEncoder(layer, 2)
    if where == "a built encoder":
        assert replace_attention(model, EXACT) == 2
    return model, 2


MODES = {
    "train": torch.enable_grad,
    "eval with grad": torch.enable_grad,
    "eval": torch.no_grad,
    "eval inference": torch.inference_mode,
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("mask", "compiled"),
    [(None, False), (None, True), ("padding", False), ("padding", True), ("causal", False),
     ("both", False)],
)  # fmt: skip
@pytest.mark.parametrize("where", ["a layer", "a layer, then built", "a built encoder"])
def test_forward_is_called_in_every_mode(where, mask, mode, compiled, calls):
    """nn's fused layer would bypass it; and the result is that of torch's own attention."""
    model, count = replaced(where)
    model.train(mode == "train")
    plain = copy.deepcopy(model).train()  # in train torch itself fuses nothing
    for m in list(plain.modules()):
        if hasattr(m, "self_attn"):
            ours, m.self_attn = m.self_attn, nn.MultiheadAttention(E, HEADS, batch_first=True)
            m.self_attn.load_state_dict(ours.state_dict())
    x, kwargs = torch.randn(B, N, E), {}
    if mask in ("padding", "both"):
        kwargs["src_key_padding_mask"] = padding(N)
    if mask in ("causal", "both"):
        name = "src_mask" if where == "a layer" else "mask"
        kwargs[name], kwargs["is_causal"] = torch.ones(N, N, dtype=torch.bool).triu(1), True
    call = model
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, backend="eager", fullgraph=True)
    expected = plain(x, **kwargs)
    with MODES[mode]():
        got = call(x, **kwargs)
        call(x, **kwargs)
    assert len(calls) == 2 * count
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_forward_is_traced_when_compiled():
    model = encoder(MRAConfig(density=0.3, block_size=16)).double().eval()
    x = torch.randn(B, N, E, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)
        for layer in model.layers:
            layer.self_attn.config = EXACT
        assert (model(x) - expected).abs().max() > 1e-6  # so the compiled one ran MRA


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["key_padding_mask", "is_causal", "attn_mask", "need_weights"])
def test_compiles_whole(device, kind):
    m = MRAMultiheadAttention(E, HEADS, batch_first=True, config=SPARSE).to(device).eval()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (70, 41):
        x = torch.randn(B, n, E, device=device)
        kwargs = {
            "key_padding_mask": dict(
                key_padding_mask=torch.zeros(B, n, device=device).masked_fill(
                    padding(n, device), -torch.inf
                ),
                need_weights=False,
            ),
            "is_causal": dict(is_causal=True, need_weights=False),
            "attn_mask": dict(attn_mask=torch.randn(n, n, device=device)),
            "need_weights": {},
        }[kind]
        for a, b in zip(compiled(x, x, x, **kwargs), m(x, x, x, **kwargs), strict=True):
            torch.testing.assert_close(a, b)


def test_encoder_equals_the_original():
    layer = nn.TransformerEncoderLayer(E, HEADS, 64, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).train()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours, EXACT) == 2 and not ours.use_nested_tensor
    x, kpm = torch.randn(B, N, E), padding(N)
    for mask in (None, nn.Transformer.generate_square_subsequent_mask(N)):
        a = theirs(x, mask=mask, src_key_padding_mask=kpm)
        b = ours(x, mask=mask, src_key_padding_mask=kpm)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    assert sum(layer.self_attn.exact_calls for layer in ours.layers) == 0  # nn gave the hint


def test_transformer_with_cross_attention(calls):
    theirs = nn.Transformer(E, HEADS, 1, 1, 64, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours, EXACT) == 3
    source, target = torch.randn(B, M, E), torch.randn(B, N, E)
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    kwargs = dict(tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padding(M))
    torch.testing.assert_close(
        ours(source, target, **kwargs), theirs(source, target, **kwargs), rtol=0, atol=1e-5
    )
    assert len(calls) == 3


def test_nested_from_an_encoder_built_before(calls):
    """An encoder may still hand nested tensors to a layer that was replaced by hand."""
    layer = nn.TransformerEncoderLayer(E, HEADS, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    expected = copy.deepcopy(model).train()
    for layer in model.layers:
        layer.self_attn = MRAMultiheadAttention.from_mha(layer.self_attn, EXACT)
    x, kpm = torch.randn(B, N, E), padding(N)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=kpm)
    assert len(calls) == 2
    length = out.shape[1]
    live = ~kpm[:, :length]
    torch.testing.assert_close(
        out[live], expected(x, src_key_padding_mask=kpm)[:, :length][live], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_working(copied, calls):
    model = encoder(SPARSE).eval()
    again = copied(model)
    x = torch.randn(B, N, E)
    with torch.no_grad():
        got = again(x)
        assert len(calls) == 2
        assert torch.equal(got, model(x))
    assert all(layer.self_attn.config == SPARSE for layer in again.layers)
