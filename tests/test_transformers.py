"""Hugging Face models with attn_implementation="mra"; architectures: test_architectures.py."""

import subprocess
import sys

import pytest
import torch
from helpers import MODEL_SIZES

import mra_attention as mra
from mra_attention import MRAConfig

transformers = pytest.importorskip("transformers")

B, N = 3, 130
EXACT, SPARSE = "mra-exact", "mra-sparse"


@pytest.fixture(autouse=True)
def registered():
    mra.transformers.register(EXACT, MRAConfig(density=1.0, block_size=32))
    mra.transformers.register(SPARSE, MRAConfig(density=0.3, block_size=32))
    mra.transformers.stats(reset=True)


def batch():
    ids = torch.randint(0, 99, (B, N))
    lengths = torch.tensor([[N], [60], [5]])
    return ids, (torch.arange(N) < lengths).long()


def run(model, implementation, live=None, output="last_hidden_state", **inputs):
    """Hidden states (of live tokens) and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**inputs)[output]
    out = out if live is None else out[live]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def check_same(model, live=None, **inputs):
    model = model.double().eval()
    theirs, ours = (run(model, name, live, **inputs) for name in ("sdpa", EXACT))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        scale = max(1.0, theirs[1][name].abs().max().item())
        torch.testing.assert_close(grad, theirs[1][name], rtol=0, atol=1e-11 * scale, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_bert(padded):
    ids, mask = batch()
    model = transformers.BertModel(transformers.BertConfig(**MODEL_SIZES))
    if padded:
        check_same(model, mask.bool(), input_ids=ids, attention_mask=mask)
    else:
        check_same(model, input_ids=ids)
    assert mra.transformers.stats(reset=True) == {"mra": 2}
    dense = run(model, EXACT, mask.bool(), input_ids=ids, attention_mask=mask)[0]
    sparse = run(model, SPARSE, mask.bool(), input_ids=ids, attention_mask=mask)[0]
    assert (dense - sparse).abs().max() > 1e-6  # float64: the config arrives


def llama(**options):
    config = transformers.LlamaConfig(**MODEL_SIZES, num_key_value_heads=2, **options)
    return transformers.LlamaModel(config)


def test_llama_causal_with_grouped_heads():
    ids, _ = batch()
    check_same(llama(), input_ids=ids, use_cache=False)
    assert mra.transformers.stats() == {"mra": 2}


@pytest.mark.parametrize("side", ["right", "left"])
def test_llama_padded(side):
    """Causal and padded at once; what isn't padding stays as it was."""
    ids, mask = batch()
    mask = mask if side == "right" else mask.flip(1)
    check_same(llama(), mask.bool(), input_ids=ids, attention_mask=mask, use_cache=False)
    assert mra.transformers.stats() == {"mra": 2}


def test_llama_packed_is_exact_and_counted():
    """Several texts in a row, told apart by their positions, come as a 4-D mask."""
    ids, _ = batch()
    positions = torch.cat([torch.arange(50), torch.arange(N - 50)]).expand(B, N)
    check_same(llama(), input_ids=ids, position_ids=positions, use_cache=False)
    assert mra.transformers.stats() == {"exact: 4-D mask": 2}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(cache):
    """Prefill, then one query at a time: the same tokens as exact attention gives."""
    config = transformers.LlamaConfig(
        **MODEL_SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=None
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(1, 99, (2, 70))
    tokens = []
    for name in ("sdpa", EXACT):
        model.set_attn_implementation(name)
        options = dict(max_new_tokens=4, do_sample=False, cache_implementation=cache)
        tokens.append(model.generate(ids, **options, disable_compile=True))
    assert torch.equal(*tokens)
    assert sum(mra.transformers.stats().values()) > 0


def test_encoder_decoder():
    config = transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        max_position_embeddings=512,
    )  # fmt: skip
    ids, mask = batch()
    target = torch.randint(1, 99, (B, 40))
    check_same(
        transformers.BartModel(config), input_ids=ids, attention_mask=mask,
        decoder_input_ids=target, use_cache=False,
    )  # fmt: skip
    # Encoder, decoder and cross-attention.
    assert mra.transformers.stats() == {"mra": 3}


def test_terms_without_a_block_form():
    """Sliding windows, softcap and sinks, against each model's own eager attention."""
    ids, _ = batch()
    gemma = transformers.Gemma2Config(
        **MODEL_SIZES, num_key_value_heads=2, head_dim=16, sliding_window=32,
        attn_logit_softcapping=5.0, query_pre_attn_scalar=16,
    )  # fmt: skip
    oss = transformers.GptOssConfig(
        **MODEL_SIZES, num_key_value_heads=2, head_dim=16, sliding_window=32, num_local_experts=2,
        num_experts_per_tok=2,
    )  # fmt: skip
    for kind, config in ((transformers.Gemma2Model, gemma), (transformers.GptOssModel, oss)):
        model = kind(config).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        outs = []
        for name in ("eager", EXACT):
            model.set_attn_implementation(name)
            with torch.no_grad():
                outs.append(model(ids, use_cache=False).last_hidden_state)
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-4)
        counts = mra.transformers.stats(reset=True)
        assert sum(counts.values()) == 2 and "mra" not in counts


def test_position_bias_in_half_precision():
    """Masks are wider than queries under autocast. Rows without a key are zeros, never NaN."""
    q, k, v = torch.randn(3, 2, 4, 20, 16).bfloat16()
    bias, mask = torch.randn(1, 4, 20, 20), torch.zeros(2, 1, 20, 20)
    mask[0, :, :, 10:] = mask[1, :, :5] = torch.finfo(mask.dtype).min
    out = mra.transformers._exact(None, q, k, v, mask, 1.0, 0.0, False, {"position_bias": bias})
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.float() for x in (q, k, v)), bias + mask, scale=1.0
    )
    expected[1, :, :5] = 0
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_compiles_whole():
    ids, mask = batch()
    model = transformers.BertModel(transformers.BertConfig(**MODEL_SIZES)).eval()
    model.set_attn_implementation(SPARSE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        got = compiled(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, expected)


def test_wrong_registration():
    with pytest.raises(TypeError, match="name"):
        mra.transformers.register(7)
    with pytest.raises(TypeError, match="config"):
        mra.transformers.register("mra", {"density": 0.5})


def test_imports_transformers_only_when_used():
    """And says what to do where it is missing."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import mra_attention as mra\n"
        "try: mra.transformers.register()\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install transformers" in result.stdout, result.stderr
