"""A density for each head: operators, module and what gives the numbers out."""

import math

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, HOPPER, Case, assert_same_bits, kernels_of, new_seed

import mra_attention as mra
from mra_attention import MRAConfig
from mra_attention.head_density import give_out

DENSITY = (0.15, 1.0, 0.6, 0.3)
FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
POOLS = ["even", "centred", "sampled"]


def test_blocks_go_where_they_take_most_off():
    sizes = [1, 2, 4]
    errors = [[0.9, 0.5, 0.3], [0.1, 0.5, 0.15], [0.05, 0.5, 0.0]]
    assert give_out(errors, sizes, total=3) == [0, 0, 0]
    # Three to spare: one for head 0, which gains 0.8, one for head 2; its next step takes two.
    assert give_out(errors, sizes, total=6) == [1, 0, 1]
    assert give_out(errors, sizes, total=12) == [2, 0, 2]  # nothing to gain in head 1
    assert give_out(errors, sizes) == [2, 0, 2]


def test_steps_may_be_long():
    """One that gains nothing alone is taken together with the one behind it."""
    assert give_out([[0.5, 0.4], [0.5, 0.3], [0.1, 0.2]], [1, 2, 3], total=4) == [2, 0]


def test_until_the_target():
    errors = [[0.9, 0.5], [0.1, 0.4], [0.0, 0.0]]
    assert give_out(errors, [1, 2, 4], target=0.7) == [0, 0]
    assert give_out(errors, [1, 2, 4], target=0.69) == [1, 0]
    assert give_out(errors, [1, 2, 4], target=0.2) == [1, 2]  # 0.05: head 1 has no step between
    assert give_out(errors, [1, 2, 4], target=0.0) == [2, 2]


