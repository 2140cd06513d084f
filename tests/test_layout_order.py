"""layout: the order of a picture's tokens in which blocks are patches."""

import contextlib
import math

import pytest
import torch
from test_layout import CASES
from torch.fx.experimental.proxy_tensor import make_fx

import mra_attention as mra
from mra_attention import layout as layouts
from mra_attention.layout import Tiles, tile_shape
from mra_attention.reference import patches


def order_of(tiles):
    """The token at each place, -1 where there is none."""
    return tiles.orders(torch.empty(0))[0].long()


def coordinates_in_order(layout, *sizes):
    order = order_of(Tiles.of(layout, math.prod(layout), sizes))
    return torch.cartesian_prod(*map(torch.arange, layout))[order]


@pytest.mark.parametrize(
    "layout, block, tile",
    [
        ((64, 64), 16, (4, 4)), ((64, 64), 32, (4, 8)), ((64, 64), 64, (8, 8)),
        ((64, 64), 128, (8, 16)), ((16, 16, 16), 16, (2, 2, 4)), ((16, 16, 16), 32, (2, 4, 4)),
        ((16, 16, 16), 64, (4, 4, 4)), ((16, 16, 16), 128, (4, 4, 8)),
        # sides that no tile divides
        ((14, 14), 64, (8, 8)), ((27, 27), 64, (8, 8)), ((17, 28), 64, (8, 8)),
        ((5, 5), 64, (8, 8)), ((9, 30, 52), 64, (4, 4, 4)),
        # thin pictures, and videos of few frames
        ((1, 1000), 64, (1, 64)), ((1000, 1), 64, (64, 1)), ((3, 500), 64, (4, 16)),
        ((5, 500), 64, (8, 8)), ((1, 32, 32), 64, (1, 8, 8)), ((2, 32, 32), 64, (2, 4, 8)),
        ((3, 32, 32), 64, (4, 4, 4)),
        # less than a tile
        ((3, 3), 64, (8, 8)), ((3, 20), 64, (4, 16)),
    ],
)  # fmt: skip
def test_tile_shape(layout, block, tile):
    assert tile_shape(layout, block) == tile


@pytest.mark.parametrize(
    "layout", [(1, 1), (7, 1), (2, 3), (33, 9), (40, 41), (3, 5, 9), (9, 9, 9)]
)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("lead", [0, 1, 200])
def test_only_leading_blocks_are_filled_up(layout, block, lead):
    N = lead + math.prod(layout)
    tiles = Tiles.of(layout, N, (block, 16))
    assert math.prod(tiles.shapes[0]) == block
    assert tiles.front % block == 0 and 0 <= tiles.front - lead < block
    assert tiles.length - tiles.front == N - lead
    assert tiles.filled == (tiles.front > lead)


