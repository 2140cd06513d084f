"""Dense MRA attention with more than two resolutions: what ``levels`` means, as code.

The same stages as reference.py, ``pool -> plan -> coarse -> fine``; the first three run once for
every resolution, the coarsest first. Slow and O(N * M) too: specification and oracle.

A cell is a pair of blocks of one resolution. All cells of the coarsest one are candidates; below
it, the children of the cells that were split one resolution up. Of the candidates of a row of
cells the best are split into children; those of ``block_size``, the finest, are exact instead.
A candidate that isn't split is coarse at its own size: every valid key is in one exact or one
coarse cell of a query.
"""

import torch
from torch.nn.functional import pad

from .reference import _moments, _or_ones, _past, coarse, fine, pool, row_budgets, take_best

__all__ = ["mra_attention_levels", "candidates", "plan_level"]

_coarse = coarse  # the option hides this name


def mra_attention_levels(
    query, key, value, key_mask=None, query_mask=None, *, levels=(), density=None,
    blocks_per_row=None, block_size=64, coarse="row", order=1, diagonal_blocks=0, first_blocks=0,
    is_causal=False, scale=None, plan=None, return_lse=False,
):  # fmt: skip
    """Arguments and result as :func:`mra_attention.mra_attention`, selection "row"; ``plan`` is a
    list of bool tensors (B, H, blocks of queries, blocks of keys), one for every resolution, the
    coarsest first: True where a cell is split, and in the last one where it is exact."""
    bq, bk = (block_size, block_size) if isinstance(block_size, int) else block_size
    N, D, M, G = query.shape[2], query.shape[3], key.shape[2], query.shape[1] // key.shape[1]
    s = D**-0.5 if scale is None else scale
    key, value = key.repeat_interleave(G, 1), value.repeat_interleave(G, 1)
    sizes = [(b, b) for b, _ in levels] + [(bq, bk)]
    reach, first = diagonal_blocks // 2 * max(bq, bk), first_blocks * bk  # forced, in tokens
    x = [torch.arange(N, device=query.device) // size[0] for size in sizes]  # row of each query

    split, v_means, logs, moments = None, [], [], []
    for level, size in enumerate(sizes):
        # pool: means over the valid rows of each block of this resolution
        q_mean, q_count = pool(query, query_mask, size[0])
        k_mean, k_count = pool(key, key_mask, size[1])
        v_mean, _ = pool(value, key_mask, size[1])

        # plan: which of its candidates are split, or exact
        L = s * q_mean @ k_mean.mT
        shape, past = L.shape[-2:], _past(L.shape[-2:], *size, is_causal, query.device)
        cells = candidates(split, sizes[level - 1], size, q_count, k_count, N, is_causal)
        if plan is not None:
            split = plan[level]
        else:
            if level < len(levels):
                budget = [levels[level][1]] * shape[0]
            else:
                budget = row_budgets(shape, bq, bk, density, blocks_per_row, is_causal)
            forced = (reach if diagonal_blocks else None, first, level < len(levels))
            split = plan_level(L, cells.expand(L.shape), past, budget, size, *forced)

        # coarse: log weights of the candidates that are not
        left = (past & cells & ~split)[:, :, x[level]]
        logs.append(_coarse(coarse, s, query, k_mean, L, k_count, left, x[level]))
        v_means.append(v_mean)
        if order == 1 and coarse != "none":
            moments.append(_moments(key, value, k_mean, v_mean, k_count, key_mask, size[1], past))

    # fine: one softmax over the keys of exact cells and the coarse cells of all resolutions
    y = torch.arange(M, device=query.device) // bk
    live = split[:, :, x[-1]][..., y] & _or_ones(key_mask, query, M)[:, None, None, :]
    if is_causal:
        live = live & torch.ones(N, M, dtype=torch.bool, device=query.device).tril()
    v_mean, b, valid = torch.cat(v_means, 2), torch.cat(logs, -1), _or_ones(query_mask, query, N)
    out, lse, _ = fine(s, query, key, value, v_mean, live, b, valid)

    # order 1: every resolution has moments and a coarse share of its own
    empty = lse == -torch.inf
    for level, (C, S) in enumerate(moments):
        b = logs[level].masked_fill(empty.unsqueeze(-1), -torch.inf)
        share = (b - lse.masked_fill(empty, 0).unsqueeze(-1)).exp().sum(-1)
        # A row of queries at a time has the same moments: no matrix for each of them.
        q = query.to(C.dtype)
        rows = pad(q, (0, 0, 0, -N % sizes[level][0])).unflatten(2, (C.shape[2], -1))
        u = s * (rows @ C).flatten(2, 3)[:, :, :N]
        t = s * s * ((rows @ S).flatten(2, 3)[:, :, :N] * q).sum(-1)
        out = out + ((share / (1 + t / 4)).unsqueeze(-1) * u).to(out.dtype)
    return (out, lse) if return_lse else out


def candidates(split, parent, size, q_count, k_count, N, is_causal):
    """bool (B, H or 1, nq, nk): cells of blocks of ``size`` (queries, keys) that exist, and whose
    parent is in ``split`` (B, H, rows, columns), cells of blocks of ``parent``, or None."""
    exists = (q_count[:, None, :, None] > 0) & (k_count[:, None, None, :] > 0)
    x = torch.arange(q_count.shape[1], device=q_count.device)
    y = torch.arange(k_count.shape[1], device=q_count.device)
    if is_causal:
        exists = exists & (y * size[1] < ((x + 1) * size[0]).clamp(max=N)[:, None])
    if split is None:
        return exists
    up = [i * b // above for i, b, above in zip((x, y), size, parent, strict=True)]
    return exists & split[:, :, up[0]][..., up[1]]


def plan_level(L, cells, past, budget, size, reach, first, keep_forced):
    """Which candidates ``cells`` (B, H, nq, nk) are split, or exact: bool, shaped as they are.

    Cells that the diagonal crosses (not in ``past``) and forced cells go first, then the higher
    score L, then the lower index. A cell is forced that overlaps its query block widened by
    ``reach`` tokens on each side (None: no such), or holds one of the ``first`` keys.
    budget: cells that each query block may take, a list of nq integers. Cells that the diagonal
    crosses are kept beyond it and, with ``keep_forced``, forced ones too: what is forced below is
    then among the children."""
    x = torch.arange(L.shape[-2], device=L.device)[:, None]
    y = torch.arange(L.shape[-1], device=L.device)[None, :]
    tier = (y * size[1] < first).long().expand(L.shape[-2:])
    if reach is not None:
        near = (y * size[1] < (x + 1) * size[0] + reach) & ((y + 1) * size[1] > x * size[0] - reach)
        tier = tier + near
    tier = torch.where(past, tier, 4).masked_fill(~cells, -1)
    kept = (tier >= (1 if keep_forced else 4)).sum(-1)
    budget = torch.tensor(budget, device=L.device)
    return take_best(L, tier, torch.maximum(budget, kept))
