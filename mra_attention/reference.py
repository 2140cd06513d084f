"""Dense MRA attention in plain PyTorch: the specification, and the oracle of every test.

Reads in the order of the data: ``pool -> plan -> coarse -> fine``. Any floating dtype, clean in
float64, differentiable by autograd. Memory is O(N * M): use it to check, not to compute.

Symbols as in docs/notation.md: B batch, H query heads, Hk key heads, N queries, M keys, D head_dim,
``bq``/``bk`` block sizes, ``nq = ceil(N / bq)``, ``nk = ceil(M / bk)``.
"""

import math

import torch
from torch.nn.functional import pad

from .config import resolve_pool
from .layout import tile_shape

__all__ = ["mra_attention_reference", "patches", "pool", "centre", "plan", "coarse", "fine",
           "row_budgets"]  # fmt: skip

SAMPLED_QUERIES = 14  # whose attention gives the weights of pool="sampled"


def mra_attention_reference(
    query, key, value, key_mask=None, query_mask=None, *, density=None, blocks_per_row=None,
    block_size=64, coarse="row", order=1, selection="row", diagonal_blocks=0, first_blocks=0,
    layout=None, is_causal=False, scale=None, plan=None, return_lse=False, levels=(),
    pool="auto",
):  # fmt: skip
    """MRA attention, dense. Arguments and result as :func:`mra_attention.mra_attention`, except
    that ``plan`` is a bool tensor (B, H, nq, nk), True where a pair of blocks is exact. With
    ``levels`` see reference_levels.py, where ``plan`` is a list of them."""
    bq, bk = (block_size, block_size) if isinstance(block_size, int) else block_size
    pool = resolve_pool(pool, coarse, order, levels)
    if layout is not None:
        key_mask, query_mask = (_or_ones(m, query, query.shape[2]) for m in (key_mask, query_mask))
        sizes = (bq, bk, *(block for block, _ in levels))
        at, length = patches(layout, query.shape[2], sizes, query.device)
        out, lse = mra_attention_reference(
            *(_put(x, 2, at, length) for x in (query, key, value)),
            *(_put(mask, 1, at, length) for mask in (key_mask, query_mask)),
            density=density, blocks_per_row=blocks_per_row, block_size=block_size, coarse=coarse,
            order=order, selection=selection, diagonal_blocks=diagonal_blocks,
            first_blocks=first_blocks, scale=scale, plan=plan, return_lse=True, levels=levels,
            pool=pool,
        )  # fmt: skip
        out, lse = out[:, :, at], lse[:, :, at]
        return (out, lse) if return_lse else out
    if pool != "even" and (coarse != "row" or levels or (is_causal and pool == "sampled")):
        raise ValueError(
            f"pool: got {pool!r}, expected 'even' unless coarse is 'row', without levels; "
            "under causal 'even' or 'centred'"
        )
    if levels:
        if selection != "row":
            raise ValueError(f"levels: got selection={selection!r}, expected 'row' beside levels")
        from .reference_levels import mra_attention_levels

        return mra_attention_levels(
            query, key, value, key_mask, query_mask, levels=levels, density=density,
            blocks_per_row=blocks_per_row, block_size=block_size, coarse=coarse, order=order,
            diagonal_blocks=diagonal_blocks, first_blocks=first_blocks, is_causal=is_causal,
            scale=scale, plan=plan, return_lse=return_lse,
        )  # fmt: skip
    N, D, M, G = query.shape[2], query.shape[3], key.shape[2], query.shape[1] // key.shape[1]
    s = D**-0.5 if scale is None else scale
    weights = log_mass = None
    if pool != "even":
        weighed = centre(pool, s, query, key, query_mask, key_mask, bk, bq if is_causal else None)
        centre_, weights, log_mass, bias = (x.repeat_interleave(G, 1) for x in weighed)
    key, value = key.repeat_interleave(G, 1), value.repeat_interleave(G, 1)

    # pool: means over the valid rows of each block
    q_mean, q_count = _pool(query, query_mask, bq)
    k_mean, k_count = _pool(key, key_mask, bk)
    v_mean, _ = _pool(value, key_mask, bk)

    # plan: which pairs of blocks are exact
    L = s * q_mean @ k_mean.mT
    if plan is None:
        score = L if weights is None else L + bias.unsqueeze(-2)
        m = head_budgets(L.shape[-2:], bq, bk, density, blocks_per_row, is_causal)
        forced = (diagonal_blocks, first_blocks, is_causal)
        plan = _plan(score, q_count, k_count, m, bq, bk, N, selection, *forced)
    x = torch.arange(N, device=query.device) // bq  # block of each query
    y = torch.arange(M, device=query.device) // bk  # block of each key
    past = _past(L.shape[-2:], bq, bk, is_causal, query.device)

    # pool, weighted: selection is done with the plain means, and a bias of each key block
    if weights is not None:
        k_mean, v_mean = (_weighted(t, key_mask, weights) for t in (key, value))

    # coarse: log weights of the blocks that are not exact, (B, H, N, nk)
    b = _coarse(coarse, s, query, k_mean, L, k_count, (past & ~plan)[:, :, x], x, log_mass)

    # order 1: what a block mean throws away, damped
    if order == 1 and coarse != "none":
        C, S = _moments(key, value, k_mean, v_mean, k_count, key_mask, bk, past, weights)
        q = pad(query.to(C.dtype), (0, 0, 0, -N % bq)).unflatten(2, (-1, bq))  # (B, H, nq, bq, D)
        if weights is not None:
            q = q - (centre_ if is_causal else centre_.unsqueeze(-2)).unsqueeze(-2)
        u, t = s * q @ C, s * s * ((q @ S) * q).sum(-1)
        u, t = (z.flatten(2, 3)[:, :, :N] for z in (u, t))
        if weights is not None:  # of the mass too: 1 + gamma t / 2, for any t
            b = b + torch.log(3 - 2 / (1 + t / 4)).unsqueeze(-1)

    # fine: log weights of the keys of the exact blocks, (B, H, N, M); one softmax over both
    live = plan[:, :, x][..., y] & _or_ones(key_mask, query, M)[:, None, None, :]
    if is_causal:
        live = live & torch.ones(N, M, dtype=torch.bool, device=query.device).tril()
    out, lse, share = fine(s, query, key, value, v_mean, live, b, _or_ones(query_mask, query, N))
    if order == 1 and coarse != "none":
        out = out + ((share / (1 + t / 4)).unsqueeze(-1) * u).to(out.dtype)
    return (out, lse) if return_lse else out


