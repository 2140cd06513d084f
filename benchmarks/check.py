"""Correct first: a backend's result against the float64 reference, at the measured size.

A head's sampled query blocks and all of its keys are enough for the reference: the gradient that
goes in is zero everywhere else. Causal cases are checked whole, on a short prefix; so is a head
with weighted means, which every query has a part in, on a longer one where it has too many pairs.
"""

import dataclasses
import functools

import torch

from benchmarks.backends import Prepared
from mra_attention import Plan, make_plan, mra_attention, reference
from mra_attention.layout import Tiles

PREFIX = 512  # of a causal case
WHOLE = 1 << 14  # of one with weighted means: float64 scores of all its pairs take 2 GB
AGREE = 0.99  # share of the plan that float64 scores must select too: near ties may differ


@dataclasses.dataclass(frozen=True)
class Check:
    """Relative errors of out, dq, dk, dv (those computed) and the largest that pass of ours; share
    of the plan that the reference selects too (None for a backend without selection); for a backend
    on a given plan, how far its whole result lies from ours on that plan."""

    errors: dict
    limits: dict
    agreement: float | None = None
    difference: float | None = None  # and, with a picture, from that of tokens already in blocks

    def problem(self, strict):
        """What is wrong, or None. Not ``strict``: errors above the limits are only shown."""
        for name, error in self.errors.items():
            if error != error:
                return f"wrong: {name} is not a number"
            if strict and not error <= self.limits[name]:
                return f"wrong: error of {name} {error:.1e}, at most {self.limits[name]:.1e} passes"
        if self.agreement is not None and not self.agreement >= AGREE:
            return f"wrong: the reference selects {self.agreement:.1%} of the plan"
        if self.difference is not None:
            most = 3 * self.limits["out"]  # each may be off by its own limit
            if not self.difference <= most:
                return f"differs from MRA on the same plan: {self.difference:.1e}, not {most:.1e}"
        return None


