"""Other ways to approximate softmax attention, from their equations, in plain PyTorch.

Each takes query (B, H, N, D), key and value (B, H, M, D), N = M, in any floating dtype, and
``density``, the share of pairs whose multiply-adds it may spend: exact attention on density * M
keys for each query costs as much. Returns (B, H, N, D) of the same dtype and device. Symbols as in
docs/notation.md; s is 1/sqrt(D). Nothing is trained: those that learn a projection get a random
one.

BLOCK_PEERS take ``block_size`` (bq, bk) too. They select blocks by the product of block means and
run the selected ones by the operator, so that both are as fast as ours.
"""

import functools

import torch
import torch.nn.functional as F

from mra_attention import make_plan, mra_attention

__all__ = [
    "BLOCK_PEERS", "PEERS", "linformer", "linformer_means", "local", "local_global", "nystrom",
    "performer", "pisa", "sla", "windows",
]  # fmt: skip

BLOCK = 32  # queries that share a window
NEWTON_STEPS = 6
FIRST = 4  # one in so many keys of a local + first budget is one of the first tokens
NEGLIGIBLE = 0.1  # share of the blocks that SLA drops


def local(query, key, value, density, block=BLOCK):
    """Sliding window: the ``density * M`` keys around the query's block of ``block`` tokens."""
    return _windowed(query, key, value, budget(density, key), 0, block)


def local_global(query, key, value, density, block=BLOCK):
    """Sliding window, and a quarter of the budget for the first tokens, seen by all; they see all
    (Longformer, BigBird)."""
    count = budget(density, key)
    first = count // FIRST
    out = _windowed(query, key, value, count - first, first, block)
    whole = F.scaled_dot_product_attention(query[:, :, :first], key, value)
    return torch.cat([whole, out[:, :, first:]], 2)


