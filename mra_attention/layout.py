"""``layout=(H, W)`` or ``(T, H, W)``: tokens of a picture or a video, in blocks that are patches.

Tokens come in raster order: along W first, then H, then T. They are put into *tiles*, boxes of
``b = max(bq, bk)`` tokens (with levels as many as the coarsest block), one tile after another:

- The edges of a tile are powers of two with the product b (:func:`tile_shape`): 8 x 8 for 64, 4 x 8
  for 32, 4 x 4 x 4 for 64 of a video; others where the sides of the picture would leave many
  places of those empty.
- Tiles follow each other in raster order. A tile is halved across its longest edge again and again
  (:func:`halvings`), one half after the other as in a Morton order, until its parts have as many
  tokens as the smaller block, ``min(bq, bk)``: so those are patches too. Inside of such a part the
  order is that of the raster: results depend on it by rounding alone, and copies are long.
- A side that the tile's edge doesn't divide is filled up with tokens that take no part.
- Of N tokens the first ``N - H * W`` are *leading* ones (a class token, registers): blocks of their
  own in front of the tiles, filled up to a multiple of b in the same way.

The reordering is made of views and copies (pad, unflatten, permute, flatten, cat), nothing is
looked up by index: its gradient is the reordering back, exact and deterministic. It costs a copy
each of query, key, value and the result, one more where tiles are filled up or tokens lead.
"""

import dataclasses
import math

import torch
from torch.nn import functional as F

from . import sharding

__all__ = ["Tiles", "check_call", "check_length", "fits", "halvings", "tile_shape"]


def tile_shape(layout, block):
    """Edges of a tile of ``block`` tokens, a tuple of powers of two; from the shapes alone.

    The most cube-like box (near-square, for a picture; a longer edge along W before H before T)
    that fills ``layout`` up to at most 3/2 of its tokens; if there is none, the one that fills it
    up least: 8 x 8 for 64 in 27 x 27, which becomes 32 x 32, but 4 x 16 in 3 x 500 and 1 x 64 in
    1 x 1000. Places without a token cost what others do; a cube that has some pays all the same:
    at one density a smooth picture of 27 x 27 errs a third more in tiles of 4 x 16, and a video of
    9 x 30 x 52 twice as much in 2 x 4 x 8 as in 4 x 4 x 4."""
    boxes, tokens = _boxes(len(layout), block.bit_length() - 1), math.prod(layout)
    for box in boxes:
        if 2 * math.prod(_filled(layout, box)) <= 3 * tokens:
            return box
    best = boxes[0]
    for box in boxes[1:]:
        if math.prod(_filled(layout, box)) < math.prod(_filled(layout, best)):
            best = box
    return best


def halvings(tile, size=1):
    """Which dimension each halving of a tile cuts, from the whole tile to parts of ``size`` tokens.

    Always the longest edge, the first of several: (4, 8) gives [1, 0, 1, 0, 1]."""
    edges, order = list(tile), []
    while math.prod(edges) > size:
        axis = edges.index(max(edges))
        edges[axis] //= 2
        order.append(axis)
    return order


def fits(layout, query, key, is_causal):
    """Whether a call on query, key (..., N, D), (..., M, D) is self-attention of such tokens."""
    N, M = query.shape[-2], key.shape[-2]
    return not is_causal and N == M and N >= math.prod(layout)


def check_length(layout, N, M):
    """N == M tokens, as many as the layout has or more."""
    if N != M:
        raise ValueError(
            f"layout: got {layout} with {N} queries and {M} keys, expected as many keys as "
            "queries: both are the tokens of the picture"
        )
    if N < math.prod(layout):
        raise ValueError(
            f"layout: got {layout}, {math.prod(layout)} tokens, with N = {N}, expected a layout of "
            "at most N tokens"
        )


