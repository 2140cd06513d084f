"""Plans of pool="centred" and "sampled": scores of plain means and the bias of each key block."""

import math

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, DEVICES, Case, new_seed, tiers
from tools import same_on_meta

import mra_attention as mra
from mra_attention import reference

OPS = torch.ops.mra_attention
POOLS = ["centred", "sampled"]
pools = pytest.mark.parametrize("pool", POOLS)
selections = pytest.mark.parametrize("selection", ["row", "global"])


def reference_plan(case):
    """(dense plan, what orders its pairs, size of what is rounded) of the reference in float64.

    One number orders pairs: forced ones are 2^20 higher for each condition that they meet, pairs
    that don't exist are at -inf."""
    o, (bq, bk) = case.options, case.block
    q, k, G = case.q.double(), case.k.double(), case.q.shape[1] // case.k.shape[1]
    s = o.get("scale", q.shape[-1] ** -0.5)
    selection = o.get("selection", "row")
    forced = (o.get("diagonal_blocks", 0), o.get("first_blocks", 0))
    mean, *_, bias = reference.centre(o["pool"], s, q, k, case.query_mask, case.key_mask, bk)
    q_mean, q_count = reference.pool(q, case.query_mask, bq)
    k_mean, k_count = reference.pool(k, case.key_mask, bk)
    L = s * q_mean @ k_mean.repeat_interleave(G, 1).mT
    score = L + bias.repeat_interleave(G, 1).unsqueeze(-2)
    budget = (o.get("density"), o.get("blocks_per_row"))
    m = reference.row_budgets(L.shape[-2:], bq, bk, *budget, False)
    dense = reference.plan(
        score, q_count, k_count, m, bq, bk, q.shape[2], selection, *forced, False
    )  # fmt: skip
    exists = (q_count > 0)[:, None, :, None] & (k_count > 0)[:, None, None, :]
    if selection == "global":
        best = score.masked_fill(~exists, -math.inf).amax(-1, keepdim=True)
        score = score - best.clamp(min=-1e30)
    tier = tiers(*L.shape[-2:], bq, bk, q.shape[2], *forced, selection).to(q.device)
    order = (score + 2.0**20 * tier).masked_fill(~exists, -math.inf)
    size = max(L.abs().max().item(), (s * mean.unsqueeze(-2) @ k.mT).abs().max().item())
    return dense, order, size


def check_plan(case):
    """The plan is the reference's, or, where two scores may round to either order, one of pairs
    that score the same within rounding. In float64 it is the same."""
    plan = case.plan().to_dense()
    expected, order, size = reference_plan(case)
    assert not (plan & (order == -math.inf)).any(), "a pair that does not exist"
    if case.dtype == torch.float64:
        assert torch.equal(plan, expected), case.seed
    flat = (lambda t: t.flatten(2)) if case.options.get("selection") == "global" else (lambda t: t)
    chosen, best = (
        flat(order.masked_fill(~p | (order == -math.inf), -1e9)).sort(-1, descending=True).values
        for p in (plan, expected)
    )
    eps = 1e-12 if case.dtype == torch.float64 else 2.0**-16
    assert (chosen - best).abs().max() <= eps * max(1.0, size), case.seed
    return plan


@pytest.mark.parametrize("masks", ["none", "both", "padding"])
@selections
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pools
def test_is_the_reference(device, dtype, pool, selection, masks):
    for options in (
        dict(), dict(Hk=1), dict(Hk=4, scale=0.7), dict(diagonal_blocks=2, first_blocks=1),
        dict(blocks_per_row=1), dict(block_size=(64, 16)), dict(block_size=(32, 128), D=64),
        dict(N=20, M=300, H=2, Hk=1),
    ):  # fmt: skip
        check_plan(Case(device, dtype, masks=masks, pool=pool, selection=selection, **options))


@pytest.mark.parametrize("N, M, options", [
    (700, 4500, dict()), (64, 17000, dict(block_size=(32, 16), blocks_per_row=20)),
    (64, 17000, dict(block_size=(32, 16), blocks_per_row=20, first_blocks=2)),
    (4200, 4200, dict(selection="global")), (1000, 1000, dict(selection="global")),
])  # fmt: skip
@pytest.mark.parametrize("device, dtype", BEST)
@pools
def test_every_kernel(device, dtype, pool, N, M, options):
    """Rows in shared memory, as a stream and in a workspace; maps of one block of threads and
    others."""
    options = {"density": 0.1} | options
    if "blocks_per_row" in options:
        del options["density"]
    for masks in ("none", "both"):
        case = Case(device, dtype, masks=masks, B=1, H=4, N=N, M=M, pool=pool, **options)
        check_plan(case)


@pytest.mark.parametrize("device", DEVICES)
@selections
@pools
def test_by_hand(pool, selection, device):
    """Two blocks of keys, all queries the same: logits 1, and 5 and -5 in turns. The plain score is
    the mean logit; the centred one half of it and a quarter of the log mass."""
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    q[..., 0] = 1
    k[:, :, :32, 0] = 1
    k[:, :, 32:, 0] = torch.tensor([5.0, -5.0]).repeat(16)
    options = dict(block_size=(64, 32), blocks_per_row=1, scale=1.0, selection=selection)
    *_, bias = reference.centre(pool, 1.0, q, k, None, None, 32)
    expected = [(1 + math.log(32)) / 4 - 1 / 2, (math.log(16) + math.log1p(math.exp(-10)) + 5) / 4]
    torch.testing.assert_close(bias, torch.tensor([[expected]]))
    for form, block in (("even", 0), (pool, 1)):
        plan = mra.make_plan(q.to(device), k.to(device), pool=form, **options)
        assert plan.row_index.flatten()[: plan.row_count.item()].tolist() == [block], form