def check(context, prepared, which):
    """Check of a Prepared backend; ``which`` is the last pass that will be timed."""
    case, form = context.case, prepared.form
    difference = None
    if case.picture and prepared.plan is None:
        prepared, difference = _in_blocks(case, prepared)
    inputs, grad_out, plan = prepared.inputs, context.grad_out, prepared.plan
    bq, bk = case.block_size if plan is None or plan == "all" else plan.block_size
    weighted = form is not None and form.pool != "even"
    group = case.H // case.Hk
    if case.is_causal or (weighted and case.N * case.M > WHOLE**2):
        last = PREFIX if case.is_causal else WHOLE
        inputs = tuple(t[:1, :n, :last] for t, n in zip(inputs, (group, 1, 1), strict=True))
        grad_out = grad_out[:1, :group, :last]
    N, M = inputs[0].shape[2], inputs[1].shape[2]
    nq, nk = -(-N // bq), -(-M // bk)
    batch, head = inputs[0].shape[0] - 1, inputs[0].shape[1] - 1
    key_head = inputs[1].shape[1] - 1
    # Weighted means are those of all queries of a group.
    heads = list(range(head + 1 - group, head + 1)) if weighted else [head]
    if plan == "all":
        dense = torch.ones(len(heads), nq, nk, dtype=torch.bool, device=context.device)
    else:
        if plan is None:
            options = case.selection_options | {"selection": form.selection, "pool": form.pool}
            plan = make_plan(*inputs[:2], **options)
        dense = torch.stack([_dense(plan, batch, h) for h in heads])
    some = list(range(nq)) if case.is_causal or weighted else sorted({0, nq // 2, nq - 1})
    rows = torch.cat([torch.arange(x * bq, min((x + 1) * bq, N)) for x in some]).to(context.device)
    some = torch.tensor(some, device=context.device)

    def sample(t):
        return t[batch, heads].index_select(1, rows)[None]

    masked = torch.zeros_like(grad_out)
    for h in heads:
        masked[batch, h, rows] = grad_out[batch, h, rows]
    # Everything that a pass computes, on the sample: out, dq of its rows, dk and dv of its keys.
    ours = _run(Prepared(prepared.attend, inputs, masked, around=prepared.around), which)
    ours["out"] = sample(ours["out"])
    if which == "backward":
        ours["dq"] = sample(ours["dq"])
        ours |= {n: ours[n][batch, key_head][None, None] for n in ("dk", "dv")}
    key, value = (t[batch, key_head][None, None] for t in inputs[1:])
    part = dense[None, :, some]

    def attend(q, k, v):
        return reference.mra_attention_reference(
            q, k, v, block_size=(bq, bk), coarse=form.coarse, order=form.order,
            is_causal=case.is_causal, plan=part, pool=form.pool,
        )  # fmt: skip

    def refer(dtype):
        tensors = [t.to(dtype) for t in (sample(inputs[0]), key, value)]
        return _run(Prepared(attend, tuple(tensors), sample(masked).to(dtype)), which)

    exact, same = refer(torch.float64), refer(case.torch_dtype)
    errors = {name: _error(ours[name], exact[name]) for name in ours}
    limits = {
        name: _limit(case.torch_dtype, context.device.type, _error(same[name], exact[name]))
        for name in ours
    }
    agreement = None
    if isinstance(prepared.plan, Plan):
        options = {"coarse": form.coarse, "order": form.order, "pool": form.pool}
        mra = mra_attention(*inputs, plan=prepared.plan, **options)
        difference = _error(prepared.forward(), mra)
    if prepared.plan is None:
        agreement = _agreement(case, form, inputs[0][batch, heads], key, dense[-1])
    return Check(errors, limits, agreement, difference)


def _in_blocks(case, prepared):
    """The same without a layout, on tokens in the order of its blocks, and how far its result lies
    from that with a layout."""
    tiles = Tiles.of(case.picture, case.N, case.block_size)
    blocks = tuple(tiles.to_blocks(*prepared.inputs))
    options = case.options(prepared.form) | {"layout": None}
    attend = functools.partial(mra_attention, **options)
    plain = dataclasses.replace(prepared, attend=attend, inputs=blocks)
    (out,) = tiles.to_tokens(plain.forward())
    return plain, _error(prepared.forward(), out)


def _dense(plan, batch, head):
    """bool (nq, nk) of one head; that of all heads is large at large N."""
    names = ("row_start", "row_count", "row_index")
    lists = {n: getattr(plan, n)[batch : batch + 1, head : head + 1] for n in names}
    return dataclasses.replace(plan, **lists).to_dense()[0, 0]


def _run(prepared, which):
    results = {"out": prepared.forward()}
    if which == "backward":
        results |= zip(("dq", "dk", "dv"), prepared.backward(), strict=True)
    return results


def _error(x, exact):
    exact = exact.double()
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def _limit(dtype, device_type, same):
    """The rule of the tests: at most twice the error of PyTorch in the same dtype, and not less
    than half a unit in the last place; float32 products on CUDA are three TF32 ones: 1e-5."""
    floor = 1e-5 if dtype == torch.float32 and device_type == "cuda" else torch.finfo(dtype).eps / 2
    return max(2 * same, floor)


def _agreement(case, form, queries, key, dense):
    """Share of the last head's plan, bool (nq, nk), that the reference selects from float64 scores.

    queries: (heads, N, D), of a group."""
    bq, bk = case.block_size
    queries, key = queries.double()[None], key.double()
    query = queries[:, -1:]
    q_mean, q_count = reference.pool(query, None, bq)
    k_mean, k_count = reference.pool(key, None, bk)
    scores = case.D**-0.5 * q_mean @ k_mean.mT
    if form.pool != "even":
        causal = bq if case.is_causal else None
        *_, bias = reference.centre(form.pool, case.D**-0.5, queries, key, None, None, bk, causal)
        scores = scores + bias.unsqueeze(-2)
    budgets = reference.row_budgets(
        dense.shape, bq, bk, case.density, case.blocks_per_row, case.is_causal
    )
    exact = reference.plan(
        scores, q_count, k_count, budgets, bq, bk, query.shape[2], form.selection,
        case.diagonal_blocks, case.first_blocks, case.is_causal,
    )[0, 0]  # fmt: skip
    return ((exact & dense).sum() / exact.sum().clamp_min(1)).item()