def check_call(layout, query, key, value, key_mask, query_mask):
    """What reordering needs of query (B, H, N, D), key and value (B, Hk, N, D), masks (B, N) or
    None; the operators say what else is wrong. value: None where a call has none."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is not None and x.dim() != 4:
            raise ValueError(f"{name}: got {x.dim()} dimensions, expected 4: (B, heads, tokens, D)")
        if x is not None and x.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least one head")
    B, N = query.shape[0], query.shape[2]
    check_length(layout, N, key.shape[2])
    if value is not None and value.shape[2] != N:
        raise ValueError(f"value: got {value.shape[2]} tokens, expected those of key, {N}")
    for name, mask in (("key_mask", key_mask), ("query_mask", query_mask)):
        if mask is not None and tuple(mask.shape) != (B, N):
            raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected (B, N) = {(B, N)}")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How N tokens of a layout lie in blocks. Made by :meth:`of`.

    layout: the sides, (H, W) or (T, H, W). tile: its edges, as many. lead: leading tokens.
    size: tokens in the parts to which a tile is halved.
    """

    layout: tuple[int, ...]
    tile: tuple[int, ...]
    lead: int
    size: int

    @classmethod
    def of(cls, layout, N, sizes):
        """For N >= H * W tokens and blocks of these sizes: (bq, bk), with those of levels."""
        tile = tile_shape(layout, max(sizes))
        return cls(layout, tile, N - math.prod(layout), min(sizes))

    @property
    def grid(self):
        """Tiles along each side."""
        return tuple(-(-n // edge) for n, edge in zip(self.layout, self.tile, strict=True))

    @property
    def front(self):
        """Length of the leading blocks."""
        block = math.prod(self.tile)
        return -(-self.lead // block) * block

    @property
    def length(self):
        """Tokens in all blocks, those that fill them up included."""
        return self.front + math.prod(self.grid) * math.prod(self.tile)

    @property
    def filled(self):
        """Whether tokens were added, so that masks have to say which."""
        return self.front != self.lead or _filled(self.layout, self.tile) != self.layout

    def to_blocks(self, x, dim):
        """x with its N tokens along ``dim`` in blocks, ``length`` of them; new ones are zeros."""
        after = x.dim() - dim - 1  # dimensions behind
        lead, picture = x.split([self.lead, x.shape[dim] - self.lead], dim)
        picture = picture.unflatten(dim, self.layout)
        if self._full != self.layout:
            picture = _zeros_behind(picture, dim, self._full)
        for axis in reversed(range(len(self.tile))):
            picture = picture.unflatten(dim + axis, self._cuts(axis))
        order, _ = self._order()
        blocks = picture.permute(_around(dim, order, after)).flatten(dim, dim + len(order) - 1)
        if self.lead == 0:
            return blocks
        if self.front != self.lead:
            lead = _zeros_behind(lead, dim, (self.front,))
        return torch.cat([lead, blocks], dim)

    def to_tokens(self, x, dim):
        """The inverse: x with ``length`` tokens along ``dim`` in raster order, N of them,
        contiguous."""
        after = x.dim() - dim - 1
        lead, blocks = x.split([self.front, x.shape[dim] - self.front], dim)
        order, sizes = self._order()
        back = sorted(range(len(order)), key=order.__getitem__)
        picture = blocks.unflatten(dim, sizes).permute(_around(dim, back, after))
        picture = picture.reshape(*x.shape[:dim], *self._full, *x.shape[dim + 1 :])
        for axis, side in enumerate(self.layout):
            picture = picture.narrow(dim + axis, 0, side)
        picture = picture.flatten(dim, dim + len(self.layout) - 1)
        if self.lead == 0:
            return picture.contiguous()
        return torch.cat([lead.narrow(dim, 0, self.lead), picture], dim)

    def heads(self, x):
        """:meth:`to_blocks` of (B, H, N, D), in (B, N, H, D) memory."""
        return self.to_blocks(x.transpose(1, 2), 1).transpose(1, 2)

    def masks(self, key_mask, query_mask, query):
        """Masks (B, N) or None in blocks: (key_mask, query_mask), made where tokens were added."""
        if not self.filled:
            return tuple(
                mask if mask is None else self.to_blocks(mask, 1) for mask in (key_mask, query_mask)
            )
        there = None
        if key_mask is None or query_mask is None:
            there = self.to_blocks(torch.ones_like(query[:, 0, :, 0], dtype=torch.bool), 1)
        return tuple(
            there if mask is None else self.to_blocks(mask, 1) for mask in (key_mask, query_mask)
        )

    @property
    def _full(self):
        return _filled(self.layout, self.tile)

    def _cuts(self, axis):
        """The factors of a side: tiles, a 2 for each halving, the edge of what is not halved."""
        halved = halvings(self.tile, self.size).count(axis)
        return [self.grid[axis], *[2] * halved, self.tile[axis] >> halved]

    def _order(self):
        """The order of blocks as one of the factors of all sides, one side's behind the other's:
        where each dimension of it stands among them, and its size."""
        cuts = [self._cuts(axis) for axis in range(len(self.tile))]
        starts = [sum(map(len, cuts[:axis])) for axis in range(len(cuts))]
        used = [0] * len(cuts)
        order, axes = [], range(len(cuts))
        for axis in [*axes, *halvings(self.tile, self.size), *axes]:
            order.append(starts[axis] + used[axis])
            used[axis] += 1
        sizes = [n for side in cuts for n in side]
        return order, [sizes[at] for at in order]


def _boxes(dims, bits):
    """Boxes of 2^bits tokens, the most cube-like first; among rotations the longer edges last."""
    if dims == 1:
        return [(1 << bits,)]
    boxes = [(1 << n, *rest) for n in range(bits + 1) for rest in _boxes(dims - 1, bits - n)]
    return sorted(boxes, key=lambda box: (sum(edge * edge for edge in box), box))


def _filled(layout, tile):
    return tuple(-(-n // edge) * edge for n, edge in zip(layout, tile, strict=True))


def _zeros_behind(x, dim, sizes):
    """x with zeros behind it, up to ``sizes`` of the dimensions from ``dim`` on."""
    if type(x) is not torch.Tensor and sharding.is_dtensor(x):  # whose pad gathers it
        for at, size in enumerate(sizes, dim):
            missing = [*x.shape[:at], size - x.shape[at], *x.shape[at + 1 :]]
            x = torch.cat([x, x.new_zeros(missing)], at)
        return x
    more = [0, 0] * (x.dim() - dim - len(sizes))
    for at in reversed(range(len(sizes))):
        more += [0, sizes[at] - x.shape[dim + at]]
    return F.pad(x, more)


def _around(dim, order, after):
    """A permutation of the dimensions from ``dim`` on, those before and behind kept."""
    middle = [dim + n for n in order]
    end = dim + len(order)
    return [*range(dim), *middle, *range(end, end + after)]
