"""Plan: which pairs of blocks are exact."""

import math

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, DEVICES, Case, new_seed
from integer_plans import integer_case, reference_plan, reference_tiers

import mra_attention as mra

BLOCKS = [(32, 16), (32, 32), (32, 128), (64, 32), (64, 64), (128, 16), (128, 128)]
FORCED = [
    {}, {"diagonal_blocks": 1}, {"diagonal_blocks": 2}, {"diagonal_blocks": 5, "first_blocks": 2},
    {"first_blocks": 1}, {"first_blocks": 4},
]  # fmt: skip


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device, dtype", BEST)
def test_exact_selection_and_ties(device, dtype, is_causal, selection, masks):
    seed, total = new_seed(), 0
    for block in BLOCKS:
        for forced in FORCED:
            budgets = [{"density": 0.25}, {"blocks_per_row": 3}]
            if selection == "row":
                budgets.append({"density": (0.25, 0.1, 1.0, 0.5)})
            for budget in budgets:
                *inputs, options = integer_case(
                    device, dtype, seed, masks=masks, block_size=block, selection=selection,
                    is_causal=is_causal, **forced, **budget,
                )  # fmt: skip
                plan = mra.make_plan(*inputs, **options).to_dense()
                expected = reference_plan(*inputs, options)
                assert torch.equal(plan, expected), (seed, block, forced, budget)
                total += plan.sum().item()
    assert total > 0


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_selection_is_a_top_m_within_rounding(device, dtype, is_causal, selection):
    """On real numbers two scores may round to either order: then the chosen scores, sorted, must
    still be those of the reference."""
    for block in BLOCKS:
        for masks in ("none", "both"):
            case = Case(
                device, dtype, N=700, M=700, D=32, masks=masks, block_size=block,
                selection=selection, is_causal=is_causal, diagonal_blocks=1, density=0.2,
            )  # fmt: skip
            inputs = case.q, case.k, case.key_mask, case.query_mask
            plan = case.plan().to_dense()
            expected = reference_plan(*inputs, case.selection)
            L, tier = reference_tiers(*inputs, case.selection)
            assert not (plan & (tier == -math.inf)).any(), "a pair that does not exist"
            if selection == "global":
                best = L.masked_fill(tier == -math.inf, -math.inf).amax(-1, keepdim=True)
                L = L - best.clamp(min=-1e30)
            eps = 1e-12 if dtype == torch.float64 else 2.0**-18
            tolerance = eps * L[tier > -math.inf].abs().max().item()
            # One number orders (tier, score); 2^10 is above any score here.
            key = (tier * 1024 + L).masked_fill(tier == -math.inf, -1e9)
            flat = (lambda t: t.flatten(2)) if selection == "global" else (lambda t: t)
            chosen, best = (
                flat(key.masked_fill(~p, -1e9)).sort(-1, descending=True).values
                for p in (plan, expected)
            )
            assert (chosen - best).abs().max() <= tolerance, (case.seed, block, masks)


@pytest.mark.parametrize("device, dtype", BEST)
def test_all_scores_equal_takes_the_lowest_indices(device, dtype):
    q = torch.ones(1, 2, 128, 8, dtype=dtype, device=device)
    k = torch.ones(1, 1, 256, 8, dtype=dtype, device=device)
    options = {"block_size": 32, "blocks_per_row": 3, "pool": "even"}
    plan = mra.make_plan(q, k, **options).to_dense()
    assert plan.shape == (1, 2, 4, 8)
    assert plan[..., :3].all() and not plan[..., 3:].any()
    plan = mra.make_plan(q, k, **options, selection="global").to_dense()
    flat = plan.flatten(2)  # 3 * 4 pairs, the first ones of the map
    assert flat[..., :12].all() and not flat[..., 12:].any()


