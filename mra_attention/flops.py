"""Operations of MRA attention, from shapes alone; what ``torch.utils.flop_counter`` counts.

Counted from the mathematics, not from an implementation: a multiplication and the addition of its
result are two operations, work done twice counts once. ``P`` is the number of exact (query, key)
pairs of a head, ``Q`` that of its unselected (query, key block) pairs and ``R`` that of its
unselected (query block, key block) pairs. Per query head, or key head where marked k:

    stage     forward                                backward
    pool      D N, 2 D M k                           2 D M k
    plan      2 D (existing pairs of blocks)         nothing: the selection is a constant
    fine      4 D P                                  10 D P
    coarse    row: 4 D Q; block: 2 D R (its scores   row: 10 D Q; block: 10 D R + 2 D N
              are the plan's)
    order 1   4 D² M k (C, Sigma) + 4 D² N (q C,     8 D² N (dq, dC, dSigma) + 6 D² M k
              q Sigma q)
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _load
from .reference import row_budgets

__all__ = ["exact_pairs", "rows_of_blocks", "stage_flops"]


def rows_of_blocks(N, M, bq, bk, density, blocks_per_row, is_causal):
    """[(queries, exact key blocks, existing key blocks)] of each query block of a head."""
    shape = nq, nk = -(-N // bq), -(-M // bk)
    taken = row_budgets(shape, bq, bk, density, blocks_per_row, is_causal)
    seen = row_budgets(shape, bq, bk, 1.0, None, is_causal)
    rows = []
    for x in range(nq):
        crossing = seen[x] - min(seen[x], x * bq // bk) if is_causal else 0
        rows.append((min(bq, N - x * bq), max(taken[x], crossing), seen[x]))
    return rows


def exact_pairs(rows, M, bk):
    """(query, key) pairs of one head inside selected pairs of blocks; a pair of blocks that the
    diagonal crosses counts whole."""
    return sum(queries * min(taken * bk, M) for queries, taken, _ in rows)


def stage_flops(B, H, Hk, N, M, D, rows, bk, coarse, order, which):
    """Operations by stage: a dict. ``rows`` as :func:`rows_of_blocks` gives them; ``which``:
    "forward" or "backward", the latter without the forward."""
    heads, key_heads, forward = B * H, B * Hk, which == "forward"
    row_coarse = sum(queries * (seen - taken) for queries, taken, seen in rows)
    block_coarse = sum(seen - taken for _, taken, seen in rows)
    stages = {"pool": key_heads * 2 * D * M + (heads * D * N if forward else 0)}
    stages["plan"] = heads * 2 * D * sum(seen for _, _, seen in rows) if forward else 0
    if coarse == "row":
        each = (4 if forward else 10) * D * row_coarse
    elif coarse == "block":
        each = 2 * D * block_coarse if forward else 10 * D * block_coarse + 2 * D * N
    else:
        each = 0
    stages["coarse"] = heads * each
    stages["fine"] = heads * (4 if forward else 10) * D * exact_pairs(rows, M, bk)
    stages["order1"] = 0
    if order == 1 and coarse != "none":
        per_query, per_key = (4, 4) if forward else (8, 6)
        stages["order1"] = D * D * (heads * per_query * N + key_heads * per_key * M)
    return stages


def _total(query, key, index, blocks_per_row, density, bq, bk, coarse, order, is_causal, which):
    (B, H, N, D), (_, Hk, M, _) = query, key
    if index is not None:  # a plan that is there counts by the room of its lists
        blocks_per_row, density = max(1, index[2] // -(-N // bq)), None
    rows = rows_of_blocks(N, M, bq, bk, density, blocks_per_row, is_causal)
    stages = stage_flops(B, H, Hk, N, M, D, rows, bk, coarse, order, which)
    if index is not None and which == "forward":
        del stages["plan"]
    return sum(stages.values())


def _register():
    """Formulas of the operators, by whose names FlopCounterMode shows them."""
    ops = torch.ops.mra_attention

    @register_flop_formula(ops.plan)
    def plan(query, key, key_mask, query_mask, blocks_per_row, density, bq, bk, selection,
             diagonal_blocks, first_blocks, is_causal, scale, out_shape=None):  # fmt: skip
        (B, H, N, D), (_, Hk, M, _) = query, key
        rows = rows_of_blocks(N, M, bq, bk, density, blocks_per_row, is_causal)
        return B * D * (H * N + Hk * M + 2 * H * sum(seen for _, _, seen in rows))

    @register_flop_formula(ops.forward)
    def forward(query, key, value, key_mask, query_mask, row_start, row_count, row_index,
                blocks_per_row, density, bq, bk, coarse, order, selection, diagonal_blocks,
                first_blocks, is_causal, scale, out_shape=None):  # fmt: skip
        return _total(query, key, row_index, blocks_per_row, density, bq, bk, coarse, order,
                      is_causal, "forward")  # fmt: skip

    @register_flop_formula(ops.backward)
    def backward(grad_out, grad_lse, query, key, value, key_mask, query_mask, out, lse,
                 coarse_share, row_start, row_count, row_index, bq, bk, coarse, order, is_causal,
                 *rest, out_shape=None):  # fmt: skip
        return _total(query, key, row_index, None, None, bq, bk, coarse, order, is_causal,
                      "backward")  # fmt: skip


if _load.extension is not None:
    _register()
