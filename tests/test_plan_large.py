"""Plan: rows of more key blocks than are looked at in one go."""

import pytest
import torch
from helpers import BEST, new_seed
from integer_plans import integer_case, reference_plan

import mra_attention as mra


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("device, dtype", BEST)
def test_long_rows(device, dtype, masks):
    """More key blocks than are looked at in one go: exact, ties included."""
    seed = new_seed()
    for M in (16 * 1025, 16 * 2600 + 8):
        for m in (1, 16, 100, 256, 300):
            for forced in ({}, {"first_blocks": 2}, {"first_blocks": 40, "diagonal_blocks": 5}):
                *inputs, options = integer_case(
                    device, dtype, seed, M=M, masks=masks, block_size=(32, 16), blocks_per_row=m,
                    **forced,
                )  # fmt: skip
                plan = mra.make_plan(*inputs, **options).to_dense()
                assert torch.equal(plan, reference_plan(*inputs, options)), (seed, M, m, forced)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("device, dtype", BEST)
def test_long_causal_rows(device, dtype, masks):
    """Rows that grow beyond that: what the diagonal crosses is there, then what else is forced."""
    seed = new_seed()
    for budget in ({"blocks_per_row": 1}, {"blocks_per_row": 20}, {"density": 0.1}):
        for forced in ({}, {"first_blocks": 3, "diagonal_blocks": 4}):
            *inputs, options = integer_case(
                device, dtype, seed, N=16 * 1100, H=2, masks=masks, block_size=(128, 16),
                is_causal=True, **budget, **forced,
            )  # fmt: skip
            plan = mra.make_plan(*inputs, **options).to_dense()
            assert torch.equal(plan, reference_plan(*inputs, options)), (seed, budget, forced)


@pytest.mark.parametrize("device, dtype", BEST)
def test_long_rows_in_the_worst_order(device, dtype):
    """Scores that rise, or fall, from block to block: every one, or none, is higher than all that
    came before."""
    q = torch.ones(1, 1, 70, 8, dtype=dtype, device=device)
    for sign in (1, -1):
        k = sign * torch.arange(3000, dtype=dtype, device=device).repeat_interleave(16)
        k = k.reshape(1, 1, -1, 1).expand(-1, -1, -1, 8).contiguous()
        for m in (7, 64, 256):
            options = {"block_size": (32, 16), "blocks_per_row": m, "scale": 1 / 8,
                       "pool": "even"}  # fmt: skip
            plan = mra.make_plan(q, k, **options).to_dense()
            expected = torch.arange(3000, device=device)
            expected = expected >= 3000 - m if sign > 0 else expected < m
            assert torch.equal(plan, expected.expand_as(plan)), (sign, m)


# Query blocks of a head shared out between blocks of threads, the most of which eight can hold, and
# more: rows and columns that don't fill the last one, few of the other.
MAPS = [(129, 127), (300, 61), (40, 600), (257, 258), (520, 516), (900, 700), (1500, 2)]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("forced", [{}, {"first_blocks": 2, "diagonal_blocks": 3},
                                    {"is_causal": True}])  # fmt: skip
@pytest.mark.parametrize("device, dtype", BEST)
def test_large_maps(device, dtype, forced, masks):
    """Global selection: exact, ties included."""
    seed = new_seed()
    for nq, nk in MAPS if device == "cuda" else MAPS[:3]:
        for budget in ({"blocks_per_row": 1}, {"blocks_per_row": min(nk, 13)}, {"density": 0.6}):
            *inputs, options = integer_case(
                device, dtype, seed, N=32 * nq, M=16 * nk - nk % 2 * 8, H=2, masks=masks,
                block_size=(32, 16), selection="global", **budget, **forced,
            )  # fmt: skip
            plan = mra.make_plan(*inputs, **options).to_dense()
            assert torch.equal(plan, reference_plan(*inputs, options)), (seed, nq, nk, budget)


@pytest.mark.parametrize("device, dtype", BEST)
def test_large_maps_of_equal_scores(device, dtype):
    """All pairs tie: those of the first rows are taken, whoever holds them."""
    for nq, nk, m in ((200, 100, 9), (300, 300, 70), (900, 700, 31)):
        q = torch.ones(1, 3, 32 * nq, 8, dtype=dtype, device=device)
        k = torch.ones(1, 3, 16 * nk, 8, dtype=dtype, device=device)
        options = {"block_size": (32, 16), "blocks_per_row": m, "selection": "global",
                   "pool": "even"}  # fmt: skip
        plan = mra.make_plan(q, k, **options).to_dense()
        expected = torch.arange(nq * nk, device=device).view(nq, nk) < nq * m
        assert torch.equal(plan, expected.expand_as(plan)), (nq, nk, m)
