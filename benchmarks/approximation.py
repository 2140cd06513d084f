"""What a form and its selection make of a case's inputs, beside their time.

Not to be mixed up with check.py: there the result is compared with the same approximation in
float64, here with exact attention.
"""

import dataclasses

import torch
import torch.nn.functional as F

HEADS = 8  # at most that many are looked at, spread over batch and heads
BLOCKS = 3  # query blocks of each


@dataclasses.dataclass(frozen=True)
class Approximation:
    """error: ‖o - exact‖ / ‖exact‖ over the sampled query blocks of a head, mean over sampled
    heads. overlap: share of a query block's key blocks that the next one selects too, mean over
    all; None where no block has a next one."""

    error: float
    overlap: float | None


def approximation(context, prepared):
    """Approximation of an MRA row: a Prepared that selects by itself."""
    case, group = context.case, context.case.H // context.case.Hk
    query, key, value = prepared.inputs
    bq = case.block_size[0]
    blocks = torch.linspace(0, case.nq - 1, min(BLOCKS, case.nq)).long()
    rows = (blocks[:, None] * bq + torch.arange(bq)).flatten()
    rows = rows[rows < case.N].to(context.device)
    mask = None
    if case.is_causal:
        mask = torch.arange(case.M, device=context.device) <= rows[:, None]
    out, errors = prepared.forward(), []
    for at in torch.linspace(0, case.B * case.H - 1, min(HEADS, case.B * case.H)).long().tolist():
        b, h = divmod(at, case.H)
        q, k, v = query[b, h, rows], key[b, h // group], value[b, h // group]
        q, k, v = (t.double()[None, None] for t in (q, k, v))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0]
        errors.append((out[b, h, rows] - exact).norm() / exact.norm())
    plan = context.plan(prepared.form)
    return Approximation(torch.stack(errors).mean().item(), overlap(plan.to_dense()))


def overlap(dense):
    """Mean share of a row's blocks that the next row has too, over rows of dense (..., nq, nk)
    that have any and a next one."""
    row, after = dense[..., :-1, :], dense[..., 1:, :]
    count = row.sum(-1)
    share = ((row & after).sum(-1) / count)[count > 0]
    return share.mean().item() if share.numel() else None