@pytest.mark.parametrize(
    "layout, block",
    [
        ((16, 24), 32), ((24, 32), 64), ((16, 48), 128), ((4, 128), 64), ((64, 2), 64),
        ((8, 8, 12), 64), ((2, 8, 24), 64), ((8, 4, 16), 128),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [16, 32, "block"])
def test_blocks_are_tiles_where_their_edges_divide_the_sides(layout, block, size):
    """The larger blocks, and the smaller ones too."""
    size = block if size == "block" else size
    order = coordinates_in_order(layout, block, size)
    assert len(order.unique(dim=0)) == math.prod(layout)
    for run in (block, size):
        runs = order.view(-1, run, len(layout))
        edges = runs.amax(1) - runs.amin(1) + 1
        assert (edges == torch.tensor(tile_shape(layout, run))).all()


@pytest.mark.parametrize(
    "layout", [(37, 55), (27, 27), (53, 80), (9, 30, 20), (21, 45, 8), (3, 24, 24)]
)
def test_blocks_are_patches_whatever_the_sides(layout):
    """The box around a run is little larger than the run, at the ends of strips too."""
    order = coordinates_in_order(layout, 64)
    runs = order[: len(order) // 64 * 64].view(-1, 64, len(layout))
    edges = runs.amax(1) - runs.amin(1) + 1
    assert edges.double().log().mean(0).exp().prod() < 1.7 * 64
    assert (edges.amax(0) <= 3 * torch.tensor(tile_shape(layout, 64))).all()
    steps = (order[1:] - order[:-1]).abs()
    assert steps[:, -1].max() <= 1  # columns are beside each other


def test_order_by_hand():
    """5 x 7 behind one token more, for blocks smaller than any that attention takes."""
    # Token 0; rows 1 to 7, 8 to 14, 15 to 21, 22 to 28, 29 to 35.
    front = [0] + [-1] * 7
    # Patches of 2 x 4: strips of one row, two rows, two rows.
    assert order_of(Tiles((5, 7), ((2, 4),), 1)).tolist() == front + [
        1, 2, 3, 4, 5, 6, 7,
        14, 21, 13, 20, 12, 19, 11, 18, 10, 17, 9, 16, 8, 15,
        22, 29, 23, 30, 24, 31, 25, 32, 26, 33, 27, 34, 28, 35,
    ]  # fmt: skip
    # Also of 1 x 2, rows in a tile: 4 x 4 are two tiles, and so are 4 x 3; then 1 x 4, 1 x 3.
    assert order_of(Tiles((5, 7), ((2, 4), (1, 2)), 1)).tolist() == front + [
        1, 2, 3, 4, 11, 10, 9, 8,
        18, 17, 16, 15, 22, 23, 24, 25,
        5, 6, 7, 14, 13, 12,
        21, 20, 19, 26, 27, 28,
        29, 30, 31, 32,
        33, 34, 35,
    ]  # fmt: skip


def test_order_of_a_video_by_hand():
    """3 x 3 x 2 for patches of 2 x 2 x 2: a frame and a slab of two frames, each in a strip of one
    row and one of two; in the second slab the row is the last one."""
    assert order_of(Tiles((3, 3, 2), ((2, 2, 2),), 0)).tolist() == [
        0, 1,
        3, 5, 2, 4,
        10, 16, 11, 17,
        9, 7, 15, 13, 8, 6, 14, 12,
    ]  # fmt: skip


@pytest.mark.parametrize("block_size", [None, (128, 16), (1024, 64, 16)])
@pytest.mark.parametrize("layout, lead, own", CASES)
def test_order_and_back(layout, lead, own, block_size):
    """Arithmetic gives what the reference gets by sorting; tensors of all ranks, any strides."""
    N = lead + math.prod(layout)
    tiles = Tiles.of(layout, N, own if block_size is None else block_size)
    at, length = patches(layout, N, own if block_size is None else block_size)
    assert length == tiles.length and tiles.filled == (length != N)
    assert torch.equal(tiles.orders(at)[1], at.int())
    for x in (
        torch.randn(2, 5, N, 3).transpose(1, 3), torch.randn(2, 3, N), torch.randn(N, 2).mT,
        torch.randn(2, N) < 0,
    ):  # fmt: skip
        (blocks,) = tiles.to_blocks(x)
        dim = min(x.dim() - 1, 2)
        assert torch.equal(blocks.index_select(dim, at), x)
        assert blocks.count_nonzero() == x.count_nonzero()
        (back,) = tiles.to_tokens(blocks)
        assert torch.equal(back, x)
        for y in (blocks, back):
            assert (y.transpose(1, 2) if y.dim() == 4 else y).is_contiguous()


def test_orders_are_made_once():
    x = torch.empty(0)
    with torch.inference_mode():
        first = Tiles.of((11, 13), 150, (64, 64)).orders(x)
    assert not first[0].is_inference()
    again = Tiles.of((11, 13), 150, (64, 64)).orders(x)
    assert all(a is b for a, b in zip(first, again, strict=True))
    for W in range(2, 300):
        Tiles.of((3, W), 3 * W, (64, 64)).orders(x)
    assert len(layouts._kept) <= layouts.MOST_KEPT


@pytest.mark.parametrize("first", ["real", "fake"])
def test_fake_tensors(first):
    """Kept index tensors are real, and only for real tensors."""
    H = dict(real=11, fake=12)[first]

    def attend(N):
        q = torch.randn(1, 2, N, 8)
        return mra.mra_attention(q, q, q, layout=(H, 13), block_size=16)

    for kind in ("real", "fake", "real") if first == "real" else ("fake", "real"):
        with torch._subclasses.FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
            assert attend(2 + H * 13).shape == (1, 2, 2 + H * 13, 8)
    traced = make_fx(lambda q: mra.mra_attention(q, q, q, layout=(H, 13)), tracing_mode="symbolic")
    q = torch.randn(1, 2, 3 + H * 13, 8)
    assert torch.equal(traced(q)(q), mra.mra_attention(q, q, q, layout=(H, 13)))
