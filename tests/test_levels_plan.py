"""More than two resolutions: the reference by itself, and what a plan of levels holds."""

import itertools

import pytest
import torch
from helpers import CUDA, Case, new_seed, relative_error
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import mra_attention as mra
from mra_attention.reference import mra_attention_reference
from mra_attention.reference_levels import mra_attention_levels

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
THREE = ((128, 1), (64, 2))


def attend(function, case, **options):
    inputs = (case.q, case.k, case.v, case.key_mask, case.query_mask)
    options = {**case.options, **options}
    if function is mra_attention_levels:
        assert options.pop("pool") == "even"  # it has no others
    return function(*inputs, **options, return_lse=True)


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
def test_reference_without_levels(coarse, order, is_causal, masks):
    case = Case("cpu", torch.float64, coarse=coarse, order=order, is_causal=is_causal, masks=masks,
                block_size=(16, 32), diagonal_blocks=3, first_blocks=1)  # fmt: skip
    one, other = (attend(f, case) for f in (mra_attention_reference, mra_attention_levels))
    for x, y in zip(one, other, strict=True):
        assert relative_error(y, x) < 1e-14


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_where_all_cells_are_chosen(is_causal, masks):
    case = Case("cpu", torch.float64, is_causal=is_causal, masks=masks, density=1.0)
    exact = attend(mra_attention_reference, case)
    for levels in (((256, 1),), ((128, 2), (64, 4)), ((64, 99),)):
        for function in (mra_attention_reference, mra.mra_attention):
            for x, y in zip(exact, attend(function, case, levels=levels), strict=True):
                assert relative_error(y, x) < 1e-12


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse", ["block", "row"])
def test_every_key_counts_once(coarse, is_causal, masks):
    """Queries of zero give all weights 1; a value of one key shows the weight of that key."""
    case = Case("cpu", torch.float64, coarse=coarse, order=0, is_causal=is_causal, masks=masks,
                Hk=4, block_size=16, density=None, blocks_per_row=1)  # fmt: skip
    case.q, M = 0 * case.q, case.k.shape[2]
    seen = torch.ones(2, 4, case.q.shape[2], M, dtype=torch.float64)
    if is_causal:
        seen = seen.tril()
    if masks == "both":
        seen = seen * case.key_mask[:, None, None] * case.query_mask[:, None, :, None]
    mask = torch.eye(M, dtype=torch.float64).expand(2, 4, M, M)
    case.v = mask
    out, lse = attend(mra_attention_reference, case, levels=THREE)
    count = seen.sum(-1, keepdim=True)
    assert torch.allclose(lse.exp(), count[..., 0])
    # A coarse cell shares its weight among its valid keys, so every key has its own.
    assert torch.allclose(out, seen / count.clamp(min=1))


@pytest.mark.parametrize("is_causal", [False, True])
def test_mass_is_never_overestimated(is_causal):
    case = Case("cpu", torch.float64, order=0, is_causal=is_causal, density=1.0, block_size=16)
    exact = attend(mra_attention_reference, case)[1]
    coarse = dict(density=None, blocks_per_row=1, levels=THREE)
    for function in (mra_attention_reference, mra.mra_attention):
        assert (attend(function, case, **coarse)[1] <= exact + 1e-12).all()


def plan_of(N, M, **options):
    q, k = torch.randn(2, 2, N, 8), torch.randn(2, 1, M, 8)
    plan = mra.make_plan(q, k, block_size=(16, 32), **options)
    return [*(plan.to_dense(i) for i in range(len(plan.levels))), plan.to_dense()], plan


