"""Short heads on Hopper, whose forward is one launch: against the references, the stages that it
stands for, and itself."""

import pytest
import torch
from helpers import CUDA_DTYPES, Case, assert_same_bits, kernels_of

import mra_attention as mra

HALF = [p for p in CUDA_DTYPES if torch.float32 not in p.values]
SHAPE = dict(N=500, M=470, D=64, block_size=32)
served = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="this kernel is Hopper's",
)


@served
@pytest.mark.parametrize("device, dtype", HALF)
def test_one_launch(device, dtype):
    q, k, v = torch.randn(3, 2, 3, 512, 64, device=device, dtype=dtype).unbind(0)
    for coarse in ("none", "block"):
        for selection in ("row", "global"):
            options = dict(block_size=32, coarse=coarse, order=0, selection=selection)
            names = kernels_of(lambda o=options: mra.mra_attention(q, k, v, **o))
            assert len(names) == 1 and "forward_head_kernel" in names[0], names
    names = kernels_of(lambda: mra.mra_attention(q, k, v, block_size=32, coarse="row", order=0))
    assert not any("forward_head" in name for name in names)


@pytest.mark.parametrize("masks", ["none", "key", "query", "both", "padding"])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse", ["none", "block"])
@pytest.mark.parametrize("device, dtype", HALF)
def test_modes(device, dtype, coarse, selection, masks):
    Case(device, dtype, coarse=coarse, order=0, selection=selection, masks=masks, **SHAPE).check()


@pytest.mark.parametrize(
    "N, M", [(1, 1), (1, 512), (512, 1), (33, 32), (64, 500), (128, 129), (256, 255), (512, 512)]
)
@pytest.mark.parametrize("D", [24, 32, 40, 64])
@pytest.mark.parametrize("device, dtype", HALF)
def test_sizes(device, dtype, D, N, M):
    for coarse, selection in [("none", "row"), ("block", "row"), ("block", "global")]:
        Case(
            device, dtype, B=3, H=4, Hk=2, N=N, M=M, D=D, block_size=32, coarse=coarse, order=0,
            selection=selection, masks="key", density=0.3,
        ).check()  # fmt: skip


@pytest.mark.parametrize("forced", [dict(diagonal_blocks=3), dict(first_blocks=2), {}])
@pytest.mark.parametrize("budget", [dict(blocks_per_row=1), dict(density=0.2), dict(density=1.0)])
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("device, dtype", HALF)
def test_plan_is_that_of_the_stage(device, dtype, D, forced, budget):
    for selection in ("row", "global"):
        options = dict(
            SHAPE | dict(D=D), **forced, coarse="block", order=0, selection=selection, spread=3.0
        )
        case = Case(device, dtype, masks="both", **(options | {"density": None} | budget))
        o = case.options
        plan = case.plan()
        results = torch.ops.mra_attention.forward(
            case.q, case.k, case.v, case.key_mask, case.query_mask, None, None, None,
            o.get("blocks_per_row"), o.get("density"), 32, 32, "block", 0, selection,
            o.get("diagonal_blocks", 0), o.get("first_blocks", 0), False, None,
        )  # fmt: skip
        start, count, index = results[3:6]
        lists = (plan.row_start, plan.row_count, plan.row_index)
        for ours, stage in zip((start, count, index), lists, strict=True):
            assert torch.equal(ours, stage)
        means = [
            torch.ops.mra_attention.pool(x, mask, 32)
            for x, mask in ((case.q, case.query_mask), (case.k, case.key_mask))
        ]
        value, _ = torch.ops.mra_attention.pool(case.v, case.key_mask, 32)
        stage = (means[0][0], means[1][0], value, means[0][1], means[1][1])
        for ours, expected in zip(results[6:11], stage, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("device, dtype", HALF)
def test_more_heads_than_blocks_of_threads(device, dtype):
    for N in (100, 200, 512):
        for selection in ("row", "global"):
            case = Case(
                device, dtype, B=50, H=14, Hk=7, N=N, D=64, block_size=32, coarse="block", order=0,
                selection=selection, masks="padding",
            )  # fmt: skip
            first = case.check()
            for _ in range(3):
                assert_same_bits(first, case.ours())


@pytest.mark.parametrize("device, dtype", HALF)
def test_scale_and_nan(device, dtype):
    for scale in (-0.3, 0.0, 2.5):
        Case(device, dtype, coarse="block", order=0, scale=scale, **SHAPE).check()
    # A block without a key, and without a query, is not read.
    case = Case(device, dtype, coarse="block", order=0, masks="both", **SHAPE)
    first = case.ours(backward=False)
    assert not case.key_mask[0, 32:64].any() and not case.query_mask[0, 32:64].any()
    case.k[0, :, 32:64] = case.v[0, :, 32:64] = torch.nan
    case.q[0, :, 32:64] = torch.nan
    assert_same_bits(first, case.ours(backward=False))
