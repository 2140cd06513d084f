"""Other methods of ``python -m benchmarks accuracy``, and dense forms that the operator lacks."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import candidates, flex, peers  # noqa: E402
from mra_attention import make_plan, mra_attention  # noqa: E402

exact_attention = F.scaled_dot_product_attention


def qkv(N=150, D=16, B=2, H=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, B, H, N, D, generator=generator, dtype=torch.float64)
    return q + 0.5, k, v  # queries with a mean


def relative(out, exact):
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_keep_shape_and_dtype(name, dtype):
    q, k, v = (t.to(dtype) for t in qkv(N=77))
    out = peers.PEERS[name](q, k, v, 1 / 8)
    assert out.shape == q.shape and out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("name", peers.BLOCK_PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [(32, 32), (64, 32)])
def test_block_peers_keep_shape_and_dtype(name, dtype, block_size):
    q, k, v = (t.to(dtype) for t in qkv(N=150))
    peer = peers.BLOCK_PEERS[name]
    out = peer(q, k, v, 1 / 8, block_size)
    assert out.shape == q.shape and out.dtype == dtype and out.isfinite().all()
    whole = peer(q, k, v, 1.0, block_size)
    assert relative(whole, exact_attention(q, k, v)) < (0.01 if dtype == torch.bfloat16 else 1e-5)


def dense_blocks(q, k, density, bq, bk):
    """Whether each key is selected for each query (B, H, N, M), and the block of each row."""
    chosen = make_plan(q, k, density=density, block_size=(bq, bk), pool="even").to_dense()
    x, y = torch.arange(q.shape[2]) // bq, torch.arange(k.shape[2]) // bk
    return chosen[:, :, x][..., y], chosen, x, y


def means(t, block):
    return torch.stack([part.mean(2) for part in t.split(block, 2)], 2)


def test_pisa_is_its_equation():
    q, k, v = qkv(N=100)
    live, _, _, y = dense_blocks(q, k, 1 / 4, 32, 16)
    s, k_mean = 16**-0.5, means(k, 16)
    exact = (s * q @ k.mT).exp() * live
    far = (s * q @ k_mean[:, :, y].mT).exp() * ~live
    H = (k - k_mean[:, :, y]).mT @ v
    rows = exact @ v + far @ v + far.sum(-1, keepdim=True) * s * (q @ H) / 100
    expected = rows / (exact + far).sum(-1, keepdim=True)
    torch.testing.assert_close(peers.pisa(q, k, v, 1 / 4, (32, 16)), expected)
    # Our row + order 1, whose damping is gone where logits hardly vary.
    small = [peers.pisa(q / 50, k, v, 1 / 4, (32, 16)), mra_attention(q / 50, k, v, density=1 / 4,
             block_size=(32, 16), pool="even")]  # fmt: skip
    torch.testing.assert_close(*small, rtol=1e-4, atol=1e-4)


def test_sla_is_its_equation():
    q, k, v = qkv(N=200)
    live, chosen, x, y = dense_blocks(q, k, 1 / 4, 32, 16)  # 13 key blocks: 4 exact, 1 dropped
    pooled = (means(q, 32) @ means(k, 16).mT / 4).softmax(-1)
    left = pooled.masked_fill(chosen, 2)
    marginal = ~chosen & (left > left.amin(-1, keepdim=True))
    assert marginal.sum(-1).unique().tolist() == [8]
    near = exact_attention(q, k, v, attn_mask=live)
    linear = (q.softmax(-1) @ k.softmax(-1).mT) * marginal[:, :, x][..., y]
    far = linear @ v / linear.sum(-1, keepdim=True)
    share = ((pooled * marginal).sum(-1) / (pooled * (marginal | chosen)).sum(-1))[:, :, x, None]
    expected = share * far + (1 - share) * near
    torch.testing.assert_close(peers.sla(q, k, v, 1 / 4, (32, 16)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first_tokens", [False, True])
@pytest.mark.parametrize("N, count", [(100, 40), (70, 7), (20, 20)])
def test_windows_as_a_block_mask(first_tokens, N, count):
    """The mask of FlexAttention on CUDA keeps what the plain windows see."""
    mask = flex.window_mask(N, N, count, first_tokens, torch.device("cpu"))
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    seen = mask.mask_mod(0, 0, i, j)
    q, k, v = qkv(N=N)
    plain = peers.local_global if first_tokens else peers.local
    expected = plain(q, k, v, count / N)
    torch.testing.assert_close(exact_attention(q, k, v, attn_mask=seen), expected)
    blocks = mask.to_dense()[0, 0].bool()
    tiles = torch.nn.functional.pad(seen, (0, -N % flex.TILE, 0, -N % flex.TILE))
    tiles = tiles.unflatten(0, (-1, flex.TILE)).unflatten(-1, (-1, flex.TILE)).any(-1).any(1)
    assert torch.equal(blocks, tiles)


@pytest.mark.parametrize("peer", [peers.local, peers.local_global])
def test_windows_are_exact_attention_under_a_mask(peer):
    q, k, v = qkv(N=100)
    torch.testing.assert_close(peer(q, k, v, 1.0), exact_attention(q, k, v))
    count, first = 40, 10 if peer is peers.local_global else 0
    mask = torch.zeros(100, 100, dtype=torch.bool)
    for i in range(100):
        start = min(max(i // 32 * 32 + (32 - (count - first)) // 2, first), 100 - (count - first))
        mask[i, start : start + count - first] = True
    mask[:, :first] = mask[:first] = True
    torch.testing.assert_close(peer(q, k, v, 0.4), exact_attention(q, k, v, attn_mask=mask))
    assert mask[first:].sum(-1).unique().tolist() == [count]


def test_segment_means_by_hand():
    x = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0]).view(1, 1, 5, 1)
    assert peers.segment_means(x, 2).flatten().tolist() == [3.0, 9.0]
    assert torch.equal(peers.segment_means(x, 5), x)
    x = torch.randn(1, 2, 41, 3)
    for m in (1, 7, 12, 40):
        at = torch.arange(41) * m // 41
        wanted = torch.stack([x[:, :, at == run].mean(2) for run in range(m)], 2)
        torch.testing.assert_close(peers.segment_means(x, m), wanted)


def test_pseudo_inverse_and_nystrom():
    a = (4 * torch.eye(9) + torch.randn(9, 9, generator=torch.Generator().manual_seed(0))).softmax(
        -1
    )
    torch.testing.assert_close(peers.pseudo_inverse(a, 20), a.inverse(), rtol=1e-3, atol=1e-3)
    # Queries and keys that are constant over runs have landmarks without loss.
    q, k, v = (t.float() for t in qkv(N=8))
    q, k = (2 * t.repeat_interleave(8, 2) for t in (q, k))
    v = v.repeat_interleave(8, 2) + torch.randn(8 * 8, 1)
    assert relative(peers.nystrom(q, k, v, 1 / 4), exact_attention(q, k, v)) < 0.02


def test_linformer_is_attention_to_projected_keys():
    q, k, v = qkv(N=64)
    k8, v8 = (t.unflatten(2, (8, 8)).mean(3) for t in (k, v))
    out = peers.linformer_means(q, k, v, 1 / 8)
    torch.testing.assert_close(out, exact_attention(q, k8, v8), rtol=1e-5, atol=1e-5)
    one = peers.linformer(q, k, v, 1 / 64)  # one key: all rows get its value
    torch.testing.assert_close(one, one[:, :, :1].expand_as(one))
    assert not torch.equal(peers.linformer(q, k, v, 1 / 8, seed=1), peers.linformer(q, k, v, 1 / 8))


def test_performer_nears_exact_attention():
    q, k, v = qkv(N=2048, D=8, B=1, H=1)
    exact = exact_attention(q / 2, k / 2, v)
    few, many = (
        torch.tensor([relative(peers.performer(q / 2, k / 2, v, density, seed), exact)
                      for seed in range(5)]).mean() for density in (1 / 128, 1.0)
    )  # fmt: skip
    assert many < 0.25 < few


@pytest.mark.parametrize("weights", candidates.LOG_WEIGHTS)
def test_centred_is_exact_at_density_1_and_at_its_centre(weights):
    q, k, v = qkv(N=100)
    whole = make_plan(q, k, density=1.0, block_size=32)
    out = candidates.centred(q, k, v, whole, weights)
    torch.testing.assert_close(out, exact_attention(q, k, v))
    if weights != "curved":  # equal up to the mean's rounding
        same = q.mean(2, keepdim=True).expand_as(q)
        few = make_plan(same, k, density=1 / 4, block_size=32, pool="even")
        out = candidates.centred(same, k, v, few, weights)
        torch.testing.assert_close(out, exact_attention(same, k, v))
        even = mra_attention(same, k, v, plan=few, pool="even")
        assert relative(even, exact_attention(same, k, v)) > 0.01


@pytest.mark.parametrize("weights", candidates.LOG_WEIGHTS)
def test_centred_is_the_operator_where_blocks_have_no_spread(weights):
    q, k, v = qkv(N=8)
    k, v = (t.repeat_interleave(16, 2) for t in (k, v))
    plan = make_plan(q, k, density=1 / 4, block_size=(32, 16), pool="even")
    out = candidates.centred(q, k, v, plan, weights)
    torch.testing.assert_close(out, mra_attention(q, k, v, plan=plan, pool="even"))
    torch.testing.assert_close(out, exact_attention(q, k, v))


@pytest.mark.parametrize("weights, pool", [("mean", "centred"), ("sampled", "sampled")])
def test_centred_is_the_operator_with_weighted_means(weights, pool):
    q, k, v = qkv(N=300)
    plan = make_plan(q, k, density=1 / 4, block_size=(32, 16))
    out = candidates.centred(q, k, v, plan, weights)
    torch.testing.assert_close(out, mra_attention(q, k, v, plan=plan, pool=pool))


def test_scores_by_hand():
    q, k, _ = qkv(N=70)
    p = (q @ k.mT / 4).softmax(-1)
    mass = candidates.true_mass(q, k, 32, 16)
    assert mass.shape == (2, 3, 3, 5)
    torch.testing.assert_close(mass[:, :, 2, 4], p[:, :, 64:, 64:].sum((-2, -1)))
    torch.testing.assert_close(mass.sum(-1)[0, 0], torch.tensor([32.0, 32.0, 6.0]).double())
    at_mean = candidates.mean_query_score(q, k, 32, 16)
    expected = (q[:, :, 64:].mean(2, keepdim=True) @ k.mT / 4)[..., 64:].logsumexp(-1)
    torch.testing.assert_close(at_mean[:, :, 2:, 4], expected)
    shifted = candidates.centred_score(q + 3, k, 32, 16) - candidates.centred_score(q, k, 32, 16)
    torch.testing.assert_close(shifted, shifted[:, :, :1].expand_as(shifted))


@pytest.mark.parametrize(
    "score, pool",
    [("mean_score", "even"), ("centred_score", "centred"), ("centred_score", "sampled")],
)
def test_score_plans_as_the_operator_does(score, pool):
    q, k, _ = (t.float() for t in qkv(N=200))
    score = getattr(candidates, score)(q, k, 32, 16)
    ours = candidates.rows_of_best(score, 200, 200, (32, 16), 1 / 4)
    theirs = make_plan(q, k, density=1 / 4, block_size=(32, 16), pool=pool)
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_true_mass_is_the_better_plan():
    q, k, v = qkv(N=256)
    exact, even = exact_attention(q, k, v), functools.partial(mra_attention, pool="even")
    found = [
        relative(candidates.planned(score, even, (32, 32), 1 / 4, q, k, v), exact)
        for score in (candidates.true_mass, candidates.mean_score)
    ]
    assert found[0] < found[1]
