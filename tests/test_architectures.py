"""Architectures of Hugging Face transformers, small and random: with every block selected each is
the model that it was, at density 1/4 it trains, and every attention call is accounted for, on the
CPU and on a GPU, in single and half precision.

Also coverage(), which says of each whether its attention arrives, held against what arrives."""

import re
import warnings

import pytest
import torch
from helpers import CUDA_DTYPES, MODEL_SIZES, limit, new_seed, relative_error

import mra_attention as mra
from mra_attention import MRAConfig

transformers = pytest.importorskip("transformers")

SIZES = dict(MODEL_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    image_size=48, patch_size=4,
)  # fmt: skip
B, N, LENGTHS = 3, 130, (130, 60, 5)
DENSE, SPARSE = "mra-every-block", "mra-quarter"
BLOCK_32 = MRAConfig(block_size=32)  # five blocks, the last one short


@pytest.fixture(autouse=True)
def registered():
    mra.transformers.register(DENSE, BLOCK_32.replace(density=1.0))
    mra.transformers.register(SPARSE, BLOCK_32.replace(density=1 / 4))
    mra.transformers.stats(reset=True)
    torch.manual_seed(new_seed())


def text(length=N, **more):
    return {"input_ids": torch.randint(3, 99, (B, length)), **more}


def padding():
    return (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).long()


def padded_text(**more):
    return text(attention_mask=padding(), **more)


def pictures():
    return {"pixel_values": torch.randn(B, 3, 48, 48)}  # 144 patches and the class token


def bert(**options):
    return transformers.BertModel(transformers.BertConfig(**SIZES, **options))


def roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES))


def modernbert():
    """Layers 1 and 3 see a window of 64 tokens, layers 0 and 2 everything."""
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SIZES | dict(num_hidden_layers=4), cls_token_id=1, sep_token_id=2,
            global_attn_every_n_layers=2, local_attention=64,
        )
    )  # fmt: skip


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


def clip_text():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES))


def clip_vision():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


def t5_encoder():
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config)


def whisper_encoder():
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        num_mel_bins=8, d_model=64, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=64, max_source_positions=N,
    )  # fmt: skip
    return WhisperEncoder(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.BartModel(config)


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaModel(config)


def bert_decoder():
    return bert(is_decoder=True, add_cross_attention=True)


def crossed(mask=True):
    """Text for a decoder beside the states of an encoder, of another length and padded."""
    more = {"encoder_attention_mask": padding()} if mask else {}
    states = torch.randn(B, N, 64)
    return text(70, encoder_hidden_states=states, use_cache=False, **more)


def translated(**more):
    return padded_text(
        decoder_input_ids=torch.randint(3, 99, (B, 70)), use_cache=False, **more
    )  # fmt: skip


# name: (model, inputs, attention calls of one forward pass).
CASES = {
    "bert": (bert, text, {"mra": 2}),
    "bert, padded": (bert, padded_text, {"mra": 2}),
    "roberta, padded": (roberta, padded_text, {"mra": 2}),
    # A window is a mask of single queries and keys: exact, by way of its 4-D mask.
    "modernbert": (modernbert, text, {"mra": 2, "exact: 4-D mask": 2}),
    "modernbert, padded": (modernbert, padded_text, {"mra": 2, "exact: 4-D mask": 2}),
    "vit": (vit, pictures, {"mra": 2}),
    "clip text": (clip_text, text, {"mra": 2}),
    # Causal and padded at once has no form as a key mask.
    "clip text, padded": (clip_text, padded_text, {"exact: 4-D mask": 2}),
    "clip vision": (clip_vision, pictures, {"mra": 2}),
    # T5 adds a learned bias to each score.
    "t5 encoder, padded": (t5_encoder, padded_text, {"exact: position_bias": 2}),
    "whisper encoder": (
        whisper_encoder, lambda: {"input_features": torch.randn(B, 8, 2 * N)}, {"mra": 2},
    ),
    # Two layers of an encoder; two of a decoder, each with itself and with the encoder.
    "bart, padded": (bart, translated, {"mra": 6}),
    "bart, both padded": (
        bart, lambda: translated(decoder_attention_mask=padding()[:, :70]),
        {"mra": 4, "exact: 4-D mask": 2},
    ),
    "llama, grouped heads": (llama, lambda: text(use_cache=False), {"mra": 2}),
    "llama, padded": (llama, lambda: padded_text(use_cache=False), {"exact: 4-D mask": 2}),
    "bert decoder": (bert_decoder, crossed, {"mra": 4}),
    "bert decoder, nothing padded": (bert_decoder, lambda: crossed(mask=False), {"mra": 4}),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)
# These round states or rotated queries to float32 inside whatever their dtype, so that a difference
# of 1e-16 may come out as one of 1e-7: compared in float32 alone.
ROUND_INSIDE = ("modernbert", "llama", "t5")


def spread(model):
    """The model with attention weights that tell tokens apart: as built, all scores are near 0, and
    a wrong scale or a wrong plan would hardly show."""
    for at in mra.transformers.coverage(model).served:
        for p in model.get_submodule(at).parameters():
            if p.dim() == 2 and min(p.shape) >= 32:
                torch.nn.init.normal_(p, std=0.15)
    return model


def placed(inputs, device, dtype):
    """The inputs on a device; those of them that are floating in a dtype."""
    return {
        name: x.to(device, dtype if x.is_floating_point() else None) if torch.is_tensor(x) else x
        for name, x in inputs.items()
    }


def run(model, implementation, inputs, dtype=torch.float32, device="cpu"):
    """Output (of tokens that aren't padding) and the gradient of all parameters in one vector."""
    model.set_attn_implementation(implementation)
    model.to(device, dtype).zero_grad()
    inputs = placed(inputs, device, dtype)
    out = model(**inputs).last_hidden_state
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is not None and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=device).view(out.shape)
    (out * weights).sum().backward()
    grads = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
    return {"out": out.detach(), "grad": torch.cat(grads)}


