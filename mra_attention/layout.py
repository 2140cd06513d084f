"""``layout=(H, W)`` or ``(T, H, W)``: tokens of a picture or a video, in blocks that are patches.

Tokens come in raster order: along W first, then H, then T. They are put into *strips*, across which
a block of ``b`` tokens is a near-square patch (:func:`tile_shape`: 8 x 8 for 64, 4 x 8 for 32, 4 x
4 x 4 for 64 of a video):

- Strips run along W. H is cut into round(H / edge) of them, edge that of the patch, of heights that
  differ by one token at most, the lower ones first; and so is T. Tokens go along a strip column by
  column, so that each run of b of them is a patch, whatever the sides are.
- Every second strip runs backwards, and so do the strips of every second slab of a video: each
  begins where the one before has ended, and runs across the ends of strips are patches too.
- Blocks of several sizes (queries, keys, levels) nest. The largest size cuts each side in two, what
  its edge divides and the rest, and so a picture into regions, one behind the other and in strips
  of their own; the first one holds whole tiles alone. Strips are cut into tiles as long as a patch,
  the last one is what is left, and each tile lies in strips for the next size.
- Nothing is filled up: blocks are runs of b tokens, and the last one may be short as in any
  sequence. Where the edges divide the sides, blocks are the tiles of a grid.
- Of N tokens the first ``N - H * W`` are *leading* ones (a class token, registers): blocks of their
  own in front, filled up to a multiple of the largest b with tokens that take no part.

The place of each token is arithmetic on its coordinates (:func:`_places`): no size in a traced
program depends on how the sides divide. The operator ``reorder`` moves the rows by an index, query,
key and value in one launch; its gradient is the reordering back, exact and deterministic.
"""

import collections
import dataclasses
import functools
import math

import torch

from . import sharding, transforms

__all__ = ["Tiles", "check_call", "check_length", "fits", "tile_shape"]


