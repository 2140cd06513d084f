"""Forms that the operator does not have yet, dense, to measure what they would give.

Symbols as in docs/notation.md; docs/accuracy.md derives them. All take query, key, value
(B, H, N, D) without masks and work in their dtype, float32 or wider. Memory is O(N * M).
"""

import math

import torch
from torch.nn.functional import pad

from mra_attention.plan import Plan
from mra_attention.reference import pool, row_budgets

SAMPLE = 14  # queries that "sampled" looks at

__all__ = [
    "centred", "centred_score", "columns", "curved", "mean_query_score", "mean_score",
    "planned", "rows_of_best", "sampled", "true_mass",
]  # fmt: skip


def true_mass(query, key, bq, bk):
    """Share of the mass of query block x that lies in key block y, (B, H, nq, nk): the score that
    block selection wants to know. Costs exact attention."""
    s = query.shape[-1] ** -0.5
    p = (s * query @ key.mT).softmax(-1)
    p = pad(p, (0, -key.shape[2] % bk, 0, -query.shape[2] % bq))
    return p.unflatten(-1, (-1, bk)).sum(-1).unflatten(2, (-1, bq)).sum(3)


def mean_score(query, key, bq, bk):
    """s q~_x . k~_y, (B, H, nq, nk): what the operator selects by with even means."""
    return query.shape[-1] ** -0.5 * pool(query, None, bq)[0] @ pool(key, None, bk)[0].mT


def mean_query_score(query, key, bq, bk):
    """log Σ_{j in y} exp(s q~_x . k_j), (B, H, nq, nk): mean queries, but keys one by one."""
    s = query.shape[-1] ** -0.5
    logits = s * pool(query, None, bq)[0] @ key.mT
    logits = pad(logits, (0, -key.shape[2] % bk), value=-math.inf)
    return logits.unflatten(-1, (-1, bk)).logsumexp(-1)


def centred_score(query, key, bq, bk):
    """s (q~_x - q^/2).k~_y + z_y / 4, (B, H, nq, nk), with z_y the log mass of y at the mean query
    q^: what all queries agree on counts less, since the centred form has it right anyway. What the
    operator selects by with weighted means."""
    s, centre = query.shape[-1] ** -0.5, query.mean(2, keepdim=True)
    z = mean_query_score(centre, key, 1, bk)
    return s * (pool(query, None, bq)[0] - centre / 2) @ pool(key, None, bk)[0].mT + z / 4


def rows_of_best(score, N, M, block_size, density):
    """Plan that takes the best blocks of each row of ``score``, as many as ``density`` allows."""
    bq, bk = block_size
    m = row_budgets(score.shape[-2:], bq, bk, density, None, False)[0]
    best = score.topk(m, -1).indices
    dense = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    return Plan.from_dense(dense, N, M, block_size)


def planned(score, attention, block_size, density, query, key, value):
    """``attention`` on the plan that ``score(query, key, bq, bk)`` makes."""
    sizes = query.shape[2], key.shape[2]
    plan = rows_of_best(score(query, key, *block_size), *sizes, block_size, density)
    return attention(query, key, value, plan=plan)


def curved(query, key, value, plan):
    """:func:`centred` with second-order weights."""
    return centred(query, key, value, plan, weights="curved")


def sampled(query, key, value, plan):
    """:func:`centred` with weights from a sample of the queries."""
    return centred(query, key, value, plan, weights="sampled")


def columns(query, key, value, plan):
    """:func:`centred` with the attention map's own column sums as weights: what the best weights
    would give. Costs exact attention."""
    return centred(query, key, value, plan, weights="columns")


