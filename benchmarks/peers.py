"""Other ways to approximate softmax attention, from their equations, in plain PyTorch.

Each takes query (B, H, N, D), key and value (B, H, M, D), N = M, in any floating dtype, and
``density``, the share of pairs whose multiply-adds it may spend: exact attention on density * M
keys for each query costs as much. Returns (B, H, N, D) of the same dtype and device. Symbols as in
docs/notation.md; s is 1/sqrt(D). Nothing is trained: those that learn a projection get a random
one.
"""

import torch
import torch.nn.functional as F

__all__ = [
    "PEERS", "linformer", "linformer_means", "local", "local_global", "nystrom", "performer",
]  # fmt: skip

BLOCK = 32  # queries that share a window
NEWTON_STEPS = 6


def local(query, key, value, density, block=BLOCK):
    """Sliding window: the ``density * M`` keys around the query's block of ``block`` tokens."""
    return _windowed(query, key, value, budget(density, key), 0, block)


def local_global(query, key, value, density, block=BLOCK):
    """Sliding window, and a quarter of the budget for the first tokens, seen by all; they see all
    (Longformer, BigBird)."""
    count = budget(density, key)
    first = count // 4
    out = _windowed(query, key, value, count - first, first, block)
    whole = F.scaled_dot_product_attention(query[:, :, :first], key, value)
    return torch.cat([whole, out[:, :, first:]], 2)


def _windowed(query, key, value, width, first, block):
    """Each block of queries attends to ``width`` keys in a row around it, and the ``first``."""
    N, M = query.shape[2], key.shape[2]
    nq = -(-N // block)
    width = min(width, M - first)
    start = torch.arange(nq, device=query.device) * block + (block - width) // 2
    start = start.clamp(first, M - width)
    index = start[:, None] + torch.arange(width, device=query.device)
    front = torch.arange(first, device=query.device).expand(nq, -1)
    index = torch.cat([front, index], 1).flatten()  # nq * (first + width)
    k, v = (t[:, :, index].unflatten(2, (nq, -1)).flatten(1, 2) for t in (key, value))
    q = F.pad(query, (0, 0, 0, -N % block)).unflatten(2, (nq, block)).flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(1, (-1, nq)).flatten(2, 3)[:, :, :N]


def nystrom(query, key, value, density):
    """Nyströmformer: softmax(s Q K~') pinv(softmax(s Q~ K~')) softmax(s Q~ K') V, with the means of
    m runs of tokens as landmarks Q~ and K~, and its iteration for the pseudo-inverse. Both long
    products count, so m is half of the budget."""
    m = max(1, budget(density, key) // 2)
    q, k = (segment_means(t, m) for t in (query, key))
    s = query.shape[-1] ** -0.5
    weights = lambda a, b: (s * a.float() @ b.float().mT).softmax(-1)  # noqa: E731
    right = F.scaled_dot_product_attention(q, key, value).float()
    middle = pseudo_inverse(weights(q, k)) @ right
    return (weights(query, k) @ middle).to(query.dtype)


def segment_means(x, m):
    """Means of m runs of rows, as equal as whole rows allow: (B, H, L, D) to (B, H, m, D)."""
    at = torch.arange(x.shape[2], device=x.device) * m // x.shape[2]
    sums = x.new_zeros(*x.shape[:2], m, x.shape[3], dtype=torch.float32)
    sums.index_add_(2, at, x.float())
    return (sums / torch.bincount(at, minlength=m)[:, None]).to(x.dtype)


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
    m, M = budget(density, key), key.shape[2]
    generator = torch.Generator().manual_seed(seed)
    project = torch.randn(m, M, generator=generator).to(key) * M**-0.5
    return F.scaled_dot_product_attention(query, project @ key, project @ value)


def linformer_means(query, key, value, density):
    """Linformer with means of m runs of tokens as its projection: pooled keys and nothing else."""
    m = budget(density, key)
    return F.scaled_dot_product_attention(query, segment_means(key, m), segment_means(value, m))


def performer(query, key, value, density, seed=0):
    """Performer's positive features: exp(q w' - |q|²/2) for r orthogonal w of Gaussian length, of
    q and k each times s^(1/2). Features and both products count, so r is half of the budget. The
    largest exponents are taken off, of a query on its own, of the keys together."""
    r, D = max(1, budget(density, key) // 2), query.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(-(-r // D), D, D, generator=generator)
    lengths = torch.randn(r, D, generator=generator).norm(dim=-1, keepdim=True)
    w = (torch.linalg.qr(draws).Q.flatten(0, 1)[:r] * lengths).to(query.device)
    q, k = (t.float() * D**-0.25 for t in (query, key))
    q, k = (t @ w.mT - t.square().sum(-1, keepdim=True) / 2 for t in (q, k))
    q, k = (q - q.amax(-1, keepdim=True)).exp(), (k - k.amax((-2, -1), keepdim=True)).exp()
    mass = q @ k.sum(-2, keepdim=True).mT
    return (q @ (k.mT @ value.float()) / mass.clamp(min=1e-30)).to(query.dtype)


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
