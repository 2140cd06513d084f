"""What forward keeps for backward: all of it where there may be one, else nothing."""

import pytest
import torch
from helpers import BEST, CUDA_DTYPES, Case, assert_same_bits
from tools import same_on_meta
from torch.utils._python_dispatch import TorchDispatchMode

import mra_attention as mra

OPS = torch.ops.mra_attention
FIRST_KEPT = 6  # behind out, lse, coarse_share and the three of the lists
FORMS = [
    dict(coarse="none", order=0),
    dict(coarse="block", order=0),
    dict(coarse="block", order=1),
    dict(coarse="row", order=1, pool="even"),
    dict(coarse="row", order=1, pool="centred"),
    dict(coarse="row", order=1, pool="sampled"),
    dict(coarse="row", order=1, pool="centred", is_causal=True),
]
DTYPES = [BEST[0], *CUDA_DTYPES]


def arguments(case, keep):
    o = case.options
    options = (*case.block, o["coarse"], o["order"], "row", 0, 0, o.get("is_causal", False), None)
    inputs = (case.q, case.k, case.v, case.key_mask, case.query_mask)
    plan = (None, None, None, None, o["density"])
    return (*inputs, *plan, *options, None, o.get("pool", "even"), keep)


class KeepOfCalls(TorchDispatchMode):
    """What every call of forward is told."""

    def __init__(self):
        super().__init__()
        self.keep = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is OPS.forward.default:
            names = (argument.name for argument in func._schema.arguments)
            call = dict(zip(names, args, strict=False))  # without trailing defaults
            self.keep.append(call.get("keep", True))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("N", [0, 150, 700])
@pytest.mark.parametrize("device, dtype", DTYPES)
def test_nothing_is_kept_without_keep(device, dtype, N, form):
    """The same results but for that, in memory and on Meta; 150 rows are a short head."""
    if form.get("is_causal"):
        N = max(N, 1)
    masks = "both" if N > 1 else "none"
    case = Case(device, dtype, N=N, M=max(N, 1), masks=masks, D=32, Hk=4, **form)
    with_all, without = (OPS.forward(*arguments(case, keep)) for keep in (True, False))
    for x, y in zip(with_all[:FIRST_KEPT], without[:FIRST_KEPT], strict=True):
        assert torch.equal(x, y)
    assert all(x.shape == (0,) for x in without[FIRST_KEPT:])
    assert N == 0 or any(x.numel() for x in with_all[FIRST_KEPT:]) == (form["coarse"] != "none")
    same_on_meta(OPS.forward, arguments(case, False))


@pytest.mark.parametrize("device, dtype", BEST)
def test_kept_where_a_gradient_may_be_asked_for(device, dtype):
    case = Case(device, dtype)
    leaf = case.v.clone().requires_grad_()
    with KeepOfCalls() as calls:
        mra.mra_attention(case.q, case.k, case.v, **case.options)
        mra.mra_attention(case.q, case.k, leaf, **case.options).sum().backward()
        with torch.no_grad():
            mra.mra_attention(case.q, case.k, leaf, **case.options)
        with torch.inference_mode():
            mra.mra_attention(case.q, case.k, case.v, **case.options)
        torch.func.grad(lambda v: mra.mra_attention(case.q, case.k, v, **case.options).sum())(leaf)
    assert calls.keep[:4] == [False, True, False, False]
    assert all(calls.keep[4:])


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("device, dtype", BEST)
def test_a_backward_without_what_was_kept(device, dtype, form):
    """The gradients of one that had it."""
    case = Case(device, dtype, masks="both", **form)
    ours = case.ours()
    out, lse, share, *lists = OPS.forward(*arguments(case, False))[:FIRST_KEPT]
    o, inputs = case.options, (case.q, case.k, case.v, case.key_mask, case.query_mask)
    options = (*case.block, o["coarse"], o["order"], o.get("is_causal", False), None)
    grads = OPS.backward(
        case.grad_out, case.grad_lse, *inputs, out, lse, share, *lists, *options,
        pool=o.get("pool", "even"),
    )  # fmt: skip
    assert_same_bits(ours, dict(zip(ours, (out, lse, *grads), strict=True)))