@cases
def test_every_block_is_the_model_as_it_was(case):
    """Outputs and gradients, in float64 to 1e-12."""
    if case.startswith(ROUND_INSIDE):
        pytest.skip("rounds to float32 inside whatever its dtype")
    build, inputs, counts = CASES[case]
    model, inputs = spread(build()).eval(), inputs()
    exact = run(model, "sdpa", inputs, torch.float64)
    ours = run(model, DENSE, inputs, torch.float64)
    assert mra.transformers.stats(reset=True) == counts
    for name in exact:
        error = relative_error(ours[name], exact[name])
        assert error <= limit(torch.float64, "cpu", 0), (name, error)


@cases
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), *CUDA_DTYPES]
)
def test_every_block_in_every_dtype(case, device, dtype):
    """Outputs and gradients, with at most twice the error that the model has in that dtype with
    torch's attention."""
    build, inputs, counts = CASES[case]
    model = spread(build()).to(dtype).eval()  # to weights that all of these dtypes have
    inputs = placed(inputs(), "cpu", dtype)
    exact = run(model, "sdpa", inputs, torch.float64)
    theirs, ours = (run(model, name, inputs, dtype, device) for name in ("sdpa", DENSE))
    assert mra.transformers.stats(reset=True) == counts
    for name in exact:
        error, same = (relative_error(x[name].cpu(), exact[name]) for x in (ours, theirs))
        assert error <= max(limit(dtype, device, same), 2 * same), (name, error, same)


@cases
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_trains_at_a_quarter(case, device, dtype):
    """One step moves every projection of every attention, and the calls are those listed."""
    build, inputs, counts = CASES[case]
    model = spread(build()).to(device, dtype).eval()
    inputs = placed(inputs(), device, dtype)
    with torch.no_grad():
        outs = []
        for name in ("sdpa", SPARSE):
            model.set_attn_implementation(name)
            outs.append(model(**inputs).last_hidden_state)
    assert mra.transformers.stats(reset=True) == counts
    assert outs[1].isfinite().all()
    # An approximation where MRA serves; a model of exact calls alone stays as it was.
    if dtype == torch.float32:  # half types round by more than that
        assert ((outs[1] - outs[0]).abs().max() > 1e-3) == ("mra" in counts)
    model.train()
    out = model(**inputs).last_hidden_state
    assert out.isfinite().all()
    (out * torch.randn_like(out)).mean().backward()
    assert mra.transformers.stats() == counts
    reached = mra.transformers.coverage(model).served
    assert len(reached) == sum(counts.values())
    parameters = {
        f"{at}.{name}": p
        for at in reached
        for name, p in model.get_submodule(at).named_parameters()
    }
    assert len([p for p in parameters.values() if p.dim() == 2]) >= 2 * len(reached)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        assert p.grad is not None and p.grad.isfinite().all(), name
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0).step()  # seen in bfloat16 too
    for name, p in parameters.items():
        assert p.isfinite().all(), name
        # A key bias shifts all scores of a row alike, which changes nothing.
        assert re.search(r"k\w*\.bias$", name) or not torch.equal(p, before[name]), name


