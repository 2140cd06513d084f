"""A config with a layout: modules, mra_sdpa, Hugging Face models."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mra_attention as mra
from mra_attention import MRAConfig, MRAMultiheadAttention, crossover, replace_attention

H, W, E, HEADS, B = 10, 13, 32, 4, 2
N = 1 + H * W
CONFIG = MRAConfig(density=0.3, block_size=(16, 32), layout=(H, W))
EXACT = {"exact: layout": 1}


@pytest.fixture(autouse=True)
def nothing_counted():
    for front in (mra.modules, mra.sdpa, mra.transformers):
        front.stats(reset=True)


def attention(**kwargs):
    return MRAMultiheadAttention(E, HEADS, batch_first=True, config=CONFIG, **kwargs).double()


def tokens(n=N):
    return torch.randn(B, n, E, dtype=torch.float64)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("coarse", ["none", "block", "row"])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_in_the_order_of_the_tokens(coarse, order, padded):
    """weights @ value is the output; they sum to 1; some of them are those of exact attention."""
    ours = attention(bias=False)
    ours.config = CONFIG.replace(coarse=coarse, order=order)
    x = tokens()
    ignored = torch.arange(N) >= torch.tensor([[N], [N - 20]]) if padded else None
    out, weights = ours(x, x, x, ignored, average_attn_weights=False)
    assert weights.shape == (B, HEADS, N, N)
    value = (x @ ours.in_proj_weight[2 * E :].mT).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    again = (weights @ value).transpose(1, 2).flatten(2) @ ours.out_proj.weight.mT
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, N).double())
    if padded:
        assert not weights[1, :, :, N - 20 :].any()
    assert mra.modules.stats() == {"mra": 1}
    short = MRAMultiheadAttention.from_mha(ours, ours.config, exact_below=1000)
    assert short(x, x, x, ignored, need_weights=False)[0].shape == out.shape
    assert mra.modules.stats() == {"mra": 1, f"exact: {crossover.BELOW}": 1}


@pytest.mark.parametrize("call", ["fewer tokens", "other keys", "causal"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_module_is_exact_where_the_layout_does_not_fit(call, need_weights):
    ours = attention()
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = tokens(N - 2 if call == "fewer tokens" else N)
    y = tokens(N + 3) if call == "other keys" else x
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    theirs_more = dict(attn_mask=mask) if call == "causal" else {}
    got = ours(x, y, y, need_weights=need_weights, is_causal=call == "causal")
    expected = theirs(x, y, y, need_weights=need_weights, **theirs_more)
    torch.testing.assert_close(got[0], expected[0])
    if need_weights:
        torch.testing.assert_close(got[1], expected[1])
    assert mra.modules.stats() == EXACT and ours.exact_calls == 1


def test_replaced_layers_of_several_sizes():
    """An encoder of the picture and a decoder of a few queries, as detectors have."""
    model = nn.Transformer(E, HEADS, 1, 1, 32, dropout=0.0, batch_first=True).double()
    whole = MRAConfig(density=1.0, block_size=32, layout=(H, W))
    picture, queries = tokens(), tokens(7)
    expected = model(picture, queries)
    assert replace_attention(model, whole) == 3
    torch.testing.assert_close(model(picture, queries), expected)
    assert mra.modules.stats() == {"mra": 1, "exact: layout": 2}


def test_sdpa():
    q, k, v = torch.randn(3, B, HEADS, N, 16).unbind(0)
    out = mra.mra_sdpa(q, k, v, config=CONFIG)
    assert torch.equal(out, mra.mra_attention(q, k, v, config=CONFIG))
    mask = torch.rand(B, 1, 1, N) < 0.7
    out = mra.mra_sdpa(q, k, v, mask, config=CONFIG)
    assert torch.equal(out, mra.mra_attention(q, k, v, mask[:, 0, 0], config=CONFIG))
    assert mra.sdpa.stats(reset=True) == {"mra": 2}
    with mra.replace_sdpa(CONFIG):
        for args, more in (
            ((q, k[:, :, 1:], v[:, :, 1:]), {}),
            ((q[:, :, 2:], k[:, :, 2:], v[:, :, 2:]), {}),
            ((q, k, v), {"is_causal": True}),
        ):
            out = F.scaled_dot_product_attention(*args, **more)
            exact = mra.exact.exact_attention(*args, **more)[0]
            torch.testing.assert_close(out, exact)
    assert mra.sdpa.stats() == {"exact: layout": 3}


def test_auto_measures_without_the_layout(monkeypatch):
    monkeypatch.setattr(crossover, "_measured", {})
    monkeypatch.setattr(crossover, "LENGTHS", (64,))
    asked = crossover.tokens("cpu", torch.float32, 16, CONFIG)
    assert asked == crossover.tokens("cpu", torch.float32, 16, CONFIG.replace(layout=None))
    assert len(crossover._measured) == 1


def test_vision_transformer():
    """196 patches and a class token, registered with their layout; a text model beside it."""
    transformers = pytest.importorskip("transformers")
    config = MRAConfig(density=1.0, block_size=32, layout=(14, 14))
    mra.transformers.register("mra-14x14", config)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()
    small = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 224, 224)
        expected = [model(pixels), model(small, interpolate_pos_encoding=True)]
        model.set_attn_implementation("mra-14x14")
        out = model(pixels)
        assert mra.transformers.stats(reset=True) == {"mra": 2}
        torch.testing.assert_close(out[0], expected[0][0], rtol=1e-4, atol=1e-5)
        out = model(small, interpolate_pos_encoding=True)
        assert mra.transformers.stats(reset=True) == {"exact: layout": 2}
        torch.testing.assert_close(out[0], expected[1][0], rtol=1e-4, atol=1e-5)
    llama = transformers.LlamaConfig(vocab_size=99, **sizes, attn_implementation="mra-14x14")
    transformers.LlamaModel(llama)(torch.randint(99, (1, 250)))
    assert mra.transformers.stats() == {"exact: layout": 2}


def test_compiles_whole_for_pictures_with_and_without_a_class_token():
    ours = attention()

    def model(x):
        return ours(x, x, x, need_weights=False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (N, N - 1, N - 2):  # the last one runs as exact attention
        x = tokens(n)
        torch.testing.assert_close(compiled(x), model(x))
