"""Short heads on Hopper, whose forward is one launch: against the references, the stages that it
stands for, and itself."""

import pytest
import torch
from helpers import CUDA_DTYPES, HOPPER, Case, assert_same_bits, kernels_of

import mra_attention as mra

HALF = [p for p in CUDA_DTYPES if torch.float32 not in p.values]
SHAPE = dict(N=500, M=470, D=64)
STATE = [
    dict(block_size=block, coarse=coarse, order=0, selection=selection)
    for coarse in ("none", "block")
    for block, selection in ((32, "row"), (64, "row"), (32, "global"))
]
ROW = [dict(block_size=block, coarse="row", order=0) for block in (32, 64)]
ORDER1 = [dict(block_size=block, coarse="row", order=1) for block in (32, 64)]
# Where each query head has keys of its own.
CENTRED = [dict(o, pool=pool, Hk=4) for pool in ("centred", "sampled") for o in ORDER1]


def forms(*which):
    """device, dtype and options of the forms that have the kernel."""
    return [
        pytest.param(*p.values, o, marks=p.marks, id="-".join(map(str, (*p.values, *o.values()))))
        for o in (sum(which, []) if which else STATE + ROW + ORDER1 + CENTRED)
        for p in HALF
    ]


def call_options(options):
    return {"pool": "even"} | {name: value for name, value in options.items() if name != "Hk"}


@HOPPER
@pytest.mark.parametrize("D", [8, 32, 64])
@pytest.mark.parametrize("device, dtype, options", forms())
def test_one_launch(device, dtype, options, D):
    q, k, v = torch.randn(3, 2, 3, 512, D, device=device, dtype=dtype).unbind(0)
    names = kernels_of(lambda: mra.mra_attention(q, k, v, **call_options(options)))
    assert len(names) == 1 and "forward_head_kernel" in names[0], names


@HOPPER
@pytest.mark.parametrize(
    "options, dtype, N, D, Hk",
    [
        (
            dict(order=0, coarse="block", selection="global", block_size=64),
            torch.bfloat16,
            512,
            64,
            4,
        ),
        (dict(order=1, pool="centred"), torch.bfloat16, 512, 64, 2),
        (dict(order=1, pool="sampled"), torch.bfloat16, 512, 64, 2),
        (dict(order=0, selection="global"), torch.bfloat16, 512, 64, 4),
        (dict(order=0, block_size=(64, 32)), torch.bfloat16, 512, 64, 4),
        (dict(order=0), torch.bfloat16, 513, 64, 4),
        (dict(order=0), torch.bfloat16, 512, 72, 4),
        (dict(order=0, is_causal=True), torch.bfloat16, 512, 64, 4),
    ],
)
@pytest.mark.gpu
def test_stages_instead(options, dtype, N, D, Hk):
    q = torch.randn(2, 4, N, D, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, Hk, N, D, device="cuda", dtype=dtype).unbind(0)
    options = dict(coarse="row", block_size=32) | options
    names = kernels_of(lambda: mra.mra_attention(q, k, v, **options))
    assert len(names) > 1 and not any("forward_head" in name for name in names), names


@pytest.mark.parametrize("masks", ["none", "key", "query", "both", "padding"])
@pytest.mark.parametrize("device, dtype, options", forms())
def test_modes(device, dtype, options, masks):
    Case(device, dtype, masks=masks, **SHAPE, **options).check()


@pytest.mark.parametrize(
    "N, M", [(1, 1), (1, 512), (512, 1), (33, 32), (64, 500), (128, 129), (256, 255), (512, 512)]
)
@pytest.mark.parametrize("D", [8, 24, 32, 40, 64])
@pytest.mark.parametrize("device, dtype", HALF)
def test_sizes(device, dtype, D, N, M):
    for o in STATE[1:] + ROW + ORDER1 + CENTRED:
        case = dict(B=3, H=4, Hk=2, N=N, M=M, D=D, masks="key", density=0.3) | o
        Case(device, dtype, **case).check()


