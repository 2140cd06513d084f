"""Inputs at the edge, forward and backward: nothing to do, huge logits, everything selected, blocks
without a key, more forced blocks than the budget holds.

Ties, N = 1, short last blocks, fully masked rows and M = 0 are in test_plan.py, test_fine.py,
test_backward.py and test_bad_input.py.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import BEST, DEVICE_DTYPES, DEVICES, NAMES, Case, compare, relative_error

import mra_attention as mra
from mra_attention.reference import mra_attention_reference

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]


def run(function, inputs, grads, *args, **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, lse = function(*inputs, *args, **options)
    return dict(
        zip(NAMES, (out, lse, *torch.autograd.grad((out, lse), inputs, grads)), strict=True)
    )


# Nothing to do


@pytest.mark.parametrize("B, N", [(0, 70), (2, 0), (0, 0)])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_no_batch_or_no_query(device, dtype, coarse, order, selection, B, N):
    case = Case(
        device, dtype, B=max(B, 1), N=max(N, 1), M=90, coarse=coarse, order=order,
        selection=selection,
    )  # fmt: skip
    q, k, v = case.q[:B, :, :N], case.k[:B], case.v[:B]
    masks = (
        torch.ones(B, 90, dtype=torch.bool, device=device),
        torch.ones(B, N, dtype=torch.bool, device=device),
    )
    acc = torch.promote_types(dtype, torch.float32)
    for key_mask, query_mask in (masks, (None, None)):
        grads = torch.ones_like(q), torch.ones(B, 4, N, device=device, dtype=acc)
        got = run(
            mra.mra_attention, (q, k, v), grads, key_mask, query_mask, **case.options,
            return_lse=True,
        )  # fmt: skip
        for name, like in zip(NAMES, (q, None, q, k, v), strict=True):
            shape, kind = ((B, 4, N), acc) if like is None else (like.shape, dtype)
            assert got[name].shape == shape and got[name].dtype == kind, name
            assert got[name].device == q.device and not got[name].any(), name
        plan = mra.make_plan(q, k, key_mask, query_mask, **case.selection)
        nq = -(-N // 32)
        assert plan.to_dense().shape == (B, 4, nq, 3) and plan.density() == 0.0
        assert f"shape=({B}, 4, {N}, 90)" in repr(plan)
        out = mra.mra_attention(q, k, v, plan=plan, **case.values)
        assert out.shape == q.shape


def test_plan_without_a_query_prints():
    q, k = torch.ones(2, 2, 0, 8), torch.ones(2, 2, 90, 8)
    assert "shape=(2, 2, 0, 90)" in str(mra.make_plan(q, k))


@pytest.mark.parametrize("device", DEVICES)
def test_no_key_is_refused_even_without_a_query(device):
    """N = M = 0: what would be zeros anyway is refused like every M = 0."""
    x = torch.ones(1, 2, 0, 8, device=device)
    for call in (lambda: mra.mra_attention(x, x, x, is_causal=True), lambda: mra.make_plan(x, x)):
        with pytest.raises(ValueError, match="key"):
            call()


# Every pair selected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_density_one_is_softmax_attention(
    device, dtype, coarse, order, selection, is_causal, masked
):
    """Output and gradients of torch's own attention, which knows nothing of our reference."""
    case = Case(
        device, dtype, density=1.0, coarse=coarse, order=order, selection=selection,
        is_causal=is_causal, masks="key" if masked else "none", N=140,
    )  # fmt: skip
    case.grad_lse.zero_()  # torch gives no lse to differentiate
    ours = case.ours()
    del ours["lse"]
    mask = None if case.key_mask is None else case.key_mask[:, None, None, :]
    if masked and is_causal:  # torch takes one or the other; key 0 is always valid
        mask, is_causal = mask & torch.ones(140, 140, dtype=torch.bool, device=device).tril(), False

    def theirs(kind):
        inputs = [t.detach().to(kind).requires_grad_() for t in (case.q, case.k, case.v)]
        q, k, v = inputs
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        grads = torch.autograd.grad(out, inputs, case.grad_out.to(kind))
        return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))

    compare(ours, theirs(dtype), theirs(torch.float64), dtype, device, f"seed {case.seed}")


# Huge logits


