"""One case worked out by hand, in every form.

Two queries in one block, two key blocks with two valid keys each; scale 1, and only the first
column of q, k and v is not zero. Write L = ln 2.

    q: 1 L, 3 L            mean of the block: 2 L
    block A: k = 1, 2      v = 3, 6         means 1.5, 4.5
    block B: k = 0, 2      v = 0, 12        means 1, 6

Scores of the blocks: 2 L * 1.5 > 2 L * 1, so a budget of one block takes A. Weights, as powers of
two, of A's keys: 2, 4 for row 0 and 8, 64 for row 1. Numerators 2*3 + 4*6 = 30, 8*3 + 64*6 = 408.
"""

import math

import pytest
import torch
from helpers import BEST

import mra_attention as mra

L = math.log(2)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}

# Order 1. Centred: A has k = -+0.5, v = -+1.5; B has k = -+1, v = -+6; n = 4 keys.
#   C = (2 * 0.5 * 1.5 + 2 * 1 * 6) / 4 = 13.5 / 4 = 3.375
#   S = (2 * 0.25 + 2 * 1) / 4 = 0.625
#   u = q C = 3.375 L, 10.125 L      t = q^2 S = 0.625 L^2, 5.625 L^2      gamma = 1 / (1 + t / 4)
STEP = [
    3.375 * L / (1 + 0.15625 * L * L),
    10.125 * L / (1 + 1.40625 * L * L),
]
EXPECTED = {
    # A alone: 30 / 6 and 408 / 72
    ("none", 0): ([5, 17 / 3], [math.log(6), math.log(72)]),
    # B weighs 2 exp(2 L * 1) = 8 on 6 for both rows: (30 + 48) / 14 and (408 + 48) / 80
    ("block", 0): ([39 / 7, 5.7], [math.log(14), math.log(80)]),
    # coarse shares 8 / 14 and 8 / 80
    ("block", 1): (
        [39 / 7 + 4 / 7 * STEP[0], 5.7 + 0.1 * STEP[1]],
        [math.log(14), math.log(80)],
    ),
    # B weighs 2 exp(q * 1) = 4 and 16 on 6: (30 + 24) / 10 and (408 + 96) / 88
    ("row", 0): ([5.4, 63 / 11], [math.log(10), math.log(88)]),
    # coarse shares 4 / 10 and 16 / 88
    ("row", 1): (
        [5.4 + 0.4 * STEP[0], 63 / 11 + 2 / 11 * STEP[1]],
        [math.log(10), math.log(88)],
    ),
}


def inputs(device, dtype):
    """q (1, 1, 2, 8), k and v (1, 1, 32, 8), key_mask (1, 32)."""
    q, k, v = (torch.zeros(1, 1, n, 8, dtype=dtype, device=device) for n in (2, 32, 32))
    q[0, 0, :, 0] = torch.tensor([L, 3 * L], dtype=dtype)
    at = [3, 9, 16, 31]  # where the valid keys lie in their blocks doesn't matter
    k[0, 0, at, 0] = torch.tensor([1, 2, 0, 2], dtype=dtype, device=device)
    v[0, 0, at, 0] = torch.tensor([3, 6, 0, 12], dtype=dtype, device=device)
    mask = torch.zeros(1, 32, dtype=torch.bool, device=device)
    mask[0, at] = True
    # What masked keys hold must not matter.
    k[0, 0, ~mask[0]] = 7
    v[0, 0, ~mask[0]] = -50
    return q, k, v, mask, at