def _windowed(query, key, value, width, first, block):
    """Each block of queries attends to ``width`` keys in a row around it, and the ``first``."""
    N, M = query.shape[2], key.shape[2]
    nq = -(-N // block)
    start, width = windows(N, M, width, first, block, query.device)
    index = start[:, None] + torch.arange(width, device=query.device)
    front = torch.arange(first, device=query.device).expand(nq, -1)
    index = torch.cat([front, index], 1).flatten()  # nq * (first + width)
    k, v = (t[:, :, index].unflatten(2, (nq, -1)).flatten(1, 2) for t in (key, value))
    q = F.pad(query, (0, 0, 0, -N % block)).unflatten(2, (nq, block)).flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(1, (-1, nq)).flatten(2, 3)[:, :, :N]


def windows(N, M, width, first, block=BLOCK, device=None):
    """The first key of each query block's window, (nq,), and the windows' width; none holds one of
    the ``first`` keys."""
    width = min(width, M - first)
    start = torch.arange(-(-N // block), device=device) * block + (block - width) // 2
    return start.clamp(first, M - width), width


def nystrom(query, key, value, density):
    """Nyströmformer: softmax(s Q K~') pinv(softmax(s Q~ K~')) softmax(s Q~ K') V, with the means of
    m runs of tokens as landmarks Q~ and K~, and its iteration for the pseudo-inverse. Both long
    products count, so m is half of the budget."""
    m = max(1, budget(density, key) // 2)
    q, k = (segment_means(t, m) for t in (query, key))
    s = query.shape[-1] ** -0.5
    weights = lambda a, b: (s * (a @ b.mT).float()).softmax(-1)  # noqa: E731
    right = F.scaled_dot_product_attention(q, key, value).float()
    middle = pseudo_inverse(weights(q, k)) @ right
    return weights(query, k).to(query.dtype) @ middle.to(query.dtype)


def segment_means(x, m):
    """Means of m runs of rows, as equal as whole rows allow: (B, H, L, D) to (B, H, m, D)."""
    L = x.shape[2]
    if L % m == 0:
        return x.unflatten(2, (m, -1)).mean(3)
    sums = x.new_zeros(*x.shape[:2], m, x.shape[3], dtype=torch.float32)
    sums.index_add_(2, torch.arange(L, device=x.device) * m // L, x.float())
    ends = -(-torch.arange(m + 1, device=x.device) * L // m)  # rounded up
    return (sums / ends.diff()[:, None]).to(x.dtype)


def pseudo_inverse(a, steps=NEWTON_STEPS):
    """Of (..., m, m), by Nyströmformer's iteration, which starts from A' / (|A|_1 |A|_inf)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    norms = a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1)
    z = a.mT / norms[..., None, None]
    for _ in range(steps):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def linformer(query, key, value, density, seed=0):
    """Linformer's softmax(s Q (E K)') E V with m random rows E of length about 1, where m is the
    budget. A trained E does better."""
    project = random_rows(budget(density, key), key.shape[2], seed, key.dtype, key.device)
    return F.scaled_dot_product_attention(query, project @ key, project @ value)


@functools.lru_cache(16)
def random_rows(m, M, seed, dtype, device):
    """(m, M), fixed as parameters are."""
    rows = torch.randn(m, M, generator=torch.Generator().manual_seed(seed))
    return (rows * M**-0.5).to(device, dtype)


def linformer_means(query, key, value, density):
    """Linformer with means of m runs of tokens as its projection: pooled keys and nothing else."""
    m = budget(density, key)
    return F.scaled_dot_product_attention(query, segment_means(key, m), segment_means(value, m))


def performer(query, key, value, density, seed=0):
    """Performer's positive features: exp(q w' - |q|²/2) for r orthogonal w of Gaussian length, of
    q and k each times s^(1/2). Features and both products count, so r is half of the budget. The
    largest exponents are taken off, of a query on its own, of the keys together."""
    w = features(max(1, budget(density, key) // 2), query.shape[-1], seed, query.device)
    q, k = (t.float() * query.shape[-1] ** -0.25 for t in (query, key))
    q, k = (t @ w.mT - t.square().sum(-1, keepdim=True) / 2 for t in (q, k))
    q, k = (q - q.amax(-1, keepdim=True)).exp(), (k - k.amax((-2, -1), keepdim=True)).exp()
    mass = q @ k.sum(-2, keepdim=True).mT
    return (q @ (k.mT @ value.float()) / mass.clamp(min=1e-30)).to(query.dtype)


@functools.lru_cache(16)
def features(r, D, seed, device):
    """Performer's w, (r, D), fixed as parameters are."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(-(-r // D), D, D, generator=generator)
    lengths = torch.randn(r, D, generator=generator).norm(dim=-1, keepdim=True)
    return (torch.linalg.qr(draws).Q.flatten(0, 1)[:r] * lengths).to(device)


def sla(query, key, value, density, block_size):
    """Sparse-linear attention (Zhang et al., SLA, arXiv 2509.24006): softmax over the keys of each
    query block's best key blocks, linear attention with softmax features over those of the others
    but the lowest tenth, which is dropped.

    It adds a trained projection of the linear part to the other, zero before training. Untrained,
    both count by the share that the pooled map softmax(s Q~ K~'), by which it selects, gives their
    blocks."""
    bq, bk = block_size
    plan = make_plan(query, key, density=density, block_size=block_size, pool="even")
    near = mra_attention(query, key, value, plan=plan, coarse="none")
    chosen, s = plan.to_dense(), query.shape[-1] ** -0.5
    pooled = (s * _means(query, bq) @ _means(key, bk).mT).float().softmax(-1)
    dropped = min(int(NEGLIGIBLE * plan.nk), plan.nk - 1)
    lowest = pooled.masked_fill(chosen, 2).topk(dropped, -1, largest=False).indices
    marginal = (~chosen).scatter(-1, lowest, False)
    share = (pooled * marginal).sum(-1) / (pooled * (marginal | chosen)).sum(-1)

    marginal = marginal.to(query.dtype)
    q = _blocks(query.softmax(-1), bq)
    k, v = _blocks(key.softmax(-1), bk), _blocks(value, bk)
    state = (marginal @ (k.mT @ v).flatten(-2)).unflatten(-1, (k.shape[-1], -1))
    mass = q @ (marginal @ k.sum(-2)).unsqueeze(-1)
    far = q @ state / mass.clamp(min=1e-6)
    share = share[..., None, None].to(query.dtype)
    out = (1 - share) * _blocks(near, bq) + share * far
    return out.flatten(2, 3)[:, :, : query.shape[2]]


def pisa(query, key, value, density, block_size):
    """Piecewise sparse attention (Li et al., PISA, arXiv 2602.01077): softmax over the keys of each
    query block's best key blocks, for every other block exp(s q_i.k~_y) on the sum of its values,
    and for all of those together the first-order term z_i s q_i H / M with one H = Σ (k - k~)' v of
    the whole head. That is ``coarse="row", order=1`` without damping."""
    bk = block_size[1]
    plan = make_plan(query, key, density=density, block_size=block_size, pool="even")
    near, lse = mra_attention(query, key, value, plan=plan, coarse="none", return_lse=True)
    M, s = key.shape[2], query.shape[-1] ** -0.5
    rows = torch.arange(query.shape[2], device=query.device) // block_size[0]
    k_mean, v_mean = _means(key, bk), _means(value, bk)
    k, v = _blocks(key, bk), _blocks(value, bk)
    H = ((k - k_mean.unsqueeze(3)).mT @ v).sum(2)
    b = (s * query @ k_mean.mT).to(lse.dtype) + _counts(M, bk, lse).log()
    b = b.masked_fill(plan.to_dense()[:, :, rows], -torch.inf)
    total = torch.logaddexp(lse, b.logsumexp(-1)).unsqueeze(-1)
    w = (b - total).exp().to(query.dtype)
    out = (lse.unsqueeze(-1) - total).exp().to(query.dtype) * near + w @ v_mean
    return out + w.sum(-1, keepdim=True) * (s / M * query @ H)


def _blocks(x, block):
    """x (B, H, L, D) by blocks, (B, H, n, block, D), the last one filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _counts(L, block, like):
    """Rows of each block, (n,)."""
    return (L - torch.arange(0, L, block, device=like.device)).clamp(max=block).to(like.dtype)


def _means(x, block):
    """Means of blocks, (B, H, n, D)."""
    return _blocks(x, block).sum(3) / _counts(x.shape[2], block, x)[:, None]


def budget(density, key):
    """Keys for each query."""
    return max(1, min(key.shape[2], round(density * key.shape[2])))


PEERS = {
    "local window": local,
    "local + first tokens": local_global,
    "Nyströmformer": nystrom,
    "Linformer, random": linformer,
    "Linformer, means": linformer_means,
    "Performer": performer,
}
BLOCK_PEERS = {"SLA, untrained": sla, "PISA": pisa}
