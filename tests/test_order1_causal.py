"""Order 1 under causal: Hopper's kernels walk the sequence with the moments of the keys before."""

import pytest
import torch
from helpers import BEST, CUDA_DTYPES, Case, assert_same_bits, kernels_of

BF16 = CUDA_DTYPES[1:2]


@pytest.mark.parametrize("block", [64, (64, 16), (64, 32), (32, 64), (128, 64), (128, 16)])
@pytest.mark.parametrize("D", [24, 64, 128])
@pytest.mark.parametrize("device, dtype", BEST + BF16)
def test_blocks_and_head_dims(device, dtype, D, block):
    if device == "cpu" and D > 64:
        pytest.skip("nothing on the CPU depends on it")
    for coarse in ("block", "row"):
        Case(
            device, dtype, block_size=block, D=D, coarse=coarse, order=1, is_causal=True,
            masks="both", N=461, spread=0.5,
        ).check()  # fmt: skip


@pytest.mark.parametrize(
    "D, B, H, Hk, N, block",
    [
        (64, 6, 30, 30, 330, 64),  # heads that are walked whole
        (64, 1, 80, 40, 1100, 64),  # several tiles a chunk, several chunks, grouped heads
        (128, 4, 24, 24, 330, 64),
        (128, 1, 16, 16, 1100, (128, 64)),
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
    "D, block, walks", [(64, 64, True), (128, (128, 32), True), (64, 32, False)]
)
@pytest.mark.parametrize("device, dtype", BF16)
def test_which_calls_walk(device, dtype, D, block, walks):
    """Units of 64 rows and more; Hopper alone."""
    case = Case(device, dtype, block_size=block, D=D, order=1, coarse="row", is_causal=True)
    names = kernels_of(case.ours)
    rows, keys = (sum(f"order1_causal_{kernel}" in n for n in names) for kernel in ("rows", "keys"))
    walks = walks and torch.cuda.get_device_capability() == (9, 0)
    assert (rows, keys) == ((2, 2) if walks else (0, 0)), names