@pytest.mark.parametrize("device, dtype", BEST)
def test_budget_comes_from_shapes_alone(device, dtype):
    for block, N, M in [((32, 32), 200, 333), ((64, 16), 129, 500), ((32, 128), 64, 64)]:
        nk = -(-M // block[1])
        for budget, m in [
            ({"density": 1e-9}, 1), ({"density": 0.3}, math.ceil(0.3 * nk)), ({"density": 1.0}, nk),
            ({"blocks_per_row": 2}, min(2, nk)), ({"blocks_per_row": 10**6}, nk),
        ]:  # fmt: skip
            g = torch.Generator().manual_seed(new_seed())
            q = torch.randn(2, 2, N, 8, generator=g).to(device, dtype)
            k = torch.randn(2, 2, M, 8, generator=g).to(device, dtype)
            for selection in ("row", "global"):
                plan = mra.make_plan(q, k, block_size=block, selection=selection, **budget)
                dense = plan.to_dense()
                nq = dense.shape[2]
                assert (dense.sum((-1, -2)) == m * nq).all()
                if selection == "row":
                    assert (dense.sum(-1) == m).all()
                assert plan.density() == pytest.approx(m / nk)


@pytest.mark.parametrize("device, dtype", BEST)
def test_default_budget_is_an_eighth(device, dtype):
    q = torch.randn(1, 1, 64 * 16, 8).to(device, dtype)
    assert (mra.make_plan(q, q).to_dense().sum(-1) == 2).all()


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_forced_blocks_over_budget(device, dtype, selection):
    """Five diagonal blocks and two first ones for a budget of two: pairs that meet more conditions
    go first, then those with the higher score; the budget is kept."""
    seed = new_seed()
    *inputs, options = integer_case(
        device, dtype, seed, N=512, M=512, block_size=(32, 32), blocks_per_row=2,
        selection=selection, diagonal_blocks=5, first_blocks=2,
    )  # fmt: skip
    plan = mra.make_plan(*inputs, **options).to_dense()
    expected, (_, tier) = reference_plan(*inputs, options), reference_tiers(*inputs, options)
    assert torch.equal(plan, expected)
    assert (plan.sum((-1, -2)) == 32).all()
    assert tier[plan].min() >= 1, "an unforced pair went before a forced one"
    if selection == "row":
        # Rows 0..3 see a first block within reach 2 of the diagonal: it meets both conditions.
        assert plan[:, :, :2, :2].all()  # 0,1: both first blocks are near: tier 2 twice
        assert plan[:, :, 2, :2].all() and plan[:, :, 3, 1].all()


@pytest.mark.parametrize("device, dtype", BEST)
def test_diagonal_blocks_with_unequal_sizes(device, dtype):
    """bq 32, bk 64, diagonal_blocks=1: no widening, the key block that holds the query block.
    bq 64, bk 16: the four key blocks that it covers."""
    q = torch.zeros(1, 1, 256, 8, dtype=dtype, device=device)
    plan = mra.make_plan(q, q, block_size=(32, 64), blocks_per_row=1, diagonal_blocks=1).to_dense()
    assert plan[0, 0].nonzero()[:, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    plan = mra.make_plan(q, q, block_size=(64, 16), blocks_per_row=4, diagonal_blocks=1).to_dense()
    assert plan[0, 0].nonzero()[:, 1].tolist() == list(range(16))


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_causal_crossing_pairs_always_there(device, dtype, selection):
    """bq 128, bk 16: eight pairs of each row cross the diagonal; budget 1 keeps them all, and
    nothing of the future or the past comes in."""
    g = torch.Generator().manual_seed(new_seed())
    q, k = (torch.randn(2, 2, 500, 8, generator=g).to(device, dtype) for _ in range(2))
    plan = mra.make_plan(
        q, k, block_size=(128, 16), blocks_per_row=1, is_causal=True, selection=selection
    ).to_dense()
    x, y = torch.arange(4, device=device)[:, None], torch.arange(32, device=device)
    crossing = (y // 8 == x).expand_as(plan)
    assert torch.equal(plan, crossing)


@pytest.mark.parametrize("device, dtype", BEST)
def test_causal_budget_grows_with_the_row(device, dtype):
    g = torch.Generator().manual_seed(new_seed())
    q, k = (torch.randn(1, 2, 1024, 8, generator=g).to(device, dtype) for _ in range(2))
    plan = mra.make_plan(q, k, block_size=32, density=0.25, is_causal=True).to_dense()
    expected = [math.ceil(0.25 * (x + 1)) for x in range(32)]
    assert plan.sum(-1)[0, 0].tolist() == expected


@pytest.mark.parametrize("device, dtype", BEST)
def test_empty_blocks_take_no_budget(device, dtype):
    """Key blocks 0 and 2 have no valid key, query block 1 no valid query: the budget of 2 goes
    to other blocks, and the empty row has no pair."""
    g = torch.Generator().manual_seed(new_seed())
    q, k = (torch.randn(1, 2, 256, 8, generator=g).to(device, dtype) for _ in range(2))
    key_mask = torch.ones(1, 256, dtype=torch.bool, device=device)
    key_mask[:, :32] = key_mask[:, 64:96] = False
    query_mask = torch.ones(1, 256, dtype=torch.bool, device=device)
    query_mask[:, 32:64] = False
    for selection in ("row", "global"):
        plan = mra.make_plan(
            q, k, key_mask, query_mask, block_size=32, blocks_per_row=2, selection=selection,
            first_blocks=1,
        ).to_dense()  # fmt: skip
        assert not plan[..., [0, 2]].any() and not plan[:, :, 1].any()
        rows = plan.sum(-1)[:, :, [0, 2, 3, 4, 5, 6, 7]]
        if selection == "row":
            assert (rows == 2).all()
        else:  # 2 * 8 pairs in all, of which first_blocks=1 forces the 6 of query block 0
            assert (rows.sum(-1) == 16).all() and (rows[..., 0] == 6).all()


@pytest.mark.parametrize("device, dtype", BEST)
def test_fewer_pairs_than_budget(device, dtype):
    """Only key block 1 of 4 is valid; a budget of 3 takes it alone. No valid key: nothing."""
    q = torch.ones(2, 1, 128, 8, dtype=dtype, device=device)
    key_mask = torch.zeros(2, 128, dtype=torch.bool, device=device)
    key_mask[0, 40] = True
    for selection in ("row", "global"):
        plan = mra.make_plan(q, q, key_mask, block_size=32, blocks_per_row=3, selection=selection)
        dense = plan.to_dense()
        assert dense[0, ..., 1].all() and dense.sum() == 4


@pytest.mark.parametrize("device, dtype", BEST)
def test_global_leaves_rows_without_a_pair(device, dtype):
    """Query blocks 0..2 are zero: all their scores equal their maximum (difference 0), and so do
    one score of each other row. Ties go to the lower index: 4 pairs of row 0 ..., row 3 none."""
    q = torch.zeros(1, 1, 128, 8, dtype=dtype, device=device)
    q[:, :, 96:, 0] = 1
    k = torch.zeros(1, 1, 256, 8, dtype=dtype, device=device)
    k[..., 0] = torch.arange(8, device=device).repeat_interleave(32).to(dtype)
    plan = mra.make_plan(q, k, block_size=32, blocks_per_row=6, selection="global", pool="even")
    plan = plan.to_dense()
    assert plan.sum(-1)[0, 0].tolist() == [8, 8, 8, 0]


def row_lists(case):
    o = {"density": None, "blocks_per_row": None, "selection": "row", "diagonal_blocks": 0,
         "first_blocks": 0, "is_causal": False, "scale": None, **case.selection}  # fmt: skip
    return torch.ops.mra_attention.plan(
        case.q, case.k, case.key_mask, case.query_mask, o["blocks_per_row"], o["density"],
        *case.block, o["selection"], o["diagonal_blocks"], o["first_blocks"], o["is_causal"],
        o["scale"],
    )  # fmt: skip


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device, dtype", BEST)
def test_row_lists(device, dtype, is_causal, selection, masks):
    """Ascending, disjoint, inside the capacity that shapes give, and the same set as to_dense()."""
    case = Case(
        device, dtype, N=500, masks=masks, is_causal=is_causal, selection=selection,
        block_size=(64, 32), density=0.2,
    )  # fmt: skip
    start, count, index = row_lists(case)
    nq, nk = -(-500 // 64), -(-case.k.shape[2] // 32)
    assert start.shape == count.shape == (2, 4, nq)
    assert {t.dtype for t in (start, count, index)} == {torch.int32}
    most = max(max(1, math.ceil(0.2 * nk)), 2 if is_causal else 0)
    assert index.shape == (2, 4, nq * most)
    dense = torch.zeros(2, 4, nq, nk, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            used = []
            for x in range(nq):
                s, n = start[b, h, x].item(), count[b, h, x].item()
                assert 0 <= s and s + n <= index.shape[-1]
                row = index[b, h, s : s + n].tolist()
                assert row == sorted(set(row)) and all(0 <= y < nk for y in row)
                dense[b, h, x, row] = True
                used += range(s, s + n)
            assert len(used) == len(set(used)), "two rows share a place"
    assert torch.equal(case.plan().to_dense().cpu(), dense)


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("device", DEVICES)
def test_making_the_plan_inside_gives_the_same(device, selection):
    """plan= of make_plan and the plan that the operator makes itself: one result, bit for bit."""
    case = Case(device, torch.float32, selection=selection, masks="both")
    inside, given = case.ours(), case.ours(plan=case.plan())
    for name in inside:
        assert torch.equal(inside[name], given[name]), name


@pytest.mark.parametrize("blocks", [20, 40, 200])
@pytest.mark.parametrize("device", DEVICES)
def test_infinite_means(device, blocks):
    """Of two key blocks whose mean is infinite the queries of one sign take one, the others the
    other: no score is NaN."""
    *inputs, options = integer_case(
        device, torch.float32, new_seed(), N=160, M=16 * blocks, block_size=(32, 16),
        blocks_per_row=3,
    )  # fmt: skip
    q, k = inputs[:2]
    q[..., 1] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], device=device).repeat_interleave(32)
    k[:, :, 5 * 16 + 3, 1], k[:, :, 17 * 16, 1] = math.inf, -math.inf
    plan = mra.make_plan(*inputs, **options).to_dense()
    expected, (L, _) = reference_plan(*inputs, options), reference_tiers(*inputs, options)
    assert L.isinf().sum() == 2 * L[..., 0].numel() and not L.isnan().any()
    assert torch.equal(plan, expected)
    assert (plan[..., 5] != plan[..., 17]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_scores_do_no_harm(device):
    """NaN in: the plan stays within its lists and nothing hangs."""
    case = Case(device, torch.float32, N=200, M=300)
    case.q[0, 0, 3, 0] = case.k[0, 1, 5, 1] = float("nan")
    case.q[1, 1, 100, 2] = float("inf")
    for selection in ("row", "global"):
        case.options["selection"] = selection
        start, count, index = row_lists(case)
        assert (count >= 0).all() and (start >= 0).all()
        assert (start + count <= index.shape[-1]).all()
        assert case.plan().to_dense().sum((-1, -2)).max() <= count.sum(-1).max()
        out = mra.mra_attention(case.q, case.k, case.v, **case.options)
        # Heads that read none of these values are as if nothing had happened.
        assert out[0, 1].isfinite().all() and out[1, [0, 2, 3]].isfinite().all()
