"""Order 1 by Hopper's kernels that walk the rows with moments in registers: under causal those of
the keys before, and in float16 those of the head, in the forward pass."""

import pytest
import torch
from helpers import BEST, CUDA_DTYPES, Case, assert_same_bits, kernels_of

BF16 = CUDA_DTYPES[1:2]
HALF = CUDA_DTYPES[1:]


@pytest.mark.parametrize("block", [64, (64, 16), (64, 32), (32, 64), (128, 64), (128, 16)])
@pytest.mark.parametrize("D", [24, 64, 128])
@pytest.mark.parametrize("device, dtype", BEST + HALF)
def test_blocks_and_head_dims(device, dtype, D, block):
    if device == "cpu" and D > 64:
        pytest.skip("nothing on the CPU depends on it")
    for coarse in ("block", "row"):
        Case(
            device, dtype, block_size=block, D=D, coarse=coarse, order=1, is_causal=True,
            masks="both", N=461, spread=0.5,
        ).check()  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block", [64, (64, 16), (128, 32)])
@pytest.mark.parametrize("D", [136, 192, 256])
@pytest.mark.parametrize("device, dtype", HALF)
def test_wide_heads(device, dtype, D, block, is_causal):
    """Matrices that no block of threads holds whole."""
    for masks in ("none", "both"):
        case = Case(
            device, dtype, block_size=block, D=D, order=1, coarse="row", is_causal=is_causal,
            masks=masks, B=1, N=461, M=461 if is_causal else 600, spread=0.5,
        )  # fmt: skip
        assert_same_bits(case.check(), case.ours())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("device, dtype", HALF)
def test_moments_beyond_the_range_of_float16(device, dtype, D, is_causal):
    """Keys and values of some hundred: entries of C of some 1e5, sums of 1e8; and tiny ones."""
    for size in (300.0, 1e-3):
        case = Case(
            device, dtype, block_size=64, D=D, coarse="row", order=1, is_causal=is_causal, N=700,
            M=700, spread=0.5,
        )  # fmt: skip
        case.q, case.k, case.v = case.q / size, case.k * size, case.v * size
        case.check(backward=False)


@pytest.mark.parametrize(
    "D, B, H, Hk, N, block",
    [
        (64, 6, 30, 30, 330, 64),  # heads that are walked whole
        (64, 1, 80, 40, 1100, 64),  # several tiles a chunk, several chunks, grouped heads
        (128, 4, 24, 24, 330, 64),
        (128, 1, 16, 16, 1100, (128, 64)),
        (256, 1, 16, 4, 700, 64),
    ],
)
@pytest.mark.parametrize("device, dtype", BF16)
def test_long_walks(device, dtype, D, B, H, Hk, N, block):
    case = Case(
        device, dtype, block_size=block, D=D, order=1, coarse="row", is_causal=True, masks="key",
        B=B, H=H, Hk=Hk, N=N, spread=0.5,
    )  # fmt: skip
    assert_same_bits(case.check(), case.ours())


@pytest.mark.parametrize(
    "D, block, is_causal, bf16, f16",
    [
        (64, 64, True, (2, 2), (1, 0)),
        (128, (128, 32), True, (2, 2), (1, 0)),
        (64, 32, True, (0, 0), (0, 0)),
        (64, 64, False, (0, 0), (0, 0)),
        (128, 32, False, (0, 0), (0, 0)),
        (256, 64, True, (0, 0), (0, 0)),
    ],
)
@pytest.mark.parametrize("device, dtype", HALF)
def test_which_calls_walk(device, dtype, D, block, is_causal, bf16, f16):
    """Of rows and keys. Under causal units of 64 rows and more; Hopper alone."""
    case = Case(
        device, dtype, block_size=block, D=D, order=1, coarse="row", is_causal=is_causal, N=700,
        M=700,
    )  # fmt: skip
    names = kernels_of(case.ours)
    found = tuple(sum(f"order1_walk_{kernel}" in n for n in names) for kernel in ("rows", "keys"))
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert any("order1_walk_wide" in n for n in names) == (hopper and D > 128), names
    assert found == ((bf16 if dtype == torch.bfloat16 else f16) if hopper else (0, 0)), names
    # without causal fine adds the term
    alone = any("RowsStep" in n and "forward_kernel" in n for n in names)
    assert alone == (not hopper or (is_causal and block == 32)), names