@pytest.mark.parametrize("signs", ["plus", "minus", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_huge_logits(device, dtype, coarse, order, selection, is_causal, signs):
    """Logits of +1e4, -1e4, or key by key either: finite results, outputs that stay averages of
    values (order 0), and the lse of float64."""
    case = Case(
        device, dtype, coarse=coarse, order=order, selection=selection, is_causal=is_causal,
        masks="key", density=0.25, scale=1.0, N=140, M=140,
    )  # fmt: skip
    with torch.no_grad():
        case.q.sign_(), case.k.sign_()
        case.q[..., 0] = 128.0
        sign = {"plus": 1.0, "minus": -1.0, "both": case.k[..., 1]}[signs]
        case.k[..., 0] = 80.0 * sign  # 128 * 80 = 10240: every dtype holds both factors
    result = case.ours()
    for name, t in result.items():
        if name != "lse":
            assert t.isfinite().all(), (name, case.seed)
    dense = case.plan().to_dense()
    lse = case.reference(torch.float64, dense, backward=False)["lse"]
    dead = lse == -torch.inf  # coarse="none" under global: rows without a pair
    assert torch.equal(result["lse"] == -torch.inf, dead), case.seed
    assert result["lse"][~dead].isfinite().all(), case.seed
    # Means of blocks are rounded to the dtype of the keys: eps of a logit of 1e4.
    eps = torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    assert relative_error(result["lse"], lse) <= 2 * eps, case.seed
    if order == 0:
        most = case.v.abs().max() * (1 + 4 * torch.finfo(dtype).eps)
        assert result["out"].abs().max() <= most, case.seed


@pytest.mark.parametrize("block_size", [32, 64, (64, 16)])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_negative_scale_of_huge_spread(device, dtype, coarse, order, block_size):
    """The largest score is the smallest logit: exp of what lies above that overflows."""
    case = Case(
        device, dtype, coarse=coarse, order=order, block_size=block_size, scale=-0.5, spread=32.0,
        D=64, N=192, M=256,
    )  # fmt: skip
    case.check(backward=False)


# Blocks without a key or a query


@pytest.mark.parametrize("empty", ["first", "last", "odd", "all but one"])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_empty_blocks(device, dtype, coarse, order, selection, empty):
    """Whole blocks of keys and queries that the masks leave without a row, the short last one
    included: as the reference, and what they hold (NaN) goes nowhere."""
    for is_causal in (False, True):
        N = 32 * 6 + 11
        case = Case(
            device, dtype, coarse=coarse, order=order, selection=selection, N=N, M=N,
            is_causal=is_causal, first_blocks=1, diagonal_blocks=1,
        )  # fmt: skip
        block = torch.arange(N, device=device) // 32
        keep = {
            "first": block > 0, "last": block < 6, "odd": block % 2 == 0, "all but one": block == 2,
        }[empty]  # fmt: skip
        case.key_mask = keep.repeat(2, 1)
        # Rotated by one block in the second entry: keys and queries are empty at different places.
        case.query_mask = torch.stack([keep, keep.roll(32)])
        result = case.check()
        with torch.no_grad():
            hidden = ~keep[None, None, :, None]
            case.k.masked_fill_(hidden, float("nan"))
            case.v.masked_fill_(hidden, float("nan"))
        with_nan = case.ours()
        for name, t in result.items():
            assert torch.equal(t, with_nan[name]), (name, is_causal, case.seed)


# Forced blocks, and rows that get none


@pytest.mark.parametrize("blocks_per_row", [1, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_forced_blocks_over_budget(
    device, dtype, coarse, order, selection, is_causal, blocks_per_row
):
    """Five diagonal and two first blocks for a budget of one or three: the budget holds, and the
    results are those of the reference."""
    case = Case(
        device, dtype, coarse=coarse, order=order, selection=selection, is_causal=is_causal,
        N=300, M=300, blocks_per_row=blocks_per_row, diagonal_blocks=5, first_blocks=2,
    )  # fmt: skip
    case.check()
    m = [min(blocks_per_row, x + 1 if is_causal else 10) for x in range(10)]
    assert (case.plan().row_count.sum(-1) == sum(m)).all()


@pytest.mark.parametrize("device, dtype", BEST)
@pytest.mark.parametrize("coarse, order", FORMS)
def test_rows_without_a_pair(device, dtype, coarse, order):
    """Query block 0 takes the whole budget of a global plan. The others are coarse alone; without
    a coarse part they are zero, and so are their gradients."""
    case = Case(
        device, dtype, coarse=coarse, order=order, selection="global", blocks_per_row=1,
        first_blocks=1, N=32 * 6, M=32 * 7,
    )  # fmt: skip
    with torch.no_grad():  # no other pair may go before those of block 0
        case.k.zero_()
        case.k[..., 0] = 1.0
    plan = case.plan()
    assert (plan.row_count[..., 0] == 6).all() and not plan.row_count[..., 1:].any()
    result = case.check()
    rows = {name: result[name][:, :, 32:] for name in ("out", "lse", "dq")}
    if coarse == "none":
        assert (rows["lse"] == -torch.inf).all()
        assert not rows["out"].any() and not rows["dq"].any()
        assert not result["dk"][:, :, 32 * 6 :].any() and not result["dv"][:, :, 32 * 6 :].any()
    else:
        assert rows["lse"].isfinite().all() and rows["out"].any()


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_without_a_pair(device, coarse, order):
    """Given by hand. With causal the crossing pairs are there all the same."""
    q, k, v = (torch.randn(1, 2, 100, 8, device=device) for _ in range(3))
    none = torch.zeros(1, 2, 4, 4, dtype=torch.bool, device=device)
    for is_causal, pool in ((False, "even"), (False, "auto"), (True, "auto")):
        plan = mra.Plan.from_dense(none, 100, 100, 32, is_causal)
        options = {"coarse": coarse, "order": order, "is_causal": is_causal, "pool": pool}
        out = mra.mra_attention(q, k, v, plan=plan, **options)
        exact = mra_attention_reference(
            q.double(), k.double(), v.double(), plan=plan.to_dense(), block_size=32, **options
        )
        assert relative_error(out, exact) <= 1e-5
        assert out.any() or (coarse == "none" and not is_causal)
