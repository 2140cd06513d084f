"""layout=(H, W) and (T, H, W): blocks that are patches of a picture or a video."""

import itertools
import math

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, DEVICES, Case, compare, limit, new_seed
from torch.nn import functional as F

import mra_attention as mra
from mra_attention.layout import Tiles, halvings, tile_shape
from mra_attention.reference import mra_attention_reference, patches

# (layout, leading tokens, block_size): sides that tiles divide and sides that they don't, video.
CASES = [
    ((16, 16), 0, (32, 32)),
    ((14, 14), 1, (64, 64)),
    ((13, 21), 5, (32, 32)),
    ((9, 30), 0, (64, 16)),
    ((17, 12), 70, (32, 64)),
    ((3, 70), 2, (32, 32)),
    ((1, 150), 0, (16, 32)),
    ((4, 8, 8), 0, (64, 64)),
    ((3, 9, 10), 1, (16, 64)),
]


class LayoutCase(Case):
    def __init__(self, device, dtype, layout, lead, block_size, **options):
        N = lead + math.prod(layout)
        super().__init__(
            device, dtype, N=N, M=N, layout=layout, block_size=block_size, **options
        )  # fmt: skip


def cuda_blocks(device, block_size):
    if device == "cuda" and block_size[0] < 32:
        pytest.skip("query blocks of CUDA start at 32")


@pytest.mark.parametrize("masks", ["none", "both", "padding"])
@pytest.mark.parametrize("layout, lead, block_size", CASES)
@pytest.mark.parametrize("device, dtype", BEST)
def test_against_reference(device, dtype, layout, lead, block_size, masks):
    """Forward and gradients; grouped-query heads."""
    cuda_blocks(device, block_size)
    LayoutCase(device, dtype, layout, lead, block_size, masks=masks).check()


