"""Plans that are one set on every device: inputs whose scores float32 holds exactly."""

import math

import torch
from helpers import tiers

from mra_attention.reference import head_budgets, pool
from mra_attention.reference import plan as plan_reference


def integer_case(device, dtype, seed, *, N=416, M=288, H=4, Hk=2, D=8, masks=False, **options):
    """Small integers, whose block means and scores float32 holds exactly (counts are powers of
    two, the scale is 1/4): the plan is then one set, ties included, on every device."""
    bq, bk = options["block_size"]
    M = N if options.get("is_causal") else M
    # A short last block of, say, 96 rows has means that no binary number holds: ties would be
    # broken by how each side happens to round.
    assert all((L % block).bit_count() <= 1 for L, block in ((N, bq), (M, bk)))
    g = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=g).to(device, dtype)

    def mask(L, block):
        keep = torch.arange(L) % block < block // 2  # half of each block
        keep[block : 2 * block] = False  # and nothing of one
        return torch.stack([keep, torch.ones(L, dtype=torch.bool)]).to(device)

    q, k = integers(2, H, N, D), integers(2, Hk, M, D)
    masks = (mask(M, bk), mask(N, bq)) if masks else (None, None)
    return q, k, *masks, {"scale": 0.25, "pool": "even", **options}


def _scores(q, k, key_mask, query_mask, options):
    o = {"density": None, "blocks_per_row": None, "selection": "row", "diagonal_blocks": 0,
         "first_blocks": 0, "is_causal": False, "scale": q.shape[-1] ** -0.5}  # fmt: skip
    o.update(options)
    bq, bk = o["block_size"]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    q_mean, q_count = pool(q.double(), query_mask, bq)
    k_mean, k_count = pool(k.double(), key_mask, bk)
    return o, o["scale"] * q_mean @ k_mean.mT, q_count, k_count


def reference_plan(q, k, key_mask, query_mask, options):
    """The plan of the reference in float64, bool (B, H, nq, nk)."""
    o, L, q_count, k_count = _scores(q, k, key_mask, query_mask, options)
    bq, bk = o["block_size"]
    m = head_budgets(L.shape[-2:], bq, bk, o["density"], o["blocks_per_row"], o["is_causal"])
    return plan_reference(
        L, q_count, k_count, m, bq, bk, q.shape[2], o["selection"], o["diagonal_blocks"],
        o["first_blocks"], o["is_causal"],
    )  # fmt: skip


def reference_tiers(q, k, key_mask, query_mask, options):
    """(scores in float64, how strongly each pair is forced, -inf where there is none); slow, in
    plain loops."""
    o, L, q_count, k_count = _scores(q, k, key_mask, query_mask, options)
    tier = tiers(*L.shape[-2:], *o["block_size"], q.shape[2], o["diagonal_blocks"],
                 o["first_blocks"], o["selection"], o["is_causal"]).to(L.device)  # fmt: skip
    exists = (q_count > 0)[:, None, :, None] & (k_count > 0)[:, None, None, :]
    return L, tier.expand_as(L).masked_fill(~exists, -math.inf)
