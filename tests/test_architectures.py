"""Architectures of Hugging Face transformers, small and random: with every block selected each is
the model that it was, at density 1/4 it trains, and every attention call is accounted for, on the
CPU and on a GPU, in single and half precision."""

import re
import warnings

import pytest
import torch
from architectures import CASES, bert, cases, llama, padded_text, spread, text, transformers
from helpers import CUDA_DTYPES, limit, new_seed, relative_error

import mra_attention as mra
from mra_attention import MRAConfig

DENSE, SPARSE = "mra-every-block", "mra-quarter"
BLOCK_32 = MRAConfig(block_size=32)  # five blocks, the last one short


@pytest.fixture(autouse=True)
def registered():
    mra.transformers.register(DENSE, BLOCK_32.replace(density=1.0))
    mra.transformers.register(SPARSE, BLOCK_32.replace(density=1 / 4))
    mra.transformers.stats(reset=True)
    torch.manual_seed(new_seed())


# These round states or rotated queries to float32 inside whatever their dtype, so that a difference
# of 1e-16 may come out as one of 1e-7: compared in float32 alone.
ROUND_INSIDE = ("modernbert", "llama", "t5")


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
    torch's attention, fused or not; in float32 on a GPU what one attention may err by, for each."""
    build, inputs, counts = CASES[case]
    model = spread(build()).to(dtype).eval()  # to weights that all of these dtypes have
    inputs = placed(inputs(), "cpu", dtype)
    exact = run(model, "sdpa", inputs, torch.float64)
    names = ("sdpa", "eager", DENSE)
    *theirs, ours = (run(model, name, inputs, dtype, device) for name in names)
    assert mra.transformers.stats(reset=True) == counts
    each = sum(counts.values()) if (device, dtype) == ("cuda", torch.float32) else 1
    for name in exact:
        # Two exact attentions round differently, and how much of it meets is chance: of float16
        # gradients up to twice as much in one as in the other.
        error, *same = (relative_error(x[name].cpu(), exact[name]) for x in (ours, *theirs))
        same = max(same)
        assert error <= each * limit(dtype, device, same), (name, error, same)


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