def test_costs_and_weights():
    errors = [[0.5, 0.5], [0.0, 0.0]]
    assert give_out(errors, [1, 2], costs=[3, 1], total=5) == [0, 1]
    assert give_out(errors, [1, 2], costs=[3, 1], weights=[0.9, 0.1], total=7) == [1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_it_never_spends_more(seed):
    g = torch.Generator().manual_seed(seed)
    sizes, heads = [1, 2, 3, 4, 6, 8, 12, 16], 20
    errors = torch.rand(len(sizes), heads, generator=g).sort(0, descending=True).values
    for each, size in enumerate(sizes):
        at = give_out(errors.tolist(), sizes, total=size * heads)
        assert sum(sizes[i] for i in at) <= size * heads
        assert errors[at, torch.arange(heads)].mean() <= errors[each].mean() + 1 / heads


def test_what_is_left_is_spent():
    """On a part of a step that is too long."""
    errors = [[0.5, 1.0], [0.4, 0.9], [0.35, 0.0]]
    assert give_out(errors, [1, 2, 16], total=18) == [1, 2]
    assert give_out(errors, [1, 2, 16], total=16) == [1, 1]


def case_of(device, dtype, **options):
    options = {"density": DENSITY, "N": 300, "M": 330, "block_size": 32} | options
    if options.get("is_causal"):
        options["M"] = options["N"]
    return Case(device, dtype, **options)


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_against_the_references(device, dtype, coarse, order, is_causal, masks):
    for pool in POOLS if coarse == "row" else POOLS[:1]:
        if pool == "sampled" and is_causal:
            continue
        case_of(
            device, dtype, coarse=coarse, order=order, pool=pool, is_causal=is_causal, masks=masks
        ).check()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("forced", [{}, {"diagonal_blocks": 3, "first_blocks": 1}], ids=str)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_heads_take_what_they_may(device, dtype, forced, is_causal):
    """Each head's lists are those of a call with its density for all: any length of rows."""
    lengths = [(90, 200), (700, 900), (1100, 4000), (3000, 17000)]
    for N, M in lengths[: 2 if is_causal else None]:
        options = dict(
            N=N, M=N if is_causal else M, D=8, is_causal=is_causal, block_size=(64, 16), **forced
        )
        if device == "cpu":
            options["N"] = min(N, 300)
            options["M"] = options["N"] if is_causal else M
        for density in (DENSITY, (0.01, 0.002, 0.015, 0.005)):
            case = case_of(device, dtype, **options, density=density, B=1)
            plan = case.plan()
            assert plan.row_index.shape[2] % plan.row_start.shape[2] == 0
            dense = plan.to_dense()
            for head, each in enumerate(density):
                alone = Case(device, dtype, **options, density=each, seed=case.seed, B=1)
                assert torch.equal(dense[:, head], alone.plan().to_dense()[:, head]), (N, M, head)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("N, M", [(300, 330), (700, 900), (2500, 2600)])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_results_are_those_of_the_plan(device, dtype, N, M, pool):
    """Of one launch for short heads, of two for longer ones, and stage by stage: the lists are
    those of the plan made before, and results those of a call with it."""
    if device == "cpu" and N > 1000:
        pytest.skip("the same code as for 700")
    for Hk, masks in ((4, "none"), (2, "key")):
        case = case_of(device, dtype, N=N, M=M, D=64, Hk=Hk, pool=pool, masks=masks)
        case.check()
        assert_same_bits(case.ours(), case.ours())


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_equal_densities_are_one(device, dtype):
    for N in (300, 700, 2100):
        one = case_of(device, dtype, N=N, density=0.3)
        each = case_of(device, dtype, N=N, density=(0.3,) * 4, seed=one.seed)
        assert_same_bits(each.ours(), one.ours())


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("N, kernels", [(512, 1), (1024, 2)])
def test_takes_no_launch_more(N, kernels):
    q, k, v = torch.randn(3, 2, 4, N, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    names = kernels_of(lambda: mra.mra_attention(q, k, v, block_size=32, density=DENSITY))
    assert len(names) == kernels, names


@pytest.mark.gpu
def test_many_heads_on_cuda():
    x = torch.randn(1, 128, 200, 16, device="cuda")
    density = tuple((h % 10 + 1) / 10 for h in range(129))
    dense = mra.make_plan(x, x, block_size=32, density=density[:128]).to_dense()
    wanted = [math.ceil(d * 7) for d in density[:128]]
    assert dense.sum(-1)[0, :, 0].tolist() == wanted
    x = torch.randn(1, 129, 200, 16, device="cuda")
    with pytest.raises(NotImplementedError, match="density: got one for each of 129 heads"):
        mra.mra_attention(x, x, x, block_size=32, density=density)


@pytest.mark.parametrize("device, dtype", BEST)
def test_wrong_numbers(device, dtype):
    x = torch.randn(1, 4, 64, 8, device=device, dtype=dtype)

    def call(*args, **options):
        return mra.mra_attention(x, x, x, **options)

    with pytest.raises(ValueError, match="density: got 3 numbers, expected one, .* the 4 heads"):
        call(density=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"density: got \(0.1, .*expected numbers in \(0, 1\]"):
        call(density=(0.1, 0.2, 0.3, 1.2))
    with pytest.raises(ValueError, match=r"density: got \(\), expected a number for each"):
        call(density=())
    with pytest.raises(TypeError, match="density: got 'a', expected a number"):
        call(density=(0.1, 0.2, 0.3, "a"))
    with pytest.raises(NotImplementedError, match="density: got one for .* 'global', expected"):
        call(density=DENSITY, selection="global")
    with pytest.raises(NotImplementedError, match="density: got one for .* with levels, expected"):
        call(density=DENSITY, levels=((128, 4),))
    with pytest.raises(ValueError, match="density and blocks_per_row: got both"):
        call(density=DENSITY, blocks_per_row=2)

    def operator(density, selection="row", levels=None):
        return torch.ops.mra_attention.plan(
            x, x, None, None, None, density, 32, 32, selection, 0, 0, False, None, levels
        )

    operator(0.5), operator([0.5]), operator(list(DENSITY))
    for wrong, error, options in (
        ([], ValueError, {}), ([0.5] * 3, ValueError, {}),
        ([0.5, 0.5, 0.5, math.nan], ValueError, {}),
        (DENSITY, NotImplementedError, {"selection": "global"}),
        (DENSITY, NotImplementedError, {"levels": [128, 4]}),
    ):  # fmt: skip
        with pytest.raises(error, match="density: got"):
            operator(list(wrong), **options)


def test_config():
    config = MRAConfig(density=list(DENSITY))
    assert config.density == DENSITY and hash(config) == hash(MRAConfig(density=DENSITY))
    assert config.replace(blocks_per_row=3).density is None
    assert config.replace(density=0.5) == MRAConfig(density=0.5)
    x = torch.randn(1, 4, 100, 8)
    by_config = mra.mra_attention(x, x, x, config=config.replace(block_size=16))
    assert torch.equal(by_config, mra.mra_attention(x, x, x, density=DENSITY, block_size=16))


@pytest.mark.parametrize("device, dtype", BEST)
def test_compiled(device, dtype):
    case = case_of(device, dtype, pool="centred")
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    config = MRAConfig(density=DENSITY, block_size=32)

    def attend(q, k, v):
        return mra.mra_attention(q, k, v, config=config)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for n in (300, 280):
        inputs = [x[:, :, :n] for x in (q, k, v)]
        out, expected = compiled(*inputs), attend(*inputs)
        assert torch.equal(out, expected)
        grads, wanted = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("device, dtype", BEST)
def test_operator_rules(device, dtype):
    case = case_of(device, dtype, N=70, M=90, H=4)
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    args = (q, k, v, None, None, None, None, None, None, list(DENSITY), 32, 32, "row", 1, "row",
            0, 0, False, None, None, "centred")  # fmt: skip
    torch.library.opcheck(torch.ops.mra_attention.forward.default, args)
    plan = (q.detach(), k.detach(), None, None, None, list(DENSITY), 32, 32, "row", 0, 0, False,
            None)  # fmt: skip
    torch.library.opcheck(torch.ops.mra_attention.plan.default, plan)


def test_gradient():
    g = torch.Generator().manual_seed(new_seed())
    q, k, v = (torch.randn(1, 2, 70, 8, generator=g).double().requires_grad_() for _ in range(3))
    plan = mra.make_plan(q, k, density=(0.3, 0.7), block_size=16)
    counts = plan.row_count[0, :, 0].tolist()
    assert counts == [2, 4]

    def attend(*qkv):
        return mra.mra_attention(*qkv, density=(0.3, 0.7), block_size=16)

    given = torch.autograd.grad(mra.mra_attention(q, k, v, plan=plan).sum(), (q, k, v))
    ours = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(ours, given, strict=True))
    transformed = torch.func.grad(lambda *x: attend(*x).sum(), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, transformed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    batch = torch.randn(3, 3, 1, 2, 70, 8, generator=g).double()
    looped = torch.stack([attend(*x) for x in batch])
    torch.testing.assert_close(torch.vmap(lambda x: attend(*x))(batch), looped)


@pytest.mark.parametrize("is_causal", [False, True])
def test_operations_are_counted_by_head(is_causal):
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = torch.randn(3, 1, 4, 200, 8, requires_grad=True).unbind(0)

    def counted(density, function=mra.mra_attention, *more):
        with FlopCounterMode(display=False) as counter:
            function(q, k, *more, density=density, block_size=32, is_causal=is_causal)
        return counter.get_total_flops()

    each = [counted(d, mra.mra_attention, v) for d in DENSITY]
    assert len(set(each)) == 4
    assert counted(DENSITY, mra.mra_attention, v) * 4 == sum(each)
    assert counted(DENSITY, mra.make_plan) == counted(0.5, mra.make_plan)


def test_module():
    module = mra.MRAMultiheadAttention(
        32, 4, batch_first=True, config=MRAConfig(density=DENSITY, block_size=16)
    )
    x = torch.randn(2, 100, 32)
    out, weights = module(x, x, x, need_weights=True, average_attn_weights=False)
    exact = mra.MRAMultiheadAttention(
        32, 4, batch_first=True, config=MRAConfig(density=1.0, block_size=16)
    )
    exact.load_state_dict(module.state_dict())
    _, wanted = exact(x, x, x, need_weights=True, average_attn_weights=False)
    difference = (weights - wanted).abs().amax((0, 2, 3))
    assert difference[1] < 1e-6 and (difference[[0, 2, 3]] > 1e-4).all()
    assert "density=(0.15, 1.0, 0.6, 0.3)" in repr(module)


def test_exact_below_takes_the_mean(monkeypatch):
    seen = []
    monkeypatch.setattr(mra.crossover, "_measured", {})
    monkeypatch.setattr(mra.crossover, "_measure", lambda *args: seen.append(args[-1]) or 50)
    config = MRAConfig(density=DENSITY)
    found = [mra.crossover.tokens("cpu", torch.float32, 16, config) for _ in range(2)]
    assert found == [50, 50] and [c.density for c in seen] == [sum(DENSITY) / 4]
    x = torch.randn(1, 4, 60, 16)
    assert not mra.crossover.below("auto", x, x, config)
