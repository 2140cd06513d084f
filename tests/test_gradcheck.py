"""Gradients against finite differences in float64, the plan held fixed, as the gradient sees it."""

import itertools

import pytest
import torch
from helpers import Case

import mra_attention as mra

FORMS = [
    (*form, "even") for form in (("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1))
]
# The gradient of "sampled" is another one's: see reference.py.
CENTRED = [("row", 0, "centred"), ("row", 1, "centred")]
CASES = [
    *itertools.product(FORMS, [False, True], ["none", "both"]),
    *itertools.product(CENTRED, [False, True], ["none", "both"]),
]


@pytest.mark.parametrize("form, is_causal, masks", CASES)
def test_gradcheck(form, is_causal, masks):
    coarse, order, pool = form
    # Short last blocks, grouped heads, some blocks exact and some not.
    case = Case(
        "cpu", torch.float64, B=1, H=2, Hk=1, N=52, M=52 if is_causal else 41, D=8,
        block_size=(16, 16), blocks_per_row=1, coarse=coarse, order=order, is_causal=is_causal,
        masks=masks, spread=0.7, pool=pool,
    )  # fmt: skip
    plan = case.plan()
    assert 0 < plan.density() < 1

    def attend(q, k, v):
        return mra.mra_attention(
            q, k, v, case.key_mask, case.query_mask, plan=plan, coarse=coarse, order=order,
            is_causal=is_causal, return_lse=True, pool=pool,
        )  # fmt: skip

    out, lse = attend(case.q, case.k, case.v)
    weight = lse.isfinite()  # rows without weight: -inf, which has no difference quotient

    def finite(q, k, v):
        out, lse = attend(q, k, v)
        return out, torch.where(weight, lse, 0.0)

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(finite, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradcheck_of_one_result(through):
    case = Case("cpu", torch.float64, B=1, H=1, Hk=1, N=40, M=40, D=8, block_size=(16, 16),
                blocks_per_row=1)  # fmt: skip
    plan = case.plan()

    def one(q, k, v):
        out, lse = mra.mra_attention(q, k, v, plan=plan, **case.values, return_lse=True)
        return out if through == "out" else lse

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(one, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)
