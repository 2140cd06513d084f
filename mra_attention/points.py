"""An order for tokens that have places but no order: points, keypoints, particles.

Blocks are runs of the sequence, and blocks of neighbours are what MRA attention approximates well.
Along a space-filling curve neighbours of the sequence are neighbours in space::

    index = order_points(points)                    # (B, N)
    x = x.take_along_dim(index.unsqueeze(-1), 1)    # (B, N, E), once, before the first layer
    ...                                             # any number of layers
    x = x.take_along_dim(index.argsort(-1).unsqueeze(-1), 1)  # back
"""

import torch

__all__ = ["order_points"]

BITS = 16  # of a coordinate: cells of 1/65536 of the extent, three of them in an int64


def order_points(points, bits=None, mask=None):
    """Permutation that puts points in the order of a Hilbert curve: int64 (B, N) or (N,).

    ``points.take_along_dim(index.unsqueeze(-1), -2)`` are the points in that order. The curve runs
    through a grid of ``2**bits`` cells a side over the bounding square or cube of each set; points
    of one cell keep their order. In a full grid of that size each point is a neighbour of the one
    before. (Skilling, "Programming the Hilbert curve", 2004.)

    points: (B, N, 2), (B, N, 3) or without B, any device; integer or floating, finite.
    bits: of a coordinate, 1 to 31 in two and 1 to 20 in three dimensions; None: 16.
    mask: None or bool (B, N) or (N,), True = takes part. The others come last and don't count for
        the bounding box; put ``mask.take_along_dim(index, -1)`` in the place of the key mask.

    No gradient, no wait for the device. Raises TypeError or ValueError that names the argument.
    """
    bits = BITS if bits is None else bits
    _check(points, bits, mask)
    x = points.detach()
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    x = x.to(torch.float32 if narrow else torch.float64)
    there = None if mask is None else mask.unsqueeze(-1)
    low = x if there is None else x.masked_fill(~there, torch.inf)
    high = x if there is None else x.masked_fill(~there, -torch.inf)
    low = low.amin(-2, keepdim=True)
    extent = (high.amax(-2, keepdim=True) - low).amax(-1, keepdim=True)  # of the longest side
    cells = ((x - low) / torch.where(extent > 0, extent, 1) * 2**bits).floor()
    if there is not None:
        cells = cells.masked_fill(~there, 0)
    cells = cells.long().clamp(0, 2**bits - 1)  # the far side itself belongs to the last cell
    at = _along_curve(list(cells.unbind(-1)), bits)
    if mask is not None:
        at = at.masked_fill(~mask, torch.iinfo(torch.int64).max)
    return at.argsort(dim=-1, stable=True)


def _along_curve(x, bits):
    """Where the Hilbert curve of a grid of 2^bits cells a side passes the cells ``x``, int64, one
    tensor for each dimension.

    From the largest halves to the smallest, what lies in the far half of a dimension is mirrored
    in the first one, what lies in the near half exchanges the two; then a Gray code is undone."""
    for bit in range(bits - 1, 0, -1):
        below = (1 << bit) - 1
        x[0] = torch.where((x[0] >> bit & 1).bool(), x[0] ^ below, x[0])
        for i in range(1, len(x)):
            far, exchange = (x[i] >> bit & 1).bool(), (x[0] ^ x[i]) & below
            x[0] = x[0] ^ torch.where(far, below, exchange)
            x[i] = x[i] ^ torch.where(far, 0, exchange)
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    flip = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flip = torch.where((x[-1] >> bit & 1).bool(), flip ^ ((1 << bit) - 1), flip)
    x = [part ^ flip for part in x]
    at = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for part in x:
            at = at << 1 | (part >> bit & 1)
    return at


def _check(points, bits, mask):
    if not isinstance(points, torch.Tensor):
        raise TypeError(f"points: got {type(points).__name__}, expected a tensor")
    if points.dtype == torch.bool or points.is_complex():
        raise TypeError(f"points: got {points.dtype}, expected an integer or floating tensor")
    if points.dim() not in (2, 3) or points.shape[-1] not in (2, 3):
        raise ValueError(
            f"points: got shape {tuple(points.shape)}, expected (B, N, d) or (N, d), d 2 or 3"
        )
    if points.shape[-2] == 0:
        raise ValueError(f"points: got shape {tuple(points.shape)}, expected at least one point")
    most = 62 // points.shape[-1]
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"bits: got {bits!r}, expected an int or None")
    if not 1 <= bits <= most:
        raise ValueError(
            f"bits: got {bits}, expected 1 to {most} for points of {points.shape[-1]} dimensions"
        )
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"mask: got {kind}, expected a bool tensor or None")
    if mask.shape != points.shape[:-1]:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {tuple(points.shape[:-1])}"
        )
