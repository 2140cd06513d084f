"""The operators with pool="centred" and "sampled": what forward keeps for backward, and what they
refuse. Their results are tested in test_centred.py."""

import pytest
import torch
from helpers import BEST, CUDA_DTYPES, Case, relative_error
from test_centred import forms
from tools import same_on_meta, track

from mra_attention import reference

OPS = torch.ops.mra_attention


def arguments(case):
    """Of forward, and of backward after it."""
    o, masks = case.options, (case.key_mask, case.query_mask)
    forward = (case.q, case.k, case.v, *masks, None, None, None, None, o["density"], *case.block,
               "row", o["order"], "row", 0, 0, False, None, None, o["pool"])  # fmt: skip
    out, lse, share, *rest = OPS.forward(*forward)
    kept = [x if x.dim() > 1 else None for x in rest[3:]]
    assert [x is None for x in kept] == [True, *[False] * 4, o["order"] == 0, *[False] * 3]
    backward = (case.grad_out, case.grad_lse, case.q, case.k, case.v, *masks, out, lse, share,
                *rest[:3], *case.block, "row", o["order"], False, None, *kept, None,
                o["pool"])  # fmt: skip
    return forward, backward


@pytest.mark.parametrize("N", [300, 600])  # in one launch or stage by stage, on Hopper
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("device, dtype", [*BEST, *CUDA_DTYPES[1:]])
@forms
def test_what_is_kept_is_the_reference(device, dtype, pool, order, masks, N):
    D, bk, block = 24, 32, dict(block_size=32)
    case = Case(device, dtype, N=N, M=N, D=D, Hk=4, masks=masks, pool=pool, order=order, **block)
    forward, _ = arguments(case)
    _, _, _, _, _, _, _, *means, q_count, k_count, moments, mean, weights, mass = OPS.forward(
        *forward
    )
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    expected = reference.centre(pool, D**-0.5, q, k, case.query_mask, case.key_mask, bk)
    _, count = reference.pool(k, case.key_mask, bk)
    assert torch.equal(k_count, count.int())
    assert torch.equal(q_count, reference.pool(q, case.query_mask, bk)[1].int())
    close = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2e-3)
    assert relative_error(mean, expected[0]) <= close
    assert (weights.view(expected[1].shape) - expected[1]).abs().max() <= close
    expected_mass = expected[2].exp().masked_fill((count == 0)[:, None], 0)
    got = mass.exp() if device == "cpu" else mass
    assert relative_error(got, expected_mass) <= close
    pooled = [reference._weighted(x, case.key_mask, expected[1]) for x in (k, v)]
    for x, y in zip(means, pooled, strict=True):
        assert relative_error(x, y) <= 2 * close
    if order == 0:
        return
    whole = torch.ones(1, k_count.shape[1], dtype=torch.bool, device=device)
    both = reference._moments(k, v, *pooled, count, case.key_mask, bk, whole, expected[1])
    for i, x in enumerate(both):
        got = moments[:, :, i]
        assert (got[..., D:] == 0).all() and (got[..., D:, :] == 0).all()
        assert relative_error(got[..., :D, :D], x[:, :, 0]) <= max(close, 2e-2 * (close > 1e-3))


KEPT = slice(-11, -2)  # of the arguments of backward: what forward kept


@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_backward_makes_what_it_is_not_given(device, dtype, pool, order):
    """Long heads, whose forward makes it by the same kernels as backward would."""
    case = Case(device, dtype, masks="both", N=600, M=700, pool=pool, order=order)
    _, given = arguments(case)
    made = list(given)
    made[KEPT] = [None] * 9
    for ours, theirs in zip(OPS.backward(*given), OPS.backward(*made), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device, dtype", BEST)
def test_backward_refuses_some_or_other_shapes_of_it(device, dtype):
    case = Case(device, dtype, masks="both", pool="centred", order=1)
    forward, backward = arguments(case)
    names = ("key_mean", "value_mean", "query_count", "key_count", "moments", "query_centre",
             "key_weights", "block_mass")  # fmt: skip
    at = range(len(backward) - 10, len(backward) - 2)
    for i, name in zip(at, names, strict=True):
        for wrong in (None, backward[i][..., 1:]):
            if wrong is None and name == "moments":
                continue
            bad = [*backward[:i], wrong, *backward[i + 1 :]]
            with pytest.raises(ValueError, match=name):
                OPS.backward(*bad)
    even = OPS.forward(*forward[:-1], "even")
    bad = [*backward[: KEPT.start], None, *even[7:9], None, *even[10:12], *backward[-5:-2], None]
    with pytest.raises(ValueError, match="query_centre.*: got some"):
        OPS.backward(*bad, "even")


@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_operators(device, dtype, pool, order):
    case = Case(device, dtype, masks="both", B=1, D=8, pool=pool, order=order)
    for op, args in zip((OPS.forward, OPS.backward), arguments(case), strict=True):
        same_on_meta(op, args)
        torch.library.opcheck(op.default, track(args) if op == OPS.forward else args)


def test_bad_pool_of_the_operators():
    case = Case("cpu", torch.float64, pool="sampled", order=1)
    forward, backward = arguments(case)
    for op, args, coarse in ((OPS.forward, forward, 12), (OPS.backward, backward, 15)):
        causal = coarse + (5 if op == OPS.forward else 2)
        for at, value, error in (
            (-1, "mean", ValueError), (coarse, "block", ValueError),
            (-2, [128, 2], NotImplementedError), (causal, True, NotImplementedError),
        ):  # fmt: skip
            bad = list(args)
            bad[at] = value
            if at == causal:
                bad = [x[:, :, :150] if isinstance(x, torch.Tensor) and x.dim() == 4 else x
                       for x in bad]  # fmt: skip
            if at != -2 or op == OPS.forward:
                with pytest.raises(error, match="pool: got"):
                    op(*bad)
