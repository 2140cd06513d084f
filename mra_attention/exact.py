"""Exact attention for the calls that MRA attention doesn't serve, with its word on empty rows."""

import torch
from torch.nn import functional as F

__all__ = ["exact_attention", "take_part"]


def exact_attention(
    query, key, value, mask=None, *, is_causal=False, dropout=0.0, scale=None, enable_gqa=False,
    need_weights=False,
):  # fmt: skip
    """Softmax attention: (out, weights or None).

    query: (B, H, N, D); key, value: (B, H, M, D), or (B, Hk, M, D) with ``enable_gqa`` and without
        ``need_weights``; any floating dtype. Without a dimension for heads: (B, N, D), (B, M, D).
    mask: bool (True: takes part) or of query's dtype (added to the scores); broadcasts to
        (B, H, N, M). A row that it leaves no key gives zeros and zero gradients, never NaN.
    dropout: probability, applied to the weights, also to those returned, as ``torch.nn`` does.
    scale: factor of q.k, 1/sqrt(D) when None.
    """
    N, M = query.shape[-2], key.shape[-2]
    if is_causal and (mask is not None or need_weights):
        past = torch.ones(N, M, dtype=torch.bool, device=query.device).tril()
        if mask is None:
            mask = past
        else:
            mask = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
        is_causal = False
    empty = None
    if mask is not None:
        # Kernels differ in what they make of a row without a key, and in its gradient: such a row
        # sees everything, and its result is dropped.
        if mask.dtype == torch.bool:
            empty = ~mask.any(-1, keepdim=True)
            mask = mask | empty
        else:
            empty = (mask == -torch.inf).all(-1, keepdim=True)
            mask = mask.masked_fill(empty, 0)
    if need_weights:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query * scale) @ key.mT
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1)
        if empty is not None:
            weights = weights.masked_fill(empty, 0)
        weights = F.dropout(weights, dropout)
        return weights @ value, weights
    # Not by the name that replace_sdpa answers to: what is exact stays exact inside of it.
    out = torch.ops.aten.scaled_dot_product_attention.default(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out if empty is None else out.masked_fill(empty, 0), None


def take_part(key_mask=None, query_mask=None):
    """Masks of keys (B, M) and queries (B, N), True = takes part, as one for (B, H, N, M)."""
    if key_mask is None and query_mask is None:
        return None
    if query_mask is None:
        return key_mask[:, None, None, :]
    query_mask = query_mask[:, None, :, None]
    return query_mask if key_mask is None else query_mask & key_mask[:, None, None, :]