def centred(query, key, value, plan, weights="mean"):
    """Row form and order 1 with block means taken as the mean query q^ weighs the keys.

    Within block y, π_j = softmax of l_j = s q^.k_j, or of other log ``weights``; k^_y = Σ π_j k_j
    and v^_y = Σ π_j v_j. Block y weighs ``exp(a_y + s q_i.k^_y) (1 + γ_i t_i / 2)`` with
    a_y = -Σ π_j log π_j, on ``v^_y + γ_i s (q_i - q^) C``. C and Σ are the moments under π, mean
    over the keys; t_i = s² (q_i - q^) Σ (q_i - q^)' and γ_i = 1 / (1 + t_i / 4). With 0 for q^ and
    without the factor (1 + γ_i t_i / 2) it is the operator's ``coarse="row", order=1``."""
    s, bk, M = query.shape[-1] ** -0.5, plan.block_size[1], key.shape[2]
    centre = query.mean(2, keepdim=True)
    away = query - centre

    # pool: means under π, and moments
    log_weight = LOG_WEIGHTS[weights](query, key, centre, s)
    log_pi = pad(log_weight, (0, -M % bk), value=-math.inf).unflatten(-1, (-1, bk)).log_softmax(-1)
    pi = log_pi.exp().unsqueeze(-1)
    k, v = (pad(t, (0, 0, 0, -M % bk)).unflatten(2, (-1, bk)) for t in (key, value))
    k_mean, v_mean = (pi * k).sum(3), (pi * v).sum(3)
    entropy = -(pi.squeeze(-1) * log_pi.clamp(min=-1e4)).sum(-1)
    k, v = k - k_mean.unsqueeze(3), v - v_mean.unsqueeze(3)
    share = (log_pi > -math.inf).sum(-1)[..., None, None] / M  # of all keys, in each block
    C, S = ((share * (k.mT @ (pi * t))).sum(2) for t in (v, k))

    # coarse: log weights; fine: exact logits, and one softmax
    t = s * s * ((away @ S) * away).sum(-1, keepdim=True)
    damping = 1 / (1 + t / 4)
    b = entropy.unsqueeze(2) + s * query @ k_mean.mT + torch.log1p(t / 2 * damping)
    x = torch.arange(query.shape[2], device=query.device) // plan.block_size[0]
    y = torch.arange(M, device=query.device) // bk
    chosen = plan.to_dense()[:, :, x]
    logits = torch.cat([
        (s * query @ key.mT).masked_fill(~chosen[..., y], -math.inf),
        b.masked_fill(chosen, -math.inf),
    ], -1)  # fmt: skip
    p, w = logits.softmax(-1).split([M, b.shape[-1]], -1)
    return p @ value + w @ v_mean + w.sum(-1, keepdim=True) * damping * s * (away @ C)


def _mean_weights(query, key, centre, s):
    return (s * centre @ key.mT).squeeze(2)


def _curved_weights(query, key, centre, s):
    """Mean of exp(s q.k_j) over the queries, to second order about their mean: with their
    covariance Σ_q and keys about their own mean, (1 + s² k_j Σ_q k_j' / 2) exp(s q^.k_j)."""
    away, far = query - centre, key - key.mean(2, keepdim=True)
    spread = away.mT @ away / query.shape[2]
    factor = torch.log1p(s * s / 2 * ((far @ spread) * far).sum(-1))
    return _mean_weights(query, key, centre, s) + factor


def _sampled_weights(query, key, centre, s):
    """Column sums of SAMPLE rows of the map, evenly spread, and of the mean query's row, which
    counts as a quarter of them."""
    N = query.shape[2]
    at = (2 * torch.arange(SAMPLE, device=query.device) + 1) * N // (2 * SAMPLE)
    p = (s * torch.cat([query[:, :, at], centre], 2) @ key.mT).softmax(-1)
    p[:, :, -1] *= SAMPLE / 4
    return p.sum(2).clamp(min=1e-30).log()


def _column_weights(query, key, centre, s):
    return (s * query @ key.mT).log_softmax(-1).logsumexp(2)


LOG_WEIGHTS = {
    "mean": _mean_weights,
    "curved": _curved_weights,
    "sampled": _sampled_weights,
    "columns": _column_weights,
}
