"""Hugging Face models: attn_implementation="mra", and transformers' own MraModel."""

import subprocess
import sys

import pytest
import torch

import mra_attention as mra
from mra_attention import MRAConfig
from mra_attention.reference import mra_attention_reference

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=512,
)  # fmt: skip
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
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    if padded:
        check_same(model, mask.bool(), input_ids=ids, attention_mask=mask)
    else:
        check_same(model, input_ids=ids)
    assert mra.transformers.stats(reset=True) == {"mra": 2}
    dense = run(model, EXACT, mask.bool(), input_ids=ids, attention_mask=mask)[0]
    sparse = run(model, SPARSE, mask.bool(), input_ids=ids, attention_mask=mask)[0]
    assert (dense - sparse).abs().max() > 1e-6  # float64: the config arrives


def llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options)
    return transformers.LlamaModel(config)


def test_llama_causal_with_grouped_heads():
    ids, _ = batch()
    check_same(llama(), input_ids=ids, use_cache=False)
    assert mra.transformers.stats() == {"mra": 2}


def test_llama_padded_is_exact_and_counted():
    """Causal with padding comes as a 4-D mask; nothing is dropped."""
    ids, mask = batch()
    check_same(llama(), mask.bool(), input_ids=ids, attention_mask=mask, use_cache=False)
    assert mra.transformers.stats() == {"exact: 4-D mask": 2}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(cache):
    """Prefill, then one query at a time: the same tokens as exact attention gives."""
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=None
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
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=32, attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    )  # fmt: skip
    oss = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=32, num_local_experts=2,
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


def test_compiles_whole():
    ids, mask = batch()
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
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


# transformers' own MraModel


@pytest.fixture
def modeling_mra():
    """The module, unpatched before and after a test."""
    from transformers.models.mra import modeling_mra as module

    attention, encoder = module.MraSelfAttention, module.MraEncoder
    kept = attention.__init__, attention.forward, encoder.forward
    yield module
    attention.__init__, attention.forward, encoder.forward = kept


def mra_model(**options):
    sizes = {**SIZES, "max_position_embeddings": 256, "hidden_dropout_prob": 0.0}
    config = transformers.MraConfig(**{**sizes, **options})
    return transformers.MraModel(config)


MODES = [("full", 0, 0), ("sparse", 0, 0), ("full", 1, 3)]


@pytest.mark.parametrize(("mode", "first", "diagonal"), MODES)
@pytest.mark.parametrize("heads", [4, 1, 16])  # head_dim 16, 64 and 4
def test_mra_model_attention_is_the_papers(modeling_mra, mode, first, diagonal, heads):
    """The patched layer against the reference, gradients included."""
    mra.transformers.patch_mra_model()
    config = transformers.MraConfig(
        **{**SIZES, "num_attention_heads": heads}, block_per_row=2, approx_mode=mode,
        initial_prior_first_n_blocks=first, initial_prior_diagonal_n_blocks=diagonal,
    )  # fmt: skip
    layer = modeling_mra.MraSelfAttention(config).double()
    torch.nn.init.normal_(layer.query.weight, std=0.5)
    torch.nn.init.normal_(layer.key.weight, std=0.5)
    mask = torch.arange(N) < torch.tensor([[N], [60], [5]])
    bias = torch.zeros(B, 1, 1, N).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    x = torch.randn(B, N, 64, dtype=torch.float64, requires_grad=True)
    (out,) = layer(x, bias)
    q, k, v = (
        p(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for p in (layer.query, layer.key, layer.value)
    )
    expected = mra_attention_reference(
        q, k, v, mask, mask, blocks_per_row=2, block_size=32, order=0, selection="global",
        coarse="block" if mode == "full" else "none", first_blocks=first,
        diagonal_blocks=diagonal,
    )  # fmt: skip
    expected = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(out)
    inputs = (x, *(p for p in layer.parameters()))
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * max(1.0, b.abs().max().item()))


def test_mra_model_gives_zeros_without_the_patch(modeling_mra):
    """Why it exists. Should this fail, transformers has fixed its model."""
    if modeling_mra.mra_cuda_kernel is not None:
        pytest.skip("transformers found its own CUDA kernel")
    x = torch.randn(2, 64, 64)
    layer = modeling_mra.MraSelfAttention(transformers.MraConfig(**SIZES))
    assert (layer(x, torch.zeros(2, 1, 1, 64))[0] == 0).all()
    mra.transformers.patch_mra_model()
    layer = modeling_mra.MraSelfAttention(transformers.MraConfig(**SIZES))
    assert (layer(x, torch.zeros(2, 1, 1, 64))[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 33, 130])
def test_mra_model_any_dtype_any_length(modeling_mra, dtype, length):
    """Built before the patch; every projection gets a gradient."""
    model = mra_model().to(dtype)
    mra.transformers.patch_mra_model()
    mra.transformers.patch_mra_model()  # changes nothing
    ids, mask = batch()
    out = model(ids[:, :length], attention_mask=mask[:, :length]).last_hidden_state
    assert out.dtype == dtype and out.isfinite().all()
    (out.float() * torch.randn(out.shape)).sum().backward()
    for name, p in model.encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if length > 1 and ".self." in name and not name.endswith("key.bias"):
            assert p.grad.abs().max() > 0, name


def test_mra_model_padding_of_a_batch_stays_apart(modeling_mra):
    """Each sequence alone gives what it gives in the batch."""
    mra.transformers.patch_mra_model()
    model = mra_model(block_per_row=8).double().eval()  # the whole map: no plan to differ
    ids, mask = batch()
    together = model(ids, attention_mask=mask).last_hidden_state
    for b in range(B):
        n = mask[b].sum()
        alone = model(ids[b : b + 1, :n]).last_hidden_state
        torch.testing.assert_close(together[b, :n], alone[0], rtol=0, atol=1e-12)