@pytest.mark.parametrize("forced", [dict(diagonal_blocks=3), dict(first_blocks=2), {}])
@pytest.mark.parametrize("budget", [dict(blocks_per_row=1), dict(density=0.2), dict(density=1.0)])
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("device, dtype, options", forms(STATE[3:], ROW, ORDER1))
def test_plan_is_that_of_the_stage(device, dtype, options, D, forced, budget):
    block, coarse, order = options["block_size"], options["coarse"], options["order"]
    selection = options.get("selection", "row")
    fixed = dict(SHAPE | dict(D=D), **forced, **options, spread=3.0)
    case = Case(device, dtype, masks="both", **(fixed | {"density": None} | budget))
    o = case.options
    plan = case.plan()
    results = torch.ops.mra_attention.forward(
        case.q, case.k, case.v, case.key_mask, case.query_mask, None, None, None,
        o.get("blocks_per_row"), o.get("density"), block, block, coarse, order, selection,
        o.get("diagonal_blocks", 0), o.get("first_blocks", 0), False, None,
    )  # fmt: skip
    pool = torch.ops.mra_attention.pool
    q_mean, q_count = pool(case.q, case.query_mask, block)
    k_mean, k_count = pool(case.k, case.key_mask, block)
    v_mean, _ = pool(case.v, case.key_mask, block)
    # Means are summed up in another order: rows may differ where scores are all but equal.
    scores = q_mean @ k_mean.repeat_interleave(2, dim=1).mT * case.q.shape[3] ** -0.5
    if selection == "global":
        scores = scores - scores.masked_fill((k_count == 0)[:, None, None], -torch.inf).amax(
            -1, keepdim=True
        )
    ours = mra.Plan(*results[3:6], N=500, M=470, block_size=(block, block)).to_dense()
    stage = plan.to_dense()
    rows = (2, 3) if selection == "global" else (3,)
    assert torch.equal(ours.sum(rows), stage.sum(rows))
    gained = scores.where(ours & ~stage, torch.zeros_like(scores)).sum(rows)
    lost = scores.where(stage & ~ours, torch.zeros_like(scores)).sum(rows)
    assert torch.allclose(gained, lost, rtol=0, atol=1e-5)
    assert (ours != stage).sum() <= 4
    kept = (q_mean, k_mean, v_mean, q_count, k_count)
    first = 0 if coarse == "block" else 1  # queries are kept for coarse = block
    for i, expected in enumerate(kept):
        if i in (0, 3) and first:
            continue
        got = results[6 + i]
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device, dtype, options", forms())
def test_more_heads_than_blocks_of_threads(device, dtype, options):
    for N, D in ((100, 64), (200, 32), (512, 64), (480, 32)):
        shape = dict(B=32, H=10, Hk=5, N=N, D=D, masks="padding") | options
        if "pool" in options:
            shape["Hk"] = 10
        case = Case(device, dtype, **shape)
        first = case.check()
        for _ in range(3):
            assert_same_bits(first, case.ours())


@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("device, dtype, options", forms())
def test_scale_and_nan(device, dtype, options, D):
    shape = SHAPE | dict(D=D)
    for scale in (-0.3, 0.0, 2.5):
        Case(device, dtype, scale=scale, **shape, **options).check()
    # Blocks without a key are not read; queries that don't count, NaN or not, give zeros.
    case = Case(device, dtype, masks="both", **shape, **options)
    block = case.block[0]
    first = case.ours(backward=False)
    assert not case.key_mask[0, block : 2 * block].any()
    assert not case.query_mask[0, block : 2 * block].any()
    case.q.masked_fill_(~case.query_mask[:, None, :, None], torch.nan)
    case.k[0, :, block : 2 * block] = case.v[0, :, block : 2 * block] = torch.nan
    assert_same_bits(first, case.ours(backward=False))


@pytest.mark.parametrize("device, dtype, options", forms(ORDER1, CENTRED))
def test_far_means(device, dtype, options):
    """Moments of keys and values whose means are far from zero, and far from one another."""
    for D in (32, 64):
        for N in (512, 450):
            case = Case(device, dtype, **options, N=N, M=N, D=D, density=0.1, spread=0.1)
            case.k += 30 * torch.randn(D, device=device, dtype=dtype)
            case.v += 30 * torch.randn(D, device=device, dtype=dtype)
            case.check(backward=False)


@pytest.mark.parametrize("size", [1e-4, 3e3])
@pytest.mark.parametrize("device, dtype, options", forms(ORDER1, CENTRED))
def test_range_of_moments(device, dtype, options, size):
    """Moments that float16 would not hold, of keys and of values."""
    for D, masks in ((32, "none"), (64, "key")):
        case = Case(device, dtype, **options, N=500, D=D, masks=masks, spread=1 / size)
        case.k *= size
        case.v *= size
        case.check(backward=False)
