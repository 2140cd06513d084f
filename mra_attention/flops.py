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

With pool "centred" and "sampled" the stage pool takes more, per key head: weights, 2 D M or
30 D M (in the operator plan too), and weighted means of keys and values, 3 D M; in the backward
pass 2 D M for these and 8 D M for the weights.

With ``levels`` plan and coarse count the candidates and the coarse cells of every resolution, and
order 1 once for each.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _load
from .reference import row_budgets

__all__ = ["exact_pairs", "rows_of_blocks", "stage_flops"]

WEIGHTS = {"even": 0, "centred": 2, "sampled": 30}  # over D M, of weighing the keys


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


def rows_of_levels(N, M, bq, bk, density, blocks_per_row, is_causal, levels):
    """Of every resolution, that of ``block_size`` first: (its block of keys, [(queries, chosen
    cells, candidates)] of each of its query blocks), every cell existing that can."""
    found = []
    for block, cells in levels:
        rows = rows_of_blocks(N, M, block, block, None, cells, is_causal)
        found.insert(0, (block, _children(rows, block, block, *found[:1])))
    rows = rows_of_blocks(N, M, bq, bk, density, blocks_per_row, is_causal)
    return [(bk, _children(rows, bq, bk, *found[:1])), *found]


def _children(rows, bq, bk, parents=None):
    if parents is None:
        return rows
    block, above = parents
    room = [taken * (block // bk) for _, taken, _ in above]
    cells = [min(seen, room[x * bq // block]) for x, (_, _, seen) in enumerate(rows)]
    return [(n, min(taken, c), c) for (n, taken, _), c in zip(rows, cells, strict=True)]


def exact_pairs(rows, M, bk):
    """(query, key) pairs of one head inside selected pairs of blocks; a pair of blocks that the
    diagonal crosses counts whole."""
    return sum(queries * min(taken * bk, M) for queries, taken, _ in rows)


def stage_flops(B, H, Hk, N, M, D, rows, bk, coarse, order, which, coarser=(),
                pool="even"):  # fmt: skip
    """Operations by stage: a dict. ``rows`` as :func:`rows_of_blocks` gives them; ``which``:
    "forward" or "backward", the latter without the forward; ``coarser``: the rows of coarser
    resolutions, a list each."""
    heads, key_heads, forward = B * H, B * Hk, which == "forward"
    every = [row for of_one in (rows, *coarser) for row in of_one]
    row_coarse = sum(queries * (seen - taken) for queries, taken, seen in every)
    block_coarse = sum(seen - taken for _, taken, seen in every)
    stages = {"pool": key_heads * 2 * D * M + (heads * D * N if forward else 0)}
    if pool != "even":
        stages["pool"] += key_heads * D * M * (WEIGHTS[pool] + 3 if forward else 10)
    stages["plan"] = heads * 2 * D * sum(seen for _, _, seen in every) if forward else 0
    if coarse == "row":
        each = (4 if forward else 10) * D * row_coarse
    elif coarse == "block":
        rows_twice = 2 * D * N * (1 + len(coarser))
        each = 2 * D * block_coarse if forward else 10 * D * block_coarse + rows_twice
    else:
        each = 0
    stages["coarse"] = heads * each
    stages["fine"] = heads * (4 if forward else 10) * D * exact_pairs(rows, M, bk)
    stages["order1"] = 0
    if order == 1 and coarse != "none":
        per_query, per_key = (4, 4) if forward else (8, 6)
        once = D * D * (heads * per_query * N + key_heads * per_key * M)
        stages["order1"] = once * (1 + len(coarser))
    return stages


def _pairs(levels):
    """levels as the operators take them, as pairs."""
    levels = levels or ()
    return list(zip(levels[::2], levels[1::2], strict=True))


def _total(query, key, index, blocks_per_row, density, bq, bk, coarse, order, is_causal, levels,
           pool, which):  # fmt: skip
    (B, H, N, D), (_, Hk, M, _) = query, key
    if index is None and blocks_per_row is None:
        if len(density) > 1:  # all stages are linear in the heads
            each = [_total(query, key, None, None, [x], bq, bk, coarse, order, is_causal, levels,
                           pool, which) for x in density]  # fmt: skip
            return sum(each) // H
        density = density[0]
    levels = _pairs(levels)
    if index is not None:  # a plan that is there counts by the room of its lists
        cells = sum(-(-N // block) * min(-(-M // block), cells) for block, cells in levels)
        blocks_per_row, density = max(1, (index[2] - cells) // -(-N // bq)), None
    sizes = (N, M, bq, bk, density, blocks_per_row, is_causal)
    (_, rows), *coarser = rows_of_levels(*sizes, levels)
    coarser = [rows for _, rows in coarser]
    stages = stage_flops(B, H, Hk, N, M, D, rows, bk, coarse, order, which, coarser, pool)
    if index is not None and which == "forward":
        del stages["plan"]
    return sum(stages.values())


def _register():
    """Formulas of the operators, by whose names FlopCounterMode shows them."""
    ops = torch.ops.mra_attention

    @register_flop_formula(ops.plan)
    def plan(query, key, key_mask, query_mask, blocks_per_row, density, bq, bk, selection,
             diagonal_blocks, first_blocks, is_causal, scale, levels=None, pool="even",
             out_shape=None):  # fmt: skip
        (B, H, N, D), (_, Hk, M, _) = query, key
        levels = _pairs(levels)
        # Candidates, whatever is taken of them; with levels there is one density.
        density = None if density is None else density[0]
        found = rows_of_levels(N, M, bq, bk, density, blocks_per_row, is_causal, levels)
        pairs = sum(seen for _, rows in found for _, _, seen in rows)
        return B * D * (H * N + Hk * M * (1 + WEIGHTS[pool]) + 2 * H * pairs)

    @register_flop_formula(ops.forward)
    def forward(query, key, value, key_mask, query_mask, row_start, row_count, row_index,
                blocks_per_row, density, bq, bk, coarse, order, selection, diagonal_blocks,
                first_blocks, is_causal, scale, levels=None, pool="even", keep=True,
                out_shape=None):  # fmt: skip
        return _total(query, key, row_index, blocks_per_row, density, bq, bk, coarse, order,
                      is_causal, levels, pool, "forward")  # fmt: skip

    @register_flop_formula(ops.backward)
    def backward(grad_out, grad_lse, query, key, value, key_mask, query_mask, out, lse,
                 coarse_share, row_start, row_count, row_index, bq, bk, coarse, order, is_causal,
                 *rest, levels=None, pool="even", out_shape=None):  # fmt: skip
        # behind scale and nine tensors that forward kept
        levels, pool = (*rest[10:], *(levels, pool)[len(rest[10:]) :])
        return _total(query, key, row_index, None, None, bq, bk, coarse, order, is_causal, levels,
                      pool, "backward")  # fmt: skip


if _load.extension is not None:
    _register()