def patches(layout, N, block_size, device=None):
    """Where each of N tokens of a layout stands when blocks are patches: the place of each, (N,),
    and the number of places. Places without a token are masked. See :mod:`mra_attention.layout`.

    block_size: all sizes of blocks."""
    shapes = [tile_shape(layout, size) for size in sorted(set(block_size), reverse=True)]
    at = torch.cartesian_prod(*(torch.arange(n) for n in layout)).unbind(-1)  # in its box
    sides, last = [torch.full_like(at[0], n) for n in layout], len(layout) - 1
    keys = []  # tokens are in the order of the first, among equals in that of the next, ...
    if len(shapes) > 1:
        whole = [n // edge * edge for n, edge in zip(layout, shapes[0], strict=True)]
        keys = [c >= w for c, w in zip(at, whole, strict=True)]
        at = [c - w * rest for c, w, rest in zip(at, whole, keys, strict=True)]
        sides = [
            torch.where(rest, n - w, w) for n, w, rest in zip(layout, whole, keys, strict=True)
        ]
    for shape in shapes:
        within, turns = [], torch.zeros_like(at[0])
        for c, n, edge in zip(at, sides, shape, strict=True):
            c = torch.where(turns % 2 == 1, n - 1 - c, c)  # runs backwards
            if len(within) == last:
                keys.append(c // edge)
                within.append((c % edge, torch.minimum(n - c // edge * edge, torch.tensor(edge))))
                continue
            count = ((2 * n + edge) // (2 * edge)).clamp(min=1)
            size, lower = n // count, count - n % count
            strip = torch.where(
                c < lower * size, c // size, lower + (c - lower * size) // (size + 1)
            )
            start = strip * size + (strip - lower).clamp(min=0)
            turns = turns * count + strip
            keys.append(strip)
            within.append((c - start, size + (strip >= lower)))
        at, sides = zip(*within, strict=True)
    order = torch.arange(len(keys[0]))
    for key in reversed([*keys, at[last], *at[:last]]):
        order = order[key[order].sort(stable=True).indices]
    lead, block = N - len(order), max(block_size)
    front = -(-lead // block) * block
    place = torch.empty_like(order)
    place[order] = front + torch.arange(len(order))
    return torch.cat([torch.arange(lead), place]).to(device), front + len(order)


def _put(x, dim, at, length):
    size = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
    return x.new_zeros(size).index_copy(dim, at, x)


def pool(x, mask, block):
    """Means over the valid rows of each block. x (B, H, L, D), mask (B, L) or None.

    Returns mean (B, H, n, D), float32 or wider, zeros for an empty block, and count (B, n)."""
    B, H, L, D = x.shape
    n, tail = -(-L // block), -L % block
    ones = pad(_or_ones(mask, x, L), (0, tail)).view(B, 1, n, block, 1)
    x = pad(x.to(_acc(x)), (0, 0, 0, tail)).view(B, H, n, block, D)
    count = ones.sum(-2)
    mean = x.masked_fill(~ones, 0).sum(-2) / count.clamp(min=1)
    return mean, count.view(B, n)


def centre(form, s, query, key, query_mask, key_mask, bk, causal=None):
    """What pool "centred" and "sampled" weigh keys by: the mean query of each key head
    (B, Hk, D), the weight of each key within its block (B, Hk, nk, bk), zeros where masked, the
    entropy of each block's weights (B, Hk, nk), and what selection adds to the scores of each block
    (B, Hk, nk), 0 for an empty one. The last is a constant for the gradient.

    Log weights: centred ``l_j = s q_mean . k_j``, the first-order exact mass at the mean query;
    sampled ``l_j = log(sum_i p_ij + r/4 p_mean,j)``, p the softmax over all keys of r queries
    (see :func:`sample`) and of the mean query. The gradient takes the latter for the former, up to
    a constant: what few queries are sampled should not be trained alone.

    causal: under causal the size of query blocks. The first result then is the mean of the queries
    before each block of queries, (B, Hk, nq, D), and a block of keys is weighed by that of the
    first block of queries that sees it (or, where none does, of all queries).

    The bias is ``1/4 logsumexp_j l_j`` less half the mean of l_j, of the centred l_j for both
    forms: a pair then scores ``s (q_mean_x - q_mean / 2) . k_mean_y`` plus a quarter of the block's
    log mass at the mean query. What all queries agree on counts less, as the weights have it right
    anyway."""
    B, _, N, D = query.shape
    Hk, M = key.shape[1:3]
    acc, G = _acc(query), query.shape[1] // Hk
    valid = _or_ones(query_mask, query, N)
    keys_valid = _or_ones(key_mask, key, M)[:, None]
    q = query.to(acc).masked_fill(~valid[:, None, :, None], 0).reshape(B, Hk, G * N, D)
    mean = q.sum(-2) / (G * valid.sum(-1)).clamp(min=1)[:, None, None]
    k = key.to(acc).masked_fill(~keys_valid.unsqueeze(-1), 0)
    if causal:
        ends = (torch.arange(M, device=key.device) // bk + 1) * bk  # of the block of each key
        of_key = _means_before(q, valid, -(-ends // causal) * causal)
        mean = _means_before(q, valid, torch.arange(0, N, causal, device=key.device))
        at_mean = log_weight = s * (k * of_key).sum(-1)
    else:
        at_mean = log_weight = s * (k @ mean.unsqueeze(-1)).squeeze(-1)
    if form == "sampled":
        with torch.no_grad():
            at, taken = sample(valid, G)
            rows = q.gather(2, at[:, None, :, None].expand(-1, Hk, -1, D))
            a = s * torch.cat([rows, mean.unsqueeze(-2)], -2) @ k.mT
            a = a.masked_fill(~keys_valid.unsqueeze(-2), -math.inf).log_softmax(-1)
            count = taken.sum(-1, keepdim=True).clamp(min=1)
            shares = torch.cat([torch.where(taken, 1.0, 0.0).to(acc), count / 4], -1).log()
            log_weight = (a + shares[:, None, :, None]).logsumexp(-2)
        log_weight = log_weight + (at_mean - at_mean.detach())
    keys_valid, log_weight, at_mean = (
        pad(x, (0, -M % bk)).unflatten(-1, (-1, bk)) for x in (keys_valid, log_weight, at_mean)
    )
    some = keys_valid.any(-1, keepdim=True)
    log_weight = log_weight.masked_fill(~keys_valid, -math.inf).masked_fill(~some, 0)
    log_weight = log_weight.log_softmax(-1).masked_fill(~keys_valid, 0)
    weights = log_weight.exp().masked_fill(~keys_valid, 0)
    entropy = -(weights * log_weight).sum(-1)
    with torch.no_grad():
        mean_logit = at_mean.masked_fill(~keys_valid, 0).sum(-1) / keys_valid.sum(-1).clamp(min=1)
        bias = at_mean.masked_fill(~keys_valid, -math.inf).logsumexp(-1) / 4 - mean_logit / 2
        bias = bias.masked_fill(~some.squeeze(-1), 0)
    return mean, weights, entropy, bias


def _means_before(q, valid, ends):
    """Means of a group's valid queries (B, Hk, G * N, D), zeros elsewhere, before each of ``ends``
    (n,) positions: (B, Hk, n, D)."""
    N = valid.shape[1]
    sums = q.unflatten(2, (-1, N)).sum(2).cumsum(2)
    counts = q.shape[2] // N * valid.cumsum(1)
    at = ends.clamp(max=N)
    sums, counts = pad(sums, (0, 0, 1, 0))[:, :, at], pad(counts, (1, 0))[:, at]
    return sums / counts.clamp(min=1)[:, None, :, None]


def sample(valid, G):
    """The queries of pool="sampled", evenly spread among the valid ones of a group of G heads, one
    head after another: places (B, r) among the group's G * N queries, and which of them there are
    (fewer than r valid queries: all)."""
    N, r = valid.shape[1], SAMPLED_QUERIES
    n = valid.sum(-1, keepdim=True)
    first = valid.int().sort(dim=-1, descending=True, stable=True).indices  # valid ones first
    t = torch.arange(r, device=valid.device)
    rank = torch.where(G * n > r, (2 * t + 1) * (G * n) // (2 * r), t)
    head = (rank // n.clamp(min=1)).clamp(max=G - 1)
    return head * N + first.gather(1, rank % n.clamp(min=1)), rank < G * n


def _weighted(x, mask, weights):
    """Means of blocks with these weights (B, H, nk, bk) of x (B, H, M, D): (B, H, nk, D)."""
    x = x.to(_acc(x)).masked_fill(~_or_ones(mask, x, x.shape[2])[:, None, :, None], 0)
    x = pad(x, (0, 0, 0, -x.shape[2] % weights.shape[-1])).unflatten(2, weights.shape[2:])
    return (weights.unsqueeze(-2) @ x).squeeze(-2)


def row_budgets(nq_nk, bq, bk, density, blocks_per_row, is_causal):
    """Blocks that each query block may take: a list of nq integers, from shapes alone."""
    nq, nk = nq_nk
    seen = [min(nk, (x * bq + bq - 1) // bk + 1) if is_causal else nk for x in range(nq)]
    if blocks_per_row is not None:
        return [min(blocks_per_row, n) for n in seen]
    density = 1 / 8 if density is None else density
    return [min(n, max(1, math.ceil(density * n))) for n in seen]


def head_budgets(nq_nk, bq, bk, density, blocks_per_row, is_causal):
    """The same by head where density is a sequence, one for each: H lists instead of one."""
    if not isinstance(density, (tuple, list)):
        return row_budgets(nq_nk, bq, bk, density, blocks_per_row, is_causal)
    return [row_budgets(nq_nk, bq, bk, each, None, is_causal) for each in density]


def plan(L, q_count, k_count, m, bq, bk, N, selection, diagonal_blocks, first_blocks, is_causal):
    """Selection from the scores L (B, H, nq, nk): bool (B, H, nq, nk), True = exact.

    Order of choice: pairs that the diagonal crosses, then pairs that meet more of the forcing
    conditions, then the higher score, then the lower index."""
    B, H, nq, nk = L.shape
    x = torch.arange(nq, device=L.device)[:, None]
    y = torch.arange(nk, device=L.device)[None, :]
    exists = (q_count[:, None, :, None] > 0) & (k_count[:, None, None, :] > 0)
    tier = torch.zeros(nq, nk, dtype=torch.long, device=L.device)
    if diagonal_blocks > 0:
        reach = diagonal_blocks // 2 * max(bq, bk)
        tier += (y * bk < (x + 1) * bq + reach) & ((y + 1) * bk > x * bq - reach)
    tier += y < first_blocks
    if selection == "global":
        tier += x < first_blocks
    crossing = torch.zeros_like(exists)
    if is_causal:
        exists = exists & (y * bk <= torch.clamp((x + 1) * bq, max=N) - 1)
        crossing = exists & ~_past((nq, nk), bq, bk, True, L.device)
    tier = torch.where(crossing, 4, tier).masked_fill(~exists, -1).expand(B, H, nq, nk)
    m = torch.tensor(m, device=L.device)
    if selection == "global":
        best = L.masked_fill(~exists, -math.inf).amax(-1, keepdim=True)
        L = L - best.clamp(min=torch.finfo(L.dtype).min)
        L, tier, m, crossing = L.flatten(2), tier.flatten(2), m.sum(), crossing.flatten(2)
    return take_best(L, tier, torch.maximum(m, crossing.sum(-1))).view(B, H, nq, nk)


def take_best(L, tier, budget):
    """bool, shaped as L (..., n): of the entries with tier >= 0 the first ``budget`` (...), by
    higher tier, then higher score L, then lower index."""
    order = L.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(
        -1, tier.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    )
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(L.shape[-1], device=L.device).expand_as(order)
    )
    return (rank < budget.unsqueeze(-1)) & (tier >= 0)


def coarse(form, s, query, k_mean, L, k_count, unselected, x, log_mass=None):
    """Log weight of each unselected block for each query, (B, H, N, nk): ``log c_y`` plus
    ``L_xy`` (form "block", MRA-2) or ``s q_i . k_mean_y`` (form "row"); -inf where it has none.
    ``log_mass`` (B, H, nk) takes the place of ``log c_y``: the entropy of weighted means."""
    if form == "block":
        b = L[:, :, x]
    else:
        b = (s * query @ k_mean.mT.to(query.dtype)).to(L.dtype)
    live = unselected & (k_count > 0)[:, None, None, :] & (form != "none")
    if log_mass is None:
        log_mass = k_count.clamp(min=1).to(L.dtype).log()[:, None]
    b = b + log_mass.unsqueeze(-2)
    return b.masked_fill(~live, -math.inf)


def fine(s, query, key, value, v_mean, live, b, query_mask):
    """One softmax over exact keys and coarse blocks. Returns out (B, H, N, D), lse (B, H, N) and
    the coarse share of each row's mass (B, H, N); a row without weight: zeros, -inf and zeros."""
    a = (s * query @ key.mT).to(b.dtype).masked_fill(~live, -math.inf)
    logits = torch.cat([a, b], -1).masked_fill(~query_mask[:, None, :, None], -math.inf)
    empty = (logits == -math.inf).all(-1)
    lse = logits.masked_fill(empty.unsqueeze(-1), 0).logsumexp(-1).masked_fill(empty, -math.inf)
    p = (logits - lse.masked_fill(empty, 0).unsqueeze(-1)).exp()
    p, w = p.split([key.shape[2], v_mean.shape[2]], -1)
    out = p.to(value.dtype) @ value + w.to(value.dtype) @ v_mean.to(value.dtype)
    return out, lse, w.sum(-1)


def _moments(key, value, k_mean, v_mean, k_count, key_mask, bk, past, weights=None):
    """C and Sigma of each query block, (B, H, nq, D, D): within-block cross moments of key and
    value, and of key with itself, averaged over the valid keys of the blocks that it may see, or
    with ``weights`` within a block, each block counting by its valid keys."""
    B, H, M, D = key.shape
    valid = pad(_or_ones(key_mask, key, M), (0, -M % bk)).view(B, 1, -1, bk, 1)

    def centred(t, mean):
        t = pad(t.to(mean.dtype), (0, 0, 0, -M % bk)).view(B, H, -1, bk, D)
        return (t - mean.unsqueeze(-2)).masked_fill(~valid, 0)

    k, v = centred(key, k_mean), centred(value, v_mean)
    past = past.to(k.dtype)
    n = (k_count.to(k.dtype) @ past.mT).clamp(min=1)[:, None, :, None, None]
    over = lambda t: torch.einsum("xy,bhyde->bhxde", past, t) / n  # noqa: E731
    left = k.mT
    if weights is not None:
        left = left * (weights * k_count[:, None, :, None]).unsqueeze(-2)
    return over(left @ v), over(left @ k)


def _past(nq_nk, bq, bk, is_causal, device):
    """(nq, nk): True where the coarse part of query block x may see key block y."""
    x = torch.arange(nq_nk[0], device=device)[:, None]
    y = torch.arange(nq_nk[1], device=device)[None, :]
    return (y + 1) * bk <= x * bq if is_causal else torch.ones_like(x + y, dtype=torch.bool)


def _acc(x):
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _or_ones(mask, like, length):
    if mask is not None:
        return mask
    return torch.ones(like.shape[0], length, dtype=torch.bool, device=like.device)


_pool, _plan, _coarse = pool, plan, coarse  # the options of the main function hide these names