def parents(split, up, sizes, shape):
    """For each cell of blocks of ``sizes``, whether its parent of blocks of ``up`` is split."""
    x, y = (torch.arange(n) * s // up for n, s in zip(shape, sizes, strict=True))
    return split[:, :, x][..., y]


def test_children_of_what_was_split():
    dense, plan = plan_of(300, 500, blocks_per_row=3, levels=((256, 1), (128, 2), (64, 3)))
    assert [tuple(d.shape[2:]) for d in dense] == [(2, 2), (3, 4), (5, 8), (19, 16)]
    for d, cells in zip(dense, (1, 2, 3, 3), strict=True):
        assert (d.sum(-1) == cells).all()
    sizes = [(256, 256), (128, 128), (64, 64), (16, 32)]
    for i in range(3):
        above = parents(dense[i], sizes[i][0], sizes[i + 1], dense[i + 1].shape[2:])
        assert (above | ~dense[i + 1]).all()
    assert plan.density() == 3 / 16
    assert torch.equal(plan.to_dense(-1), dense[2])
    assert "levels=((256, 1), (128, 2), (64, 3))" in repr(plan)


def test_budgets_end_where_candidates_do():
    dense, _ = plan_of(300, 500, density=1.0, levels=((128, 1), (64, 99)))
    assert (dense[0].sum(-1) == 1).all()
    # The last block of 128 holds 116 keys: as many blocks of 64 and 32 as another.
    assert (dense[1].sum(-1) == 2).all() and (dense[2].sum(-1) == 4).all()


def test_best_scores_are_chosen():
    """By loops, from means in float64; ties to the lower index."""
    q, k = (torch.randn(1, 1, 256, 8, dtype=torch.float64) for _ in range(2))
    k[:, :, 128:192] = k[:, :, :64]
    plan = mra.make_plan(q, k, block_size=32, blocks_per_row=2, levels=((128, 1), (64, 1)))

    def best(x, candidates, block, budget):
        means = [t[0, 0].view(-1, block, 8).mean(1) for t in (q, k)]
        scores = {y: float(means[0][x] @ means[1][y]) for y in candidates}
        return sorted(sorted(candidates, key=lambda y: (-scores[y], y))[:budget])

    for x in range(8):
        split = best(x // 4, range(2), 128, 1)
        split = best(x // 2, [2 * y + i for y in split for i in range(2)], 64, 1)
        exact = best(x, [2 * y + i for y in split for i in range(2)], 32, 2)
        assert plan.to_dense()[0, 0, x].nonzero().flatten().tolist() == exact
    tied = mra.make_plan(0 * q, k, block_size=32, blocks_per_row=1, levels=((128, 1), (64, 1)))
    assert tied.to_dense()[..., 0].all() and tied.density() == 1 / 8


def integers(seed, N, M, H=4, Hk=2, D=8, levels=(), masks=False):
    """Small integers, whose block means and scores float32 holds exactly (counts are powers of
    two, the scale is 1/4), and masks that leave half of each block but nothing of one of the
    coarsest: the plan is then one set, ties included, on every device."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-2, 3, (2, heads, L, D), generator=g).float()
            for heads, L in ((H, N), (Hk, M)))  # fmt: skip
    if not masks:
        return q, k, None, None

    def mask(L):
        keep = torch.arange(L) % 16 < 8
        keep[levels[0][0] : 2 * levels[0][0]] = False
        return torch.stack([keep, torch.ones(L, dtype=torch.bool)])

    return q, k, mask(M), mask(N)


def assert_same_lists(device, inputs, **options):
    there = [None if x is None else x.to(device) for x in inputs]
    ours, theirs = (mra.make_plan(*x, scale=0.25, **options) for x in (there, inputs))
    for name in ("row_start", "row_count", "row_index"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), (name, options)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_size", [(32, 16), (32, 32), (32, 128), (64, 32), (128, 16)])
@pytest.mark.parametrize("device", [CUDA])
def test_same_lists_as_on_the_cpu(device, block_size, is_causal, masks):
    """Ties included."""
    seed, b = new_seed(), max(block_size)
    N, M = 12 * b + 16, (12 if is_causal else 8) * b + 16
    for levels in (((2 * b, 3),), ((4 * b, 1), (2 * b, 3)), ((4 * b, 9), (2 * b, 99))):
        inputs = integers(seed, N, M, levels=levels, masks=masks)
        for diagonal, first in itertools.product((0, 1, 5), (0, 2)):
            for budget in (dict(density=0.25), dict(blocks_per_row=3)):
                assert_same_lists(
                    device, inputs, block_size=block_size, levels=levels, is_causal=is_causal,
                    diagonal_blocks=diagonal, first_blocks=first, **budget,
                )  # fmt: skip


@pytest.mark.parametrize("device", [CUDA])
def test_long_rows(device):
    """Of candidates at the coarsest resolution: fewer rows of scores at a time, or a workspace."""
    for blocks in (1000, 4000, 12000, 70000):
        inputs = integers(new_seed(), 1024, 64 * blocks, H=2, Hk=1)
        assert_same_lists(device, inputs, block_size=(32, 16), blocks_per_row=5, levels=((64, 40),))


@pytest.mark.parametrize("is_causal", [False, True])
def test_forced_pairs_are_reached(is_causal):
    """Cells that hold a forced pair are split, whatever the budget of their level."""
    M = 500 if is_causal else 700
    for diagonal_blocks, first_blocks in itertools.product((0, 1, 5), (0, 3)):
        forced = dict(diagonal_blocks=diagonal_blocks, first_blocks=first_blocks)
        options = dict(blocks_per_row=14, is_causal=is_causal, **forced)
        dense, _ = plan_of(500, M, **options, levels=((128, 1), (64, 1)))
        nq, nk = dense[-1].shape[2:]
        x, y = torch.arange(nq)[:, None] * 16, torch.arange(nk)[None] * 32
        wanted = (y < 32 * first_blocks).expand(nq, nk)
        if diagonal_blocks:
            reach = diagonal_blocks // 2 * 32
            wanted = wanted | ((y < x + 16 + reach) & (y + 32 > x - reach))
        if is_causal:
            wanted = (wanted | (y + 32 > x)) & (y <= x + 15)
        assert dense[-1][:, :, wanted].all()


def test_causal_cells():
    dense, plan = plan_of(600, 600, blocks_per_row=3, is_causal=True, levels=((128, 1), (64, 2)))
    for d in dense[:2]:
        n = d.shape[-1]
        assert d.diagonal(dim1=-2, dim2=-1).all()
        assert not (d & torch.ones(n, n).triu(1).bool()).any()
    assert (dense[0].sum(-1) == 1).all()


def test_plan_object():
    _, plan = plan_of(300, 500, blocks_per_row=3, levels=((128, 2), (64, 3)))
    leaves, spec = pytree.tree_flatten(plan)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.levels == ((128, 2), (64, 3))
    assert torch.equal(again.to("cpu").to_dense(0), plan.to_dense(0))
    assert plan.row_start.shape == (2, 2, 19 + 5 + 3)
    assert str(plan)


def test_operations_by_hand():
    """One head of 128 queries, 256 keys, D 8: 2 x 4 cells of 64, 2 a row; 2 of 4 blocks of 32."""
    q, k = torch.randn(1, 1, 128, 8), torch.randn(1, 1, 256, 8)
    config = mra.MRAConfig(blocks_per_row=2, block_size=32, levels=((64, 2),), order=0)
    with FlopCounterMode(display=False) as counter:
        mra.mra_attention(q, k, k, config=config)
    pool = 8 * 128 + 2 * 8 * 256
    scores = 2 * 8 * (2 * 4 + 4 * 4)
    coarse = 4 * 8 * 128 * (2 + 2)
    fine = 4 * 8 * 128 * 64
    assert counter.get_total_flops() == pool + scores + coarse + fine
