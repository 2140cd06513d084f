"""The reference of pool="centred" and "sampled": what the forms are, and that they pay."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import pad

from mra_attention.reference import SAMPLED_QUERIES, centre, mra_attention_reference, sample
from mra_attention.reference import pool as block_means

POOLS = ["centred", "sampled"]


def inputs(B=2, H=4, Hk=2, N=150, M=203, D=16):
    return tuple(
        torch.randn(B, h, n, D, dtype=torch.float64) for h, n in ((H, N), (Hk, M), (Hk, M))
    )


def masks(B=2, N=150, M=203):
    key_mask, query_mask = torch.rand(B, M) < 0.8, torch.rand(B, N) < 0.8
    key_mask[0, 32:64] = query_mask[1, :32] = False
    return key_mask, query_mask


def exact(q, k, v, key_mask=None):
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    a = q @ k.mT * q.shape[-1] ** -0.5
    if key_mask is not None:
        a = a.masked_fill(~key_mask[:, None, None], -math.inf)
    return a.softmax(-1) @ v


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("pool", POOLS)
def test_density_1_is_softmax_attention(pool, order):
    q, k, v = inputs()
    key_mask, _ = masks()
    for mask in (None, key_mask):
        out = mra_attention_reference(
            q, k, v, mask, density=1.0, block_size=32, order=order, pool=pool
        )
        torch.testing.assert_close(out, exact(q, k, v, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("pool", POOLS)
def test_equal_keys_in_a_block_are_pooled_evenly(pool, order):
    q, k, v = inputs(M=192)
    k = k[:, :, ::32].repeat_interleave(32, 2)
    key_mask, query_mask = masks(M=192)
    options = dict(density=0.3, block_size=32, order=order, return_lse=True)
    ours = mra_attention_reference(q, k, v, key_mask, query_mask, pool=pool, **options)
    even = mra_attention_reference(q, k, v, key_mask, query_mask, pool="even", **options)
    for a, b in zip(ours, even, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_log_mass_is_a_lower_bound(pool):
    """Gibbs' inequality, with equality at the mean query for pool="centred"."""
    q, k, _ = inputs(Hk=4)
    key_mask, query_mask = masks()
    s = 0.25
    mean, weights, entropy, _ = centre(pool, s, 2 * q, k, query_mask, key_mask, 32)
    filled = torch.nn.functional.pad(k.masked_fill(~key_mask[:, None, :, None], 0), (0, 0, 0, 21))
    k_mean = (weights.unsqueeze(-2) @ filled.unflatten(2, (7, 32))).squeeze(-2)
    for at in (q, mean.unsqueeze(-2)):
        logits = (s * at @ k.mT).masked_fill(~key_mask[:, None, None], -math.inf)
        logits = torch.nn.functional.pad(logits, (0, 21), value=-math.inf)
        mass = logits.unflatten(-1, (7, 32)).logsumexp(-1)
        bound = (entropy.unsqueeze(-2) + s * at @ k_mean.mT).masked_fill(mass.isinf(), -math.inf)
        assert (bound <= mass + 1e-12).all()
    if pool == "centred":
        torch.testing.assert_close(bound, mass, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_weights_are_distributions_of_the_valid_keys(pool):
    q, k, _ = inputs()
    key_mask, query_mask = masks()
    mean, weights, entropy, _ = centre(pool, 0.25, q, k, query_mask, key_mask, 32)
    valid = torch.nn.functional.pad(key_mask, (0, 21)).view(2, 1, 7, 32)
    assert (weights[~valid.expand_as(weights)] == 0).all()
    there = valid.any(-1).expand(2, 2, 7)
    assert torch.allclose(weights.sum(-1)[there], torch.ones(()).double(), atol=1e-12)
    assert (entropy <= valid.sum(-1).clamp(min=1).double().log() + 1e-12).all()
    rows = query_mask[:, None, :, None].double()
    group = (q * rows).view(2, 2, 2, 150, 16).sum((2, 3)) / (2 * rows.sum(2))
    torch.testing.assert_close(mean, group, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_bias_is_that_of_the_mean_query(pool):
    q, k, _ = inputs()
    key_mask, query_mask = masks()
    mean, _, _, bias = centre(pool, 0.25, q, k, query_mask, key_mask, 32)
    logits = 0.25 * (mean.unsqueeze(-2) @ k.mT).squeeze(-2)
    for b, h, y in itertools.product(range(2), range(2), range(7)):
        keys = slice(32 * y, 32 * y + 32)
        of_block = logits[b, h, keys][key_mask[b, keys]]
        expected = of_block.logsumexp(0) / 4 - of_block.mean() / 2 if len(of_block) else 0.0
        assert bias[b, h, y].item() == pytest.approx(float(expected), abs=1e-12)
    assert (bias[0, :, 1] == 0).all()  # an empty block
    # what a pair scores grows with what all queries have in common by three quarters only
    k_mean, count = block_means(k, key_mask, 32)
    q_mean, _ = block_means(q, query_mask, 32)
    k_mean, bias = (x.repeat_interleave(2, 1) for x in (k_mean, bias))
    mass = pad(logits, (0, 21)).unflatten(-1, (7, 32))
    valid = pad(key_mask, (0, 21)).view(2, 1, 7, 32)
    mass = mass.masked_fill(~valid, -math.inf).logsumexp(-1).repeat_interleave(2, 1)
    away = q_mean - mean.repeat_interleave(2, 1).unsqueeze(-2) / 2
    score = 0.25 * q_mean @ k_mean.mT + bias.unsqueeze(-2)
    expected = 0.25 * away @ k_mean.mT + mass.unsqueeze(-2) / 4
    there = (count > 0)[:, None, None].expand_as(score)
    torch.testing.assert_close(score[there], expected[there], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("G", [1, 3])
def test_sampled_queries_are_valid_and_spread(G):
    valid = torch.rand(5, 300) < torch.tensor([1.0, 0.5, 0.1, 0.02, 0.0])[:, None]
    at, taken = sample(valid, G)
    for b in range(5):
        places, count = at[b][taken[b]], G * int(valid[b].sum())
        assert len(set(places.tolist())) == len(places) == min(SAMPLED_QUERIES, count)
        assert valid[b][places % 300].all()
        if count > SAMPLED_QUERIES:
            rank = torch.cumsum(valid[b].repeat(G), 0)[places]
            assert rank.diff().max() - rank.diff().min() <= 1


@pytest.mark.parametrize("pool, most", [("centred", 0.75), ("sampled", 0.75)])
def test_error_falls_where_queries_agree(pool, most):
    """All queries have a mean of half their length, some keys lie along it."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 512, 32, generator=g, dtype=torch.float64) for _ in range(3))
    common = torch.randn(1, 2, 1, 32, generator=g, dtype=torch.float64)
    q, k = q + common, k + torch.rand(1, 2, 512, 1, generator=g) ** 8 * 3 * common
    expected = exact(q, k, v)
    errors = {
        form: (mra_attention_reference(q, k, v, block_size=32, pool=form) - expected).norm()
        for form in ("even", pool)
    }
    assert errors[pool] < most * errors["even"], errors


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_refused(pool):
    q, k, v = inputs()
    refused = [dict(coarse="block"), dict(coarse="none"), dict(levels=((128, 2),))]
    refused += [dict(is_causal=True)] * (pool == "sampled")
    for options in refused:
        with pytest.raises(ValueError, match="pool: got"):
            mra_attention_reference(q, k, v, pool=pool, block_size=32, **options)
