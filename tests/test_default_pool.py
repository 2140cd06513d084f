"""pool="auto", the default: which pool it is where, and that it is that one bit for bit."""

import copy
import dataclasses
import itertools
import json
import pickle

import pytest
import torch
from helpers import BEST, DEVICES, Case, assert_same_bits

import mra_attention as mra
from mra_attention import MRAConfig, MRAMultiheadAttention, crossover
from mra_attention.config import pool_of, resolve_pool

FORMS = [("none", 0), ("none", 1), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
LEVELS = ((128, 2),)
# Where it is "even", and where "centred".
EVEN = [
    dict(levels=LEVELS), dict(levels=LEVELS, is_causal=True),
    dict(coarse="block"), dict(coarse="block", order=0), dict(coarse="none"), dict(order=0),
    dict(coarse="block", order=0, selection="global"), dict(order=0, is_causal=True),
]  # fmt: skip
CENTRED = [
    dict(), dict(is_causal=True), dict(selection="global"), dict(layout=(13, 20)), dict(Hk=4),
    dict(Hk=1), dict(Hk=1, is_causal=True),
]  # fmt: skip


def test_table():
    for (coarse, order), levels in itertools.product(FORMS, ((), LEVELS)):
        found = resolve_pool("auto", coarse, order, levels)
        weighted = (coarse, order, levels) == ("row", 1, ())
        assert found == ("centred" if weighted else "even")
        config = MRAConfig(coarse=coarse, order=order, levels=levels)
        assert config.pool == "auto" and pool_of(config) == found
        for pool in ("even", "centred", "sampled"):
            assert resolve_pool(pool, coarse, order, levels) == pool
    for preset in (MRAConfig.mra2(), MRAConfig.mra2_s()):
        assert pool_of(preset) == "even"


def make(device, dtype, options):
    case = Case(device, dtype, N=260, M=260, masks="both", **options)
    del case.options["pool"]
    return case


def results(case, **options):
    """Of a call with the case's options and these: out, lse, gradients, and the plan it makes."""
    tensors = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    masks, options = (case.key_mask, case.query_mask), case.options | options
    out, lse = mra.mra_attention(*tensors, *masks, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), tensors, (case.grad_out, case.grad_lse))
    plan = mra.make_plan(case.q, case.k, *masks, **options)
    lists = dict(start=plan.row_start, count=plan.row_count, index=plan.row_index)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True)) | lists


@pytest.mark.parametrize("options", EVEN + CENTRED, ids=str)
@pytest.mark.parametrize("device, dtype", BEST)
def test_is_that_pool_bit_for_bit(device, dtype, options):
    pool = "even" if options in EVEN else "centred"
    case = make(device, dtype, options)
    expected = results(case, pool=pool)
    assert_same_bits(results(case), expected)
    assert_same_bits(results(case, pool="auto"), expected)
    if pool == "centred":
        assert not torch.equal(results(case, pool="even")["out"], expected["out"])


@pytest.mark.parametrize("options", [o for o in EVEN + CENTRED if "levels" not in o], ids=str)
@pytest.mark.parametrize("device, dtype", BEST)
def test_reference_has_the_same(device, dtype, options):
    make(device, dtype, options).check()