@pytest.mark.parametrize("device, dtype", BEST)
@selections
@pools
def test_differs_from_that_of_even_means(device, dtype, pool, selection):
    """Where the queries have something in common that some keys answer to."""
    case = Case(device, dtype, N=500, M=700, pool=pool, selection=selection)
    g = torch.Generator().manual_seed(case.seed)
    common = torch.randn(1, 1, 1, 16, generator=g, dtype=torch.float64).to(device, dtype)
    case.q += 2 * common
    case.k += torch.rand(2, 2, 700, 1, generator=g).to(device, dtype) ** 8 * 3 * common
    even = Case(device, dtype, N=500, M=700, selection=selection, seed=case.seed)
    even.q, even.k = case.q, case.k
    plan = check_plan(case)
    assert not torch.equal(plan, even.plan().to_dense())
    assert plan.sum() == even.plan().to_dense().sum()


def arguments(case):
    """Of the operators plan and forward."""
    o, masks = case.options, (case.key_mask, case.query_mask)
    select = (o.get("selection", "row"), 1, 1, False, None, None, o["pool"])
    plan = (case.q, case.k, *masks, None, o["density"], *case.block, *select)
    forward = (case.q, case.k, case.v, *masks, None, None, None, None, o["density"], *case.block,
               "row", o["order"], *select)  # fmt: skip
    return plan, forward


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@selections
@pools
def test_operator_plans_as_forward_does(device, dtype, pool, selection, order):
    for masks in ("none", "both"):  # more tokens than a short head has
        case = Case(device, dtype, N=700, M=600, masks=masks, pool=pool, order=order,
                    selection=selection)  # fmt: skip
        plan, forward = arguments(case)
        for ours, theirs in zip(OPS.plan(*plan), OPS.forward(*forward)[3:6], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device, dtype", BEST)
@selections
@pools
def test_what_masked_rows_hold_goes_nowhere(device, dtype, pool, selection):
    case = Case(device, dtype, N=203, pool=pool, selection=selection, masks="both")
    case.key_mask[1, 64:128] = False
    before = check_plan(case)
    case.q[~case.query_mask[:, None].expand(-1, 4, -1)] = torch.nan
    case.k[~case.key_mask[:, None].expand(-1, 2, -1)] = torch.nan
    assert torch.equal(before, case.plan().to_dense())


@pytest.mark.parametrize("device", DEVICES)
@pools
def test_empty(pool, device):
    k = torch.randn(2, 1, 100, 8, device=device)
    none = torch.zeros(2, 100, dtype=torch.bool, device=device)
    for B, N in ((0, 50), (2, 0)):
        q = torch.randn(B, 2, N, 8, device=device)
        assert mra.make_plan(q, k[:B], block_size=32, pool=pool).to_dense().numel() == 0
    q = torch.randn(2, 2, 50, 8, device=device)
    for masks in ((none, None), (None, none[:, :50]), (none, none[:, :50])):
        assert not mra.make_plan(q, k, *masks, block_size=32, pool=pool).to_dense().any()


@pytest.mark.parametrize("device, dtype", BEST)
@selections
@pools
def test_operator(device, dtype, pool, selection):
    case = Case(device, dtype, masks="both", B=1, D=8, pool=pool, selection=selection, order=1)
    plan, _ = arguments(case)
    torch.library.opcheck(OPS.plan.default, plan)
    same_on_meta(OPS.plan, plan)


@pools
def test_config_autocast_layout_and_compile(pool):
    config = mra.MRAConfig(density=0.2, block_size=32, pool=pool)
    q, k = torch.randn(2, 2, 4, 300, 16)
    plan = mra.make_plan(q, k, config=config)
    compiled = torch.compile(
        lambda q, k: mra.make_plan(q, k, config=config).row_index, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(q, k), plan.row_index)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mra.make_plan(q, k, config=config)
    low = mra.make_plan(q.bfloat16(), k.bfloat16(), config=config)
    assert torch.equal(mixed.row_index, low.row_index)
    # the queries of a layout's blocks have the same mean, whatever their order
    config = config.replace(layout=(15, 20))
    plan, v = mra.make_plan(q, k, config=config), torch.randn_like(k)
    given = mra.mra_attention(q, k, v, plan=plan, pool=pool)
    assert torch.equal(given, mra.mra_attention(q, k, v, config=config))


def test_what_is_refused():
    x, seed = torch.randn(1, 1, 300, 8), new_seed()
    case = Case("cpu", torch.float64, pool="sampled", order=1, seed=seed)
    plan, _ = arguments(case)
    for at, value, error in (
        (-1, "mean", ValueError), (-2, [128, 2], NotImplementedError),
        (-4, True, NotImplementedError),
    ):  # fmt: skip
        bad = list(plan)
        bad[at] = value
        if at == -4:
            bad[:2] = (x[:, :, :150] for x in bad[:2])
        with pytest.raises(error, match="pool: got"):
            OPS.plan(*bad)
    with pytest.raises(NotImplementedError, match="pool: got"):
        mra.make_plan(x, x, is_causal=True, pool="sampled")