def watched(model, inputs):
    """Names of the modules whose attention arrives at a function registered for the purpose."""
    arrived, names = set(), {module: name for name, module in model.named_modules()}
    sdpa = transformers.AttentionInterface()["sdpa"]

    def attention(module, *args, **kwargs):
        arrived.add(names[module])
        return sdpa(module, *args, **kwargs)

    transformers.AttentionInterface.register("watched", attention)
    transformers.AttentionMaskInterface.register("watched", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("watched")
    with torch.no_grad():
        model(**inputs)
    return arrived


@cases
def test_coverage_is_what_arrives(case):
    build, inputs, _ = CASES[case]
    model, inputs = spread(build()).eval(), inputs()
    covered = mra.transformers.coverage(model)
    assert covered.missed == {}
    assert set(covered.served) == watched(model, inputs)
    assert {item.implementation for item in mra.transformers.coverage(model)} == {"watched"}


OWN = "computes attention itself, without the attention interface"


@pytest.mark.parametrize(
    ("name", "options", "missed"),
    [
        ("DebertaV2", {}, "encoder.layer.{}.attention.self"),
        ("Longformer", {"attention_window": 32}, "encoder.layer.{}.attention.self"),
        ("MPNet", {}, "encoder.layer.{}.attention.attn"),
        ("XLNet", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 64}, "layer.{}.rel_attn"),
    ],
)
def test_coverage_of_models_without_the_interface(name, options, missed):
    """Nothing arrives, which coverage said: the model ignores the name, or refuses it."""
    sizes = SIZES if name != "XLNet" else {"vocab_size": 99}
    model = getattr(transformers, name + "Model")(
        getattr(transformers, name + "Config")(**sizes, **options)
    ).eval()
    covered = mra.transformers.coverage(model)
    assert covered.served == {}
    assert covered.missed == {missed.format(n): OWN for n in range(2)}
    assert "0 of 2 attention modules served" in str(covered) and OWN in str(covered)
    assert watched(model, text(64)) == set()


def test_coverage_names_what_serves_instead():
    """torch's module, calls of scaled_dot_product_attention, and MRA attention itself."""

    class OwnAttention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class SomeAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = OwnAttention()

        def forward(self, x):  # not through ALL_ATTENTION_FUNCTIONS
            return self.inner(x)

    model = torch.nn.ModuleDict(
        {
            "torch": torch.nn.MultiheadAttention(64, 4),
            "own": SomeAttention(),
            "mra": mra.MRAMultiheadAttention(64, 4),
            "bert": bert(),
        }
    )
    covered = mra.transformers.coverage(model)
    assert list(covered.missed) == ["torch", "own.inner"]
    assert "replace_attention" in covered.missed["torch"]
    assert "replace_sdpa" in covered.missed["own.inner"]
    assert covered.served == {
        "mra": "MRAMultiheadAttention",
        "bert.encoder.layer.0.attention.self": "BertSelfAttention",
        "bert.encoder.layer.1.attention.self": "BertSelfAttention",
    }
    lines = str(covered).splitlines()
    assert len(lines) == 1 + 5 + 1 and lines[-1] == "3 of 5 attention modules served"
    assert re.match(r"bert\S+0\S+ +BertSelfAttention +sdpa +yes +attention interface$", lines[-3])


def test_coverage_of_nothing_and_of_a_wrong_argument():
    covered = mra.transformers.coverage(torch.nn.Linear(2, 2))
    assert len(covered) == 0 and str(covered) == "no attention modules"
    with pytest.raises(TypeError, match="model: got dict, expected an nn.Module"):
        mra.transformers.coverage({})


def test_dropout_of_weights_warns_once(monkeypatch):
    """In training; exact calls, which apply it, don't."""
    monkeypatch.setattr(mra.calls, "_warned", set())
    model = bert().eval()
    model.set_attn_implementation(SPARSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**text())  # evaluated
        model.train()(**text(1))  # one query: exact
    with pytest.warns(UserWarning, match="dropout isn't applied") as caught:
        model(**text())
    assert len([w for w in caught if "dropout" in str(w.message)]) == 1  # two layers


def test_trains_compiled_whole(monkeypatch):
    """With dropout of weights, of which the program warns while it is traced."""
    monkeypatch.setattr(mra.calls, "_warned", set())
    model = bert().train()
    model.set_attn_implementation(SPARSE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="dropout isn't applied"):
        out = compiled(**padded_text()).last_hidden_state
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())
    assert len(mra.transformers.coverage(compiled).served) == 2


def test_decode_steps_behind_a_prefill():
    """Llama with grouped heads: prefill is MRA, each later token is one exact query; a chunk behind
    a cache is exact too. With every block selected that is the model run on the whole text."""
    model = spread(llama()).eval()
    ids = text()["input_ids"]
    exact = decode(model, "sdpa", ids, torch.float64)[0]
    theirs = decode(model, "sdpa", ids)[0]
    for name in (DENSE, SPARSE):
        out, counts = decode(model, name, ids)
        one, chunk = {"exact: one query": 2}, {"exact: 4-D mask": 2}
        assert counts == [{"mra": 2}, one, one, chunk]
        error, same = relative_error(out, exact), relative_error(theirs, exact)
        assert error <= limit(torch.float32, "cpu", same) if name == DENSE else 1e-3 < error < 1


def decode(model, implementation, ids, dtype=torch.float32):
    """States of all tokens, read in four parts, and the calls that each part counted."""
    model.to(dtype).set_attn_implementation(implementation)
    cache, outs, counts = transformers.DynamicCache(config=model.config), [], []
    for part in ids.split([100, 1, 1, 28], 1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        outs.append(out.last_hidden_state)
        counts.append(mra.transformers.stats(reset=True))
    return torch.cat(outs, 1), counts
