"""What attention reads: the inputs of a case, by ``--inputs``.

``normal``      independent standard normal numbers: no block of keys stands out
``offset``      normal, but all queries of a head have a mean in common, half as long as they are,
                as those of trained models have: some key blocks are chosen by most query blocks
``correlated``  neighbours resemble each other, as tokens of a text do: each number is an AR(1)
                process along the sequence, and half of the variance of queries and keys lies in a
                few directions whose course all heads share. So blocks have means to choose by, some
                key blocks win, and query blocks beside each other choose many of the same
``minilm``      q, k, v of a real encoder (minilm.py)

``smooth`` is what the commands accuracy and levels have besides.
"""

import torch

from benchmarks import minilm

LENGTH = 100  # tokens after which the correlation has fallen to 1/e
SHARED = 0.5  # of the variance of queries and keys: that of the directions all heads share
OFFSET = 0.5  # length of the mean query over that of a query
RANK = 4  # there is one such direction for every RANK dimensions of a head


def draw(case, generator, minilm_file=None):
    """query (B, H, N, D) and key, value (B, Hk, M, D) of ``case.inputs``, any dtype and device."""
    if case.inputs == "minilm":
        return minilm.draw(case, minilm_file)
    if case.inputs == "correlated":
        return correlated(case, generator)
    sizes = ((case.H, case.N), (case.Hk, case.M), (case.Hk, case.M))
    query, key, value = (normal(case, generator, *size) for size in sizes)
    if case.inputs == "offset":
        query = offset(query, generator)
    return query, key, value


def offset(query, generator):
    """Normal queries (B, H, N, D), all of a head with the same mean. Their variance stays 1."""
    B, H, _, D = query.shape
    mean = torch.randn(B, H, 1, D, generator=generator, device=query.device)
    mean *= OFFSET * D**0.5 / mean.norm(dim=-1, keepdim=True)
    return ((1 - OFFSET**2) ** 0.5 * query + mean).to(query.dtype)


def normal(case, generator, heads, length):
    """(B, heads, length, D) in the dtype of the case, on the generator's device."""
    sizes = (case.B, heads, length, case.D)
    return torch.randn(sizes, generator=generator, device=generator.device, dtype=case.torch_dtype)


def correlated(case, generator):
    """query, key, value, float32. Values have variance 1; queries and keys are scaled so that the
    logits have it too, as those of normal inputs."""
    B, H, Hk, N, M, D = case.B, case.H, case.Hk, case.N, case.M, case.D
    rank, device = max(1, D // RANK), generator.device
    fading = (-torch.arange(5 * LENGTH, device=device) / LENGTH).exp()

    def series(heads, length, dim):
        sizes = (B, heads, dim, length + len(fading) - 1)
        noise = torch.randn(sizes, generator=generator, device=device)
        return smoothed(noise, fading).transpose(-1, -2)

    directions = torch.randn(Hk, D, rank, generator=generator, device=device)
    directions = (D / rank) ** 0.5 * torch.linalg.qr(directions).Q
    shared = SHARED**0.5 * series(1, max(N, M), rank) @ directions.mT  # (B, Hk, max(N, M), D)
    scale = (1 - SHARED**2 + SHARED**2 * D / rank) ** -0.25
    query = (1 - SHARED) ** 0.5 * series(H, N, D)
    query += shared[:, :, :N].repeat_interleave(H // Hk, 1)
    key = (1 - SHARED) ** 0.5 * series(Hk, M, D) + shared[:, :, :M]
    return scale * query, scale * key, series(Hk, M, D)


def smooth(sizes, lengths, spread, generator):
    """query, key, value (B, H, N, D), float32: sums of noise smoothed over each of ``lengths``
    positions. Queries and keys share half of their variance, and are scaled so that ``spread`` is
    about the standard deviation of the logits."""
    B, H, N, D = sizes
    x = 0
    for length in lengths:
        noise = torch.randn(
            4, B, H, D, N + length - 1, generator=generator, device=generator.device
        )
        window = torch.hann_window(length + 2, periodic=False, device=generator.device)[1:-1]
        x = x + smoothed(noise, window)
    x = (x / len(lengths) ** 0.5).transpose(-1, -2).contiguous()
    scale = (spread / 2) ** 0.5
    return scale * (x[0] + x[2]), scale * (x[1] + x[2]), x[3]


def smoothed(noise, weights):
    """Weighted sums over neighbours: noise (..., L + n - 1) and n weights give (..., L). The
    variance stays that of the noise."""
    size = noise.shape[-1]
    spectrum = torch.fft.rfft(noise) * torch.fft.rfft(weights / weights.norm(), size)
    return torch.fft.irfft(spectrum, size)[..., len(weights) - 1 :]