def tile_shape(layout, block):
    """Edges of a patch of ``block`` tokens, a tuple of powers of two; from the shapes alone.

    The most cube-like box (near-square, for a picture; a longer edge along W before H before T)
    without an edge of twice its side or more, as a video of one frame would have in 4 x 4 x 4; of
    all boxes where there is none."""
    boxes = _boxes(len(layout), block.bit_length() - 1)
    for box in boxes:
        if all(edge < 2 * n for edge, n in zip(box, layout, strict=True)):
            return box
    return boxes[0]


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

    layout: the sides, (H, W) or (T, H, W). shapes: those of patches, as many edges each, for every
    size of blocks, the largest first. lead: leading tokens.
    """

    layout: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    lead: int

    @classmethod
    def of(cls, layout, N, sizes):
        """For N >= H * W tokens and blocks of these sizes: (bq, bk), with those of levels."""
        if torch.compiler.is_compiling() or not _are_ints(N, *layout):
            return _tiles_of.__wrapped__(layout, N, sizes)
        return _tiles_of(layout, N, sizes)

    @property
    def front(self):
        """Length of the leading blocks."""
        block = math.prod(self.shapes[0])
        return -(-self.lead // block) * block

    @property
    def length(self):
        """Tokens in all blocks, those that fill up the leading ones included."""
        return self.front + math.prod(self.layout)

    @property
    def filled(self):
        """Whether tokens were added, so that masks have to say which."""
        return self.front != self.lead

    def to_blocks(self, *tensors):
        """A list of tensors (B, heads, N, D), (B, heads, N) or (B, N) with their tokens in blocks,
        ``length`` of them; new ones are zeros. The first lie as (B, length, heads, D), the others
        are contiguous."""
        return self._reorder(tensors, back=False)

    def to_tokens(self, *tensors):
        """The inverse: of ``length`` tokens, N in the order of the sequence."""
        return self._reorder(tensors, back=True)

    def masks(self, key_mask, query_mask, query):
        """Masks (B, N) or None in blocks: (key_mask, query_mask), made where tokens were added."""
        given = [mask for mask in (key_mask, query_mask) if mask is not None]
        given = self.to_blocks(*given) if given else []
        there = None
        if self.filled and len(given) < 2:
            if sharding.is_dtensor(query):
                there = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool)
                (there,) = self.to_blocks(there)
            else:
                index, _ = self.orders(query)
                there = (index >= 0).expand(query.shape[0], -1)
        return tuple(there if mask is None else given.pop(0) for mask in (key_mask, query_mask))

    def orders(self, like):
        """(index, inverse), int32 on the device of ``like``: the token at each of ``length``
        places, -1 where there is none, and the place of each of N tokens."""
        device, plain = like.device, type(like) in (torch.Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or not _are_ints(self.lead, *self.layout):
            return self._make_orders(device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # One for each stream: work of another may not have written it yet. A capture begins when
        # all streams have been waited for, and must find what it uses again at each replay.
        stream = None
        if device.type == "cuda" and not capturing:
            stream = torch.cuda.current_stream(device).cuda_stream
        orders = _captured.get((self, device)) if capturing else None
        orders = orders or _kept.get((self, device, stream))
        if orders is not None:
            if capturing:
                _captured[self, device] = orders
            return orders
        with torch.inference_mode(False):
            orders = self._make_orders(device)
        if not capturing and not transforms.active() and type(orders[0]) is torch.Tensor:
            for key in {stream, None}:
                _kept[self, device, key] = orders
            while len(_kept) > MOST_KEPT:
                _kept.popitem(last=False)
        return orders

    def _make_orders(self, device):
        inverse = _places(self.layout, self.shapes, device).flatten()
        if self.lead != 0:
            lead = torch.arange(self.lead, device=device)
            inverse = torch.cat([lead, inverse + self.front])
        tokens = torch.arange(inverse.shape[0], dtype=torch.int32, device=device)
        index = torch.full((self.length,), -1, dtype=torch.int32, device=device)
        return index.scatter(0, inverse, tokens), inverse.int()

    def _reorder(self, tensors, back):
        if any(type(x) is not torch.Tensor and sharding.is_dtensor(x) for x in tensors):
            return [self._reorder_locally(x, back) for x in tensors]
        first = tensors[0]
        if any(x.dtype != first.dtype or x.device != first.device for x in tensors):
            return [self._reorder([x], back)[0] for x in tensors]
        index, inverse = self.orders(first)
        if back:
            index, inverse = inverse, index
        rows = [_as_rows(x) for x in tensors]
        reorder = transforms.reorder if transforms.active() else torch.ops.mra_attention.reorder
        rows = reorder(rows, index, inverse)
        return [_from_rows(x, like) for x, like in zip(rows, tensors, strict=True)]

    def _reorder_locally(self, x, back):
        if x.dim() < 4:
            return sharding.locally(lambda x: self._reorder([x], back)[0], x, x.dim() - 1)
        x = x.transpose(1, 2)  # as its rows lie
        move = lambda x: self._reorder([x.transpose(1, 2)], back)[0].transpose(1, 2)  # noqa: E731
        return sharding.locally(move, x, 1).transpose(1, 2)


MOST_KEPT = 64  # pairs of index tensors
_kept = collections.OrderedDict()  # (Tiles, device, stream): the last one of any stream for None
_captured = {}  # those that CUDA graphs read, for good


def _are_ints(*numbers):
    """None of them a symbol."""
    return all(type(n) is int for n in numbers)


@functools.lru_cache(256)
def _tiles_of(layout, N, sizes):
    shapes = [tile_shape(layout, size) for size in sorted(set(sizes), reverse=True)]
    return Tiles(layout, tuple(shapes), N - math.prod(layout))


def _as_rows(x):
    """x as (B, heads, N, D), its tokens in the third dimension; a view where x is contiguous."""
    return x if x.dim() == 4 else x.flatten(0, -2)[:, None, :, None]


def _from_rows(rows, like):
    """The inverse, of rows with another number of tokens."""
    if like.dim() == 4:
        return rows
    return rows[:, 0, :, 0].unflatten(0, like.shape[:-1])


def _places(layout, shapes, device):
    """Where each token of the picture stands among its tokens, a tensor with the sides of it."""
    dims = range(len(layout))
    at = [torch.arange(n, device=device).view([-1 if a == b else 1 for b in dims])
          for a, n in enumerate(layout)]  # coordinates in a box  # fmt: skip
    sides = [torch.full([1] * len(layout), n, device=device) for n in layout]  # of that box
    place = torch.zeros_like(sides[0])
    if len(shapes) > 1:
        before, cuts = 1, [n // edge * edge for n, edge in zip(layout, shapes[0], strict=True)]
        for axis, cut in enumerate(cuts):
            behind = at[axis] >= cut
            place = place + behind * before * cut * math.prod(layout[axis + 1 :])
            at[axis] = at[axis] - behind * cut
            sides[axis] = behind * (sides[axis] - 2 * cut) + cut
            before = before * sides[axis]
    for shape in shapes:
        within, inside, turns = [], 1, 0  # inside: tokens in what is cut already, across the others
        for axis, edge in enumerate(shape):
            c, n = at[axis], sides[axis]
            if axis > 0:
                c = torch.where(turns % 2 == 1, n - 1 - c, c)
            if axis == dims[-1]:  # tiles
                start = c // edge * edge
                size = (n - start).clamp(max=edge)
                place = place + start * inside
            else:
                count = ((2 * n + edge) // (2 * edge)).clamp(min=1)
                size, lower = n // count, count - n % count
                strip = torch.where(
                    c < lower * size, c // size, lower + (c - lower * size) // (size + 1)
                )
                start, size = strip * size + (strip - lower).clamp(min=0), size + (strip >= lower)
                place = place + start * inside * math.prod(sides[axis + 1 :])
                inside, turns = inside * size, turns * count + strip
            within.append((c - start, size))
        at, sides = (list(x) for x in zip(*within, strict=True))
    offset = at[-1]  # column by column
    for c, n in zip(at[:-1], sides[:-1], strict=True):
        offset = offset * n + c
    return place + offset


def _boxes(dims, bits):
    """Boxes of 2^bits tokens, the most cube-like first; among rotations the longer edges last."""
    if dims == 1:
        return [(1 << bits,)]
    boxes = [(1 << n, *rest) for n in range(bits + 1) for rest in _boxes(dims - 1, bits - n)]
    return sorted(boxes, key=lambda box: (sum(edge * edge for edge in box), box))