@pytest.mark.parametrize("options", EVEN + CENTRED[:4], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_plan_round_trip(device, options):
    """A plan of make_plan and the call that makes its own agree, options or config."""
    case = make(device, torch.float32, options)
    masks, causal = (case.key_mask, case.query_mask), options.get("is_causal", False)
    q, k, v = case.q, case.k, case.v

    def same(out):
        # On a GPU a plan made inside brings the coarse part of the block form along.
        if device == "cuda" and options.get("coarse") == "block":
            torch.testing.assert_close(out, expected)
        else:
            assert torch.equal(out, expected)

    expected = mra.mra_attention(q, k, v, *masks, **case.options)
    plan = mra.make_plan(q, k, *masks, **case.options)
    values = {n: options[n] for n in ("coarse", "order", "is_causal") if n in options}
    config = MRAConfig(**{n: x for n, x in case.options.items() if n != "is_causal"})
    same(mra.mra_attention(q, k, v, *masks, plan=plan, **values))
    planned = mra.make_plan(q, k, *masks, config=config, is_causal=causal)
    for given in (plan, planned):
        out = mra.mra_attention(q, k, v, *masks, plan=given, config=config, is_causal=causal)
        same(out)


def test_plan_round_trip_without_an_option():
    q, k, v = torch.randn(3, 1, 2, 700, 8)
    for causal in (False, True):
        plan = mra.make_plan(q, k, is_causal=causal)
        out = mra.mra_attention(q, k, v, plan=plan, is_causal=causal)
        assert torch.equal(out, mra.mra_attention(q, k, v, is_causal=causal))


def test_modules_take_it():
    """Causal and not, and the weights that are returned."""
    torch.manual_seed(0)
    config = MRAConfig(density=0.3, block_size=16)
    auto = MRAMultiheadAttention(16, 2, batch_first=True, config=config)
    x = torch.randn(2, 150, 16)
    one = MRAMultiheadAttention.from_mha(auto, config.replace(pool="centred"))
    for causal in (False, True):
        mra.modules.stats(reset=True)
        for weights in (False, True):
            ours = auto(x, x, x, is_causal=causal, need_weights=weights)
            theirs = one(x, x, x, is_causal=causal, need_weights=weights)
            assert torch.equal(ours[0], theirs[0])
            assert not weights or torch.equal(ours[1], theirs[1])
        assert mra.modules.stats() == {"mra": 4}
        q = torch.randn(2, 2, 150, 16)
        ours = mra.mra_sdpa(q, q, q, is_causal=causal, config=config)
        theirs = mra.mra_sdpa(q, q, q, is_causal=causal, config=one.config)
        assert torch.equal(ours, theirs)


def test_transformers_take_it():
    transformers = pytest.importorskip("transformers")
    config = MRAConfig(density=0.3, block_size=16)
    for pool in ("auto", "centred"):
        mra.transformers.register(f"mra {pool}", config.replace(pool=pool))
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=32, max_position_embeddings=256)  # fmt: skip
    ids = torch.randint(99, (2, 200))
    for kind in ("Bert", "Llama"):
        settings = getattr(transformers, f"{kind}Config")(**sizes)
        settings = type(settings).from_dict(settings.to_dict())
        model = getattr(transformers, f"{kind}Model")(settings).eval()
        found = {}
        for name in ("auto", "centred"):
            model.set_attn_implementation(f"mra {name}")
            mra.transformers.stats(reset=True)
            found[name] = model(ids).last_hidden_state
            assert mra.transformers.stats() == {"mra": 2}
        assert torch.equal(found["auto"], found["centred"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_for_causal_calls_and_others(dynamic):
    config = MRAConfig(density=0.3, block_size=16)

    def attend(q, k, v, causal):
        plan = mra.make_plan(q, k, config=config, is_causal=causal)
        out = mra.mra_attention(q, k, v, config=config, is_causal=causal)
        return out + mra.mra_attention(q, k, v, config=config, plan=plan, is_causal=causal)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N, causal in itertools.product((150, 233), (False, True)):
        x = torch.randn(3, 1, 2, N, 8)
        torch.testing.assert_close(compiled(*x, causal), attend(*x, causal))


def test_exact_below_measures_the_form_that_runs(monkeypatch):
    measured = []
    monkeypatch.setattr(crossover, "_measured", {})
    monkeypatch.setattr(crossover, "_measure", lambda *args: measured.append(args[-1].pool) or 40)
    config, q = MRAConfig(density=0.3, block_size=16), torch.randn(1, 2, 39, 16)
    for _ in range(2):
        for call in (config, config.replace(order=0)):
            mra.mra_sdpa(q, q, q, config=call, exact_below="auto")
            assert crossover.tokens("cpu", q.dtype, 16, call) == 40
    # The same forms by name are known.
    mra.mra_sdpa(q, q, q, config=config.replace(pool="centred"), exact_below="auto")
    mra.mra_sdpa(q, q, q, config=config.replace(order=0, pool="even"), exact_below="auto")
    assert measured == ["centred", "even"]


def test_configs_that_were_saved():
    for pool in ("auto", "even", "centred", "sampled"):
        config = MRAConfig(density=0.25, pool=pool, layout=(4, 5))
        assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
        assert MRAConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    # From before there was a pool: by its fields and by its pickle.
    fields = dataclasses.asdict(MRAConfig(density=0.25))
    del fields["pool"]
    assert MRAConfig(**fields) == MRAConfig(density=0.25)
    old = copy.copy(MRAConfig(density=0.25))
    del old.__dict__["pool"]
    loaded = pickle.loads(pickle.dumps(old))
    assert "pool" not in vars(loaded) and loaded == MRAConfig(density=0.25)
    q = torch.randn(1, 2, 200, 8)
    out = mra.mra_attention(q, q, q, config=loaded)
    assert torch.equal(out, mra.mra_attention(q, q, q, density=0.25))


def test_what_is_refused():
    x = torch.randn(1, 1, 300, 8)
    for bad, error in (("Auto", ValueError), (None, TypeError), (True, TypeError)):
        for call in (
            lambda bad=bad: MRAConfig(pool=bad), lambda bad=bad: mra.make_plan(x, x, pool=bad),
            lambda bad=bad: mra.mra_attention(x, x, x, pool=bad),
        ):  # fmt: skip
            with pytest.raises(error, match="pool: got .*auto"):
                call()
    with pytest.raises(ValueError, match="pool"):
        torch.ops.mra_attention.plan(
            x, x, None, None, 1, None, 32, 32, "row", 0, 0, False, None, None, "auto"
        )  # the operators don't know it