def attend(q, k, v, mask, coarse, order, selection="row"):
    return mra.mra_attention(
        q, k, v, mask, blocks_per_row=1, block_size=(32, 16), coarse=coarse, order=order,
        selection=selection, scale=1.0, pool="even", return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", EXPECTED)
@pytest.mark.parametrize("device, dtype", BEST)
def test_forward(device, dtype, coarse, order, selection):
    q, k, v, mask, _ = inputs(device, dtype)
    out, lse = attend(q, k, v, mask, coarse, order, selection)
    rows, masses = EXPECTED[coarse, order]
    near = dict(rtol=TOLERANCE[dtype], atol=0)
    for got, want in ((out[0, 0, :, 0], rows), (lse[0, 0], masses)):
        want = torch.tensor(want, dtype=torch.float64)
        assert torch.allclose(got.cpu().double(), want, **near)
    # The masked values are in no column; those beyond the first are zero.
    assert not out[..., 1:].any()


# Row form, order 0, of the sum of the two outputs. Shares of a1, a2, B: 0.2, 0.4, 0.4 and
# 1/11, 8/11, 2/11. ds = share * (value - output):
#   row 0: 0.2 (3 - 5.4) = -0.48      0.4 (6 - 5.4) = 0.24         0.4 (6 - 5.4) = 0.24
#   row 1: (33 - 63) / 121 = -30/121  8/11 (66 - 63)/11 = 24/121   2/11 * 3/11 = 6/121
GRADIENTS = {
    "row": dict(
        # -0.48 * 1 + 0.24 * 2 + 0.24 * 1, and (-30 + 48 + 6) / 121
        q=[0.24, 24 / 121],
        # a: ds0 L + ds1 3 L; B's mean gets (0.24 + 18/121) L, half for each of its keys
        k=[
            -(0.48 + 90 / 121) * L,
            (0.24 + 72 / 121) * L,
            (0.12 + 9 / 121) * L,
            (0.12 + 9 / 121) * L,
        ],
        v=[0.2 + 1 / 11, 0.4 + 8 / 11, 0.2 + 1 / 11, 0.2 + 1 / 11],
    ),
    # A alone: shares 1/3, 2/3 and 1/9, 8/9; ds = -+2/3 and -+8/27
    "none": dict(
        q=[2 / 3, 8 / 27],
        k=[-14 / 9 * L, 14 / 9 * L, 0, 0],
        v=[4 / 9, 14 / 9, 0, 0],
    ),
}


@pytest.mark.parametrize("coarse", GRADIENTS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_gradients(device, dtype, coarse):
    q, k, v, mask, at = inputs(device, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attend(*leaves, mask, coarse, 0)
    dq, dk, dv = torch.autograd.grad(out[..., 0].sum(), leaves)
    near = dict(rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, got in (("q", dq[0, 0, :, 0]), ("k", dk[0, 0, at, 0]), ("v", dv[0, 0, at, 0])):
        want = torch.tensor(GRADIENTS[coarse][name], dtype=torch.float64)
        assert torch.allclose(got.cpu().double(), want, **near), name
    for grad in (dk, dv):
        assert not grad[0, 0, ~mask[0]].any()


# pool="centred": the mean query is 2 L, so the keys of A weigh 4 and 16 of 20, those of B 1 and 16
# of 17. Means: A k 1.8, v 5.4; B k 32/17, v 192/17. The entropy of B's weights is
# log 17 - 16/17 log 16, so B weighs 17 * 2^(-64/17) * 2^(32/17 or 96/17).
#   C = 1/2 (0.2 * 0.8 * 1 * 3 + 16/289 * 2 * 12) = 1/2 (0.48 + 384/289)
#   S = 1/2 (0.16 + 64/289)
#   q less its mean: -L, L      u = -+C L      t = S L^2      B's weights times 1 + gamma t / 2
@pytest.mark.parametrize("order", [0, 1])
def test_centred(order):
    q, k, v, mask, _ = inputs("cpu", torch.float64)
    out, lse = mra.mra_attention(
        q, k, v, mask, blocks_per_row=1, block_size=(32, 16), order=order, scale=1.0,
        pool="centred", return_lse=True,
    )  # fmt: skip
    t = (0.16 + 64 / 289) / 2 * L * L
    gamma = 1 / (1 + t / 4)
    for i, (exact, mass, power) in enumerate(((30, 6, -32 / 17), (408, 72, 32 / 17))):
        weight = 17 * 2**power * (1 + order * gamma * t / 2)
        first = (2 * i - 1) * L * (0.48 + 384 / 289) / 2 * gamma * weight / (mass + weight)
        row = (exact + weight * 192 / 17) / (mass + weight) + order * first
        assert math.isclose(out[0, 0, i, 0], row, rel_tol=1e-13)
        assert math.isclose(lse[0, 0, i], math.log(mass + weight), rel_tol=1e-13)