@pytest.mark.parametrize(
    "options",
    [
        dict(coarse="none"), dict(coarse="block", order=0), dict(coarse="block"),
        dict(selection="global", coarse="block"), dict(diagonal_blocks=3, first_blocks=1),
        dict(blocks_per_row=2, scale=0.3),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_forms_against_reference(device, dtype, options):
    LayoutCase(device, dtype, (13, 21), 5, (32, 32), masks="both", **options).check()


@pytest.mark.parametrize("layout, lead, block_size", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_density_1_is_exact_attention(device, layout, lead, block_size):
    cuda_blocks(device, block_size)
    case = LayoutCase(device, torch.float32, layout, lead, block_size, masks="key", density=1.0)
    q, k, v = case.q, case.k, case.v
    out = mra.mra_attention(q, k, v, case.key_mask, **case.options)
    wide = (x.double() for x in (q, k, v))
    mask = case.key_mask[:, None, None, :]
    exact = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    error = (out - exact).norm() / exact.norm()
    assert error <= (1e-6 if device == "cpu" else limit(torch.float32, device, 0))
    assert out.transpose(1, 2).is_contiguous()  # (B, N, H, D) memory


@pytest.mark.parametrize("form", [("none", 0), ("block", 1), ("row", 1)])
@pytest.mark.parametrize("layout, lead", [((5, 7), 3), ((2, 5, 5), 0)])
def test_gradcheck(form, layout, lead):
    case = LayoutCase(
        "cpu", torch.float64, layout, lead, (16, 16), B=1, H=2, Hk=1, D=8, blocks_per_row=1,
        coarse=form[0], order=form[1], masks="key", spread=0.7,
    )  # fmt: skip
    plan = case.plan()
    assert 0 < plan.density() < 1

    def attend(q, k, v):
        options = dict(plan=plan, coarse=form[0], order=form[1], return_lse=True)
        return mra.mra_attention(q, k, v, case.key_mask, **options)

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


# The order of tokens


@pytest.mark.parametrize(
    "layout, block, tile",
    [
        ((64, 64), 16, (4, 4)), ((64, 64), 32, (4, 8)), ((64, 64), 64, (8, 8)),
        ((64, 64), 128, (8, 16)), ((16, 16, 16), 16, (2, 2, 4)), ((16, 16, 16), 32, (2, 4, 4)),
        ((16, 16, 16), 64, (4, 4, 4)), ((16, 16, 16), 128, (4, 4, 8)),
        # filled up to 256 / 196 and 1024 / 729; to 640 / 476, where 8 x 8 would make 768
        ((14, 14), 64, (8, 8)), ((27, 27), 64, (8, 8)), ((17, 28), 64, (4, 16)),
        # thin pictures, and videos of few frames
        ((1, 1000), 64, (1, 64)), ((1000, 1), 64, (64, 1)), ((3, 500), 64, (4, 16)),
        ((4, 500), 64, (4, 16)), ((1, 32, 32), 64, (1, 8, 8)), ((2, 32, 32), 64, (2, 4, 8)),
        # small: the least that there is
        ((3, 3), 64, (8, 8)), ((10, 10), 32, (2, 16)),
    ],
)  # fmt: skip
def test_tile_shape(layout, block, tile):
    assert tile_shape(layout, block) == tile


@pytest.mark.parametrize(
    "layout", [(1, 1), (7, 1), (2, 3), (33, 9), (40, 41), (3, 5, 9), (9, 9, 9)]
)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_tiles_fill_up_little(layout, block):
    """At most by a half, or else less than any other box of powers of two."""
    least = min(
        math.prod(-(-n // 2**bit) * 2**bit for n, bit in zip(layout, bits, strict=True))
        for bits in itertools.product(range(8), repeat=len(layout))
        if 2 ** sum(bits) == block
    )
    tiles = Tiles.of(layout, math.prod(layout), (block, 16))
    assert math.prod(tiles.tile) == block
    assert tiles.length <= max(least, 3 / 2 * math.prod(layout))


@pytest.mark.parametrize("tile", [(4, 8), (8, 8), (8, 16), (1, 64), (64, 1), (4, 4, 4), (2, 4, 8)])
@pytest.mark.parametrize("size", [1, 16, "tile"])
def test_every_aligned_run_of_a_tile_is_a_patch(tile, size):
    """Of 2^n tokens, from the smaller block on. (The half of a square is the next tile's shape.)"""
    size = math.prod(tile) if size == "tile" else size
    layout = [2 * edge for edge in tile]  # more tiles than one
    N = math.prod(layout)
    coordinates = torch.cartesian_prod(*map(torch.arange, layout))
    order = Tiles(tuple(layout), tile, 0, size).to_blocks(coordinates, 0)
    assert order.unique(dim=0).shape == coordinates.shape
    run = size
    while run <= math.prod(tile):
        runs = order.view(N // run, run, len(tile))
        edges = runs.amax(1) - runs.amin(1) + 1
        assert (edges.prod(-1) == run).all()  # as many tokens as the box around them has
        assert (edges == edges[0]).all()
        if max(tile) <= 2 * min(tile):
            assert edges[0].max() <= 2 * edges[0].min()
        run *= 2


def test_order_by_hand():
    """4 x 6 with tiles of 2 x 4 (blocks of 8 and less, smaller than any that attention takes)."""
    assert halvings((2, 4)) == [1, 0, 1] and halvings((2, 4), 4) == [1] and not halvings((2, 4), 8)
    _, x = 0, torch.arange(1, 26)
    for size in (4, 2):  # the first halves of 2 x 2 are its rows
        order = Tiles((4, 6), (2, 4), 1, size).to_blocks(x, 0)
        assert order.tolist() == [
        1, _, _, _, _, _, _, _,
        2, 3, 8, 9, 4, 5, 10, 11,
        6, 7, 12, 13, _, _, _, _,
        14, 15, 20, 21, 16, 17, 22, 23,
        18, 19, 24, 25, _, _, _, _,
        ]  # fmt: skip
    assert Tiles((4, 6), (2, 4), 1, 8).to_blocks(x, 0).tolist() == [
        1, _, _, _, _, _, _, _,
        2, 3, 4, 5, 8, 9, 10, 11,
        6, 7, _, _, 12, 13, _, _,
        14, 15, 16, 17, 20, 21, 22, 23,
        18, 19, _, _, 24, 25, _, _,
    ]  # fmt: skip


@pytest.mark.parametrize("layout, lead, block_size", CASES)
def test_order_and_back(layout, lead, block_size):
    """Views and copies give what the reference looks up by index; any dimension, any strides."""
    N = lead + math.prod(layout)
    tiles = Tiles.of(layout, N, block_size)
    at, length = patches(layout, N, block_size)
    assert length == tiles.length and tiles.filled == (length != N)
    x = torch.randn(2, 3, N, 5).transpose(0, 3)
    blocks = tiles.to_blocks(x, 2)
    assert torch.equal(blocks[:, :, at], x)
    assert blocks.count_nonzero() == x.count_nonzero()
    assert torch.equal(tiles.to_tokens(blocks, 2), x)


# The plan


@pytest.mark.parametrize("device", DEVICES)
def test_plan_knows_its_layout(device):
    case = LayoutCase(device, torch.float32, (13, 21), 5, (32, 64), masks="both")
    plan = case.plan()
    # 13 x 21 is filled up to 16 x 24, six tiles of 8 x 8, with one more in front.
    assert (plan.nq, plan.nk, plan.shape) == (14, 7, (2, 4, 278, 278))
    assert plan.layout == (13, 21) and "layout=(13, 21)" in repr(plan)
    again = mra.Plan.from_dense(plan.to_dense(), 278, 278, (32, 64), layout=[13, 21])
    assert torch.equal(again.to_dense(), plan.to_dense()) and again.layout == plan.layout
    assert plan.to(device).layout == plan.layout
    own = case.ours()
    for given in (plan, again):
        results = case.ours(given)  # says the layout too
        assert all(torch.equal(own[name], results[name]) for name in own)
    masks = case.key_mask, case.query_mask
    out = mra.mra_attention(case.q, case.k, case.v, *masks, plan=plan)  # knows it
    assert torch.equal(out, own["out"])


def test_budget_counts_the_blocks_of_tiles():
    """From shapes alone: 7 x 8 tiles of 4 x 8 for 27 x 60, and one leading block."""
    q = torch.randn(1, 1, 27 * 60 + 1, 8)
    plan = mra.make_plan(q, q, block_size=32, density=1 / 4, layout=(27, 60))
    assert (plan.nq, plan.nk) == (57, 57)
    assert plan.row_count.unique().tolist() == [15]  # ceil(57 / 4)


def test_plot_shows_the_blocks_of_tiles():
    pytest.importorskip("matplotlib").use("Agg")
    q = torch.randn(1, 1, 101, 8)
    ax = mra.make_plan(q, q, block_size=32, density=0.3, layout=(10, 10)).plot()
    assert "(10, 10)" in ax.get_xlabel() and ax.get_xlim() == (0, 192)


# What a layout is for


@pytest.mark.parametrize("form", [("none", 0), ("block", 1), ("row", 1)])
def test_smooth_picture_is_approximated_better(form):
    seed = new_seed()
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2 * 16 * 16, 1, 5, 17, generator=g)  # 16 pictures: one may go either way
    fine = F.interpolate(coarse, (16, 64), mode="bicubic", align_corners=True)
    k, v = fine.view(2, 1, 16, 16, 1024).mT
    q = 4 * k
    exact = F.scaled_dot_product_attention(q, k, v)
    options = dict(block_size=64, density=1 / 8, coarse=form[0], order=form[1])
    errors = [
        (mra.mra_attention(q, k, v, layout=layout, **options) - exact).norm() / exact.norm()
        for layout in (None, (16, 64))
    ]
    assert errors[1] < 0.9 * errors[0], seed


# torch's own tools


def with_gradients(function, inputs):
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out, wanted = function(*inputs), [x for x in inputs if x.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel()).view_as(out))]


def same(function, other, inputs):
    for expected, got in zip(*(with_gradients(f, inputs) for f in (function, other)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def random(B, N):
    return [*torch.randn(3, B, 2, N, 16).unbind(0)]


def test_compiles_whole_for_pictures_of_all_sizes():
    """The layout may come from a shape: one graph as long as tiles have one shape (and for any
    number of leading tokens but 0 and 1, which torch takes for constants)."""

    def attend(q, k, v, picture):
        layout = picture.shape[-2:]
        return mra.mra_attention(q, k, v, layout=layout, density=0.3, block_size=32)

    def inputs(B, H, W, lead):
        return [*random(B, lead + H * W), torch.zeros(1, H, W, dtype=torch.bool)]

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    same(attend, compiled, inputs(3, 29, 37, 2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((5, 33, 41, 3), (4, 50, 27, 7)):
            same(attend, compiled, inputs(*shape))


@pytest.mark.parametrize("layout, lead, block_size", CASES[2:5])
def test_compiles_whole_with_dynamic_batch(layout, lead, block_size):
    """A plan made inside and one from outside, masks, the lse."""
    options = dict(layout=layout, density=0.3, block_size=block_size)
    N = lead + math.prod(layout)

    def attend(q, k, v, mask, given):
        plan = mra.make_plan(q, k, mask, mask, **options)
        out, lse = mra.mra_attention(q, k, v, mask, mask, plan=plan, return_lse=True)
        return out + mra.mra_attention(q, k, v, mask, plan=given) + lse.clamp(min=0).unsqueeze(-1)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for B in (2, 3, 5):
        inputs, mask = random(B, N), Case._lengths(B, N)
        given = mra.make_plan(*inputs[:2], **options)
        with torch._dynamo.config.patch(error_on_recompile=B == 5):
            same(
                lambda *x, mask=mask, given=given: attend(*x, mask, given),
                lambda *x, mask=mask, given=given: compiled(*x, mask, given),
                inputs,
            )


def test_vmap_and_torch_func():
    q, k, v = torch.randn(3, 3, 1, 2, 7 * 9 + 1, 16).unbind(0)

    def loss(q, k, v):
        return mra.mra_attention(q, k, v, layout=(7, 9), block_size=16, density=0.3).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    single = torch.stack([torch.func.grad(loss)(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(mapped, single)


def test_reference_takes_a_plan():
    case = LayoutCase("cpu", torch.float32, (13, 21), 5, (32, 32))
    wide = [x.double() for x in (case.q, case.k, case.v)]
    options = dict(layout=(13, 21), block_size=32)
    same = dict(density=0.3, return_lse=True, **options)
    plan = mra.make_plan(*wide[:2], density=0.3, **options)
    results = [mra.mra_attention(*wide, plan=plan, return_lse=True)]
    results.append(mra_attention_reference(*wide, plan=plan.to_dense(), return_lse=True, **options))
    results.append(mra_attention_reference(*wide, **same))
    ours, given, own = (dict(zip(("out", "lse"), r, strict=True)) for r in results)
    compare(ours, None, given, torch.float64, "cpu")
    compare(ours, None, own, torch.float64, "cpu")
