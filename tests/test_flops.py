"""FLOP formulas: torch's FlopCounterMode over the operators, by hand and against the benchmarks."""

import dataclasses
import sys

import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

import mra_attention as mra

sys.path.insert(0, str(ROOT))
from benchmarks import formulas  # noqa: E402
from benchmarks.cases import Case, Form  # noqa: E402


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def tensors(B=1, H=2, Hk=1, N=64, M=96, D=8):
    shapes = (B, H, N, D), (B, Hk, M, D), (B, Hk, M, D)
    return [torch.randn(s, requires_grad=True) for s in shapes]


def test_by_hand():
    """Two query heads of 64 queries on one key head of 96 keys, D 8, one of 3 blocks a row."""
    q, k, v = tensors()
    options = {"block_size": 32, "blocks_per_row": 1, "coarse": "none"}
    forward = counted(lambda: mra.mra_attention(q, k, v, **options))
    pool = 2 * 8 * 64 + 2 * 8 * 96
    scores = 2 * 2 * 8 * (2 * 3)
    fine = 2 * 4 * 8 * (64 * 32)
    assert forward == pool + scores + fine
    both = counted(lambda: mra.mra_attention(q, k, v, **options).sum().backward())
    assert both - forward == 2 * 8 * 96 + 2 * 10 * 8 * (64 * 32)
    for pool, weights in (("even", 0), ("centred", 2), ("auto", 2), ("sampled", 30)):
        planned = counted(lambda pool=pool: mra.make_plan(q, k, block_size=32, pool=pool))
        assert planned == 2 * 8 * 64 + (1 + weights) * 8 * 96 + scores
    plan = mra.make_plan(q, k, **options)
    given = counted(lambda: mra.mra_attention(q, k, v, plan=plan, coarse="none"))
    assert given == forward - scores


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "coarse, order", [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
)
def test_as_the_benchmarks_count(coarse, order, is_causal):
    M = 160 if is_causal else 200
    sizes = {"Hk": 2, "M": M, "dtype": "fp32", "block_size": (32, 16)}
    case = Case("X", 2, 4, 160, 8, **sizes, blocks_per_row=3, is_causal=is_causal)
    q, k, v = tensors(2, 4, 2, 160, M, 8)
    options = {"block_size": (32, 16), "blocks_per_row": 3, "is_causal": is_causal}
    form = Form(coarse, order)

    def forward():
        return mra.mra_attention(q, k, v, **dataclasses.asdict(form), **options)

    assert counted(forward) == formulas.mra_work(case, form, "forward").flops
    both = counted(lambda: forward().sum().backward())
    assert both == formulas.mra_work(case, form, "backward").flops


def test_fewer_than_exact_attention():
    q, k, v = tensors(1, 4, 4, 1024, 1024, 64)
    ours = counted(lambda: mra.mra_attention(q, k, v, density=1 / 16))
    assert 0 < ours < 4 * 4 * 1024 * 1024 * 64 / 2
