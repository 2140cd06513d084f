"""The dense matrix that MRA attention stands for: what ``need_weights=True`` returns."""

import dataclasses

import torch

from . import reference
from .config import pool_of
from .layout import Tiles

__all__ = ["dense_weights"]


def dense_weights(q, k, key_mask, query_mask, *, config, is_causal, scale, plan):
    """The matrix W (B, H, N, M) with W @ value = MRA attention, in the dtype of q.

    Exact pairs weigh e^{s q_i.k_j} / Z_i; a key of a coarse block weighs e^{b_iy} / (c_y Z_i), its
    share of the block. Order 1 adds P_i gamma_i s q_i.(k_j - k~_y) / n to every key that the
    coarse part may see, which moves weight inside blocks and sums to zero. With a pool other than
    "even" a key has its weight pi_j in place of 1 / c_y, and q_i is less the mean query (under
    causal that of the blocks before its own).

    Raises NotImplementedError for a plan with levels.
    """
    if plan.levels:
        raise NotImplementedError(
            f"need_weights: got True with levels={plan.levels}, expected False beside levels"
        )
    if plan.layout is not None:
        tiles = Tiles.of(plan.layout, plan.N, plan.block_size)
        plan = dataclasses.replace(plan, N=tiles.length, M=tiles.length, layout=None)
        key_mask, query_mask = tiles.masks(key_mask, query_mask, q)
        weights = dense_weights(
            *tiles.to_blocks(q, k), key_mask, query_mask, config=config,
            is_causal=is_causal, scale=scale, plan=plan,
        )  # fmt: skip
        _, inverse = tiles.orders(q)
        return weights.index_select(2, inverse).index_select(3, inverse)
    N, M = q.shape[2], k.shape[2]
    bq, bk = plan.block_size
    x, y = torch.arange(N, device=q.device) // bq, torch.arange(M, device=q.device) // bk
    q_mean, _ = reference.pool(q, query_mask, bq)
    k_mean, k_count = reference.pool(k, key_mask, bk)
    valid = reference._or_ones(key_mask, q, M)[:, None, None, :]
    past = reference._past((plan.nq, plan.nk), bq, bk, is_causal, q.device)
    exact = plan.to_dense()[:, :, x]  # (B, H, N, nk)
    L = scale * q_mean @ k_mean.mT
    pool = pool_of(config)
    even, log_mass, deviation = pool == "even", None, q
    if even:
        parts = (1 / k_count.clamp(min=1).to(L.dtype))[:, None, None, y]
    else:
        causal = bq if is_causal else None
        weighed = reference.centre(pool, scale, q, k, query_mask, key_mask, bk, causal)
        mean, parts, log_mass, _ = weighed
        k_mean = reference._weighted(k, key_mask, parts)
        mean = mean[:, :, x] if is_causal else mean.unsqueeze(-2)
        parts, deviation = parts.flatten(2)[..., None, :M], q.to(mean.dtype) - mean
    unselected = past[x] & ~exact
    b = reference.coarse(config.coarse, scale, q, k_mean, L, k_count, unselected, x, log_mass)
    b = b[..., y]
    a = (scale * q @ k.mT).to(b.dtype)
    first = config.order == 1 and config.coarse != "none"
    if first:
        seen = past[x][:, y] & valid
        n = seen.sum(-1, keepdim=True).clamp(min=1)
        shares = seen.to(b.dtype) / n if even else parts * k_count[:, None, None, y] / n
        inside = a if even else scale * deviation @ k.to(deviation.dtype).mT
        inside = inside - (scale * deviation @ k_mean.mT.to(deviation.dtype)).to(b.dtype)[..., y]
        inside = inside.masked_fill(~seen, 0)
        t = (shares * inside * inside).sum(-1, keepdim=True)  # s^2 q Sigma q^T
        if not even:
            b = b + torch.log(3 - 2 / (1 + t / 4))
    live = exact[..., y] & valid
    if is_causal:
        live = live & torch.ones(N, M, dtype=torch.bool, device=q.device).tril()
    one = (b + parts.log()).masked_fill(exact[..., y] | ~valid, -torch.inf)  # key of a coarse block
    logits = torch.where(live, a, one)
    if query_mask is not None:
        logits = logits.masked_fill(~query_mask[:, None, :, None], -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if first:
        share = weights.masked_fill(exact[..., y], 0).sum(-1, keepdim=True)
        weights = weights + share / (1 + t / 4) * inside * shares
    return weights.to(q.dtype)
