"""The dense matrix that MRA attention stands for: what ``need_weights=True`` returns."""

import dataclasses

import torch

from . import reference
from .layout import Tiles

__all__ = ["dense_weights"]


def dense_weights(q, k, key_mask, query_mask, *, config, is_causal, scale, plan):
    """The matrix W (B, H, N, M) with W @ value = MRA attention, in the dtype of q.

    Exact pairs weigh e^{s q_i.k_j} / Z_i; a key of a coarse block weighs e^{b_iy} / (c_y Z_i), its
    share of the block. Order 1 adds P_i gamma_i s q_i.(k_j - k~_y) / n to every key that the
    coarse part may see, which moves weight inside blocks and sums to zero.
    """
    if plan.layout is not None:
        tiles = Tiles.of(plan.layout, plan.N, plan.block_size)
        plan = dataclasses.replace(plan, N=tiles.length, M=tiles.length, layout=None)
        key_mask, query_mask = tiles.masks(key_mask, query_mask, q)
        weights = dense_weights(
            tiles.heads(q), tiles.heads(k), key_mask, query_mask, config=config,
            is_causal=is_causal, scale=scale, plan=plan,
        )  # fmt: skip
        return tiles.to_tokens(tiles.to_tokens(weights, 3), 2)
    N, M = q.shape[2], k.shape[2]
    bq, bk = plan.block_size
    x, y = torch.arange(N, device=q.device) // bq, torch.arange(M, device=q.device) // bk
    q_mean, _ = reference.pool(q, query_mask, bq)
    k_mean, k_count = reference.pool(k, key_mask, bk)
    valid = reference._or_ones(key_mask, q, M)[:, None, None, :]
    past = reference._past((plan.nq, plan.nk), bq, bk, is_causal, q.device)
    exact = plan.to_dense()[:, :, x]  # (B, H, N, nk)
    L = scale * q_mean @ k_mean.mT
    b = reference.coarse(config.coarse, scale, q, k_mean, L, k_count, past[x] & ~exact, x)
    b = b - k_count.clamp(min=1).to(b.dtype).log()[:, None, None, :]  # of one key of the block
    a = (scale * q @ k.mT).to(b.dtype)
    live = exact[..., y] & valid
    if is_causal:
        live = live & torch.ones(N, M, dtype=torch.bool, device=q.device).tril()
    logits = torch.where(live, a, b[..., y].masked_fill(exact[..., y] | ~valid, -torch.inf))
    if query_mask is not None:
        logits = logits.masked_fill(~query_mask[:, None, :, None], -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if config.order == 1 and config.coarse != "none":
        seen = past[x][:, y] & valid
        share = weights.masked_fill(exact[..., y], 0).sum(-1, keepdim=True)
        inside = (a - (scale * q @ k_mean.mT.to(q.dtype)).to(a.dtype)[..., y]).masked_fill(~seen, 0)
        n = seen.sum(-1, keepdim=True).clamp(min=1)
        # s^2 q Sigma q^T is the mean square of `inside`.
        gamma = 1 / (1 + (inside * inside).sum(-1, keepdim=True) / n / 4)
        weights = weights + share * gamma * inside / n
    return weights.to(q.dtype)
