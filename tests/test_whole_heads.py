"""Heads of up to 32 key blocks on Hopper, whose stages before fine are one launch: against the
references, the stages that it stands for, and itself."""

import pytest
import torch
from helpers import HOPPER, Case, assert_same_bits, kernels_of

import mra_attention as mra

pytestmark = pytest.mark.gpu
POOLS = ("even", "centred")
BLOCKS = ((32, 32), (64, 64), (128, 64), (64, 32))
pools = pytest.mark.parametrize("pool", POOLS)
blocks = pytest.mark.parametrize("block_size", BLOCKS, ids=str)


def case_of(pool, **options):
    shape = dict(B=2, H=3, Hk=3, N=700, M=900, D=64, block_size=64, density=0.2) | options
    return Case("cuda", torch.bfloat16, pool=pool, order=1, **shape)


@HOPPER
@pytest.mark.parametrize("D", [24, 32, 64, 72, 128])
@blocks
@pools
def test_two_launches(pool, block_size, D):
    if pool == "centred" and D > 64:
        pytest.skip("stage by stage")
    q, k, v = torch.randn(3, 2, 3, 1024, D, device="cuda", dtype=torch.bfloat16).unbind(0)
    names = kernels_of(lambda: mra.mra_attention(q, k, v, block_size=block_size, pool=pool))
    assert len(names) == 2 and "moments_kernel" in names[0] and "forward" in names[1], names


@pytest.mark.parametrize("masks", ["none", "key", "query", "both", "padding"])
@pytest.mark.parametrize("D", [24, 32, 64, 72, 128])
@blocks
@pools
def test_modes(pool, block_size, D, masks):
    case_of(pool, block_size=block_size, D=D, masks=masks).check()


@pytest.mark.parametrize("N, M", [(1, 600), (40, 1024), (2048, 520), (513, 513), (1100, 33)])
@blocks
@pools
def test_sizes(pool, block_size, N, M):
    for D in (32, 64, 96):
        case_of(pool, block_size=block_size, D=D, N=N, M=M, masks="key").check()


@pytest.mark.parametrize("forced", [dict(diagonal_blocks=3), dict(first_blocks=2), {}], ids=str)
@pytest.mark.parametrize(
    "budget", [dict(blocks_per_row=1), dict(density=0.4), dict(density=1.0)], ids=str
)
@blocks
@pools
def test_plan_is_that_of_the_stage(pool, block_size, budget, forced):
    """To the last bit: a plan made before the call gives the same results."""
    for D, masks in ((32, "none"), (64, "both"), (128, "both")):
        shape = dict(block_size=block_size, D=D, masks=masks, density=None, spread=3.0)
        case = case_of(pool, **shape | budget, **forced)
        results = torch.ops.mra_attention.forward(*operator_arguments(case))
        plan = case.plan()
        for own, stage in zip(
            results[3:6], (plan.row_start, plan.row_count, plan.row_index), strict=True
        ):
            assert torch.equal(own, stage)
        assert_same_bits(case.ours(), case.ours(plan=plan))


def operator_arguments(case):
    o = case.options
    return (
        case.q, case.k, case.v, case.key_mask, case.query_mask, None, None, None,
        o.get("blocks_per_row"), o.get("density"), *case.block, "row", 1, "row",
        o.get("diagonal_blocks", 0), o.get("first_blocks", 0), False, None, None, o["pool"],
    )  # fmt: skip


@blocks
def test_means_are_those_of_the_stage(block_size):
    case = case_of("even", block_size=block_size, masks="both")
    kept = torch.ops.mra_attention.forward(*operator_arguments(case))[6:11]
    pool = torch.ops.mra_attention.pool
    q_mean, q_count = pool(case.q, case.query_mask, block_size[0])
    k_mean, k_count = pool(case.k, case.key_mask, block_size[1])
    v_mean, _ = pool(case.v, case.key_mask, block_size[1])
    # Keys are summed up in another order.
    for got, expected in zip(kept[1:3], (k_mean, v_mean), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept[4], k_count)
    for got, expected in zip((kept[0], kept[3]), (q_mean, q_count), strict=True):
        assert got.numel() == 0 or torch.equal(got, expected)


@pools
def test_more_heads_than_blocks_of_threads(pool):
    """As many as run at once, and more, which go stage by stage; longer ones, served if many."""
    for B, N, D in ((24, 600, 64), (40, 600, 64), (26, 1500, 64), (20, 2000, 32), (13, 1500, 128)):
        case = case_of(pool, B=B, H=10, Hk=10, N=N, M=N, D=D, masks="padding")
        first = case.ours()
        for _ in range(3):
            assert_same_bits(first, case.ours())
    case_of(pool, B=18, H=8, Hk=8, N=1500, M=1500, masks="key").check()


@pools
def test_scale_and_nan(pool):
    for scale in (-0.3, 0.0, 2.5):
        case_of(pool, scale=scale).check()
    # Blocks without a key are not read; queries that don't count, NaN or not, give zeros.
    case = case_of(pool, masks="both")
    first = case.ours(backward=False)
    assert not case.key_mask[0, 64:128].any() and not case.query_mask[0, 64:128].any()
    case.q.masked_fill_(~case.query_mask[:, None, :, None], torch.nan)
    case.k[0, :, 64:128] = case.v[0, :, 64:128] = torch.nan
    assert_same_bits(first, case.ours(backward=False))
