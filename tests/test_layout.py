"""layout=(H, W) and (T, H, W): blocks that are patches of a picture or a video."""

import contextlib
import math

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, DEVICES, Case, compare, limit, new_seed
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mra_attention as mra
from mra_attention import layout as layouts
from mra_attention.layout import Tiles, tile_shape
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


# The plan


@pytest.mark.parametrize("device", DEVICES)
def test_plan_knows_its_layout(device):
    case = LayoutCase(device, torch.float32, (13, 21), 5, (32, 64), masks="both")
    plan = case.plan()
    # 13 x 21 are 273 tokens, the last of them in a short block; one of 64 is in front.
    assert (plan.nq, plan.nk, plan.shape) == (11, 6, (2, 4, 278, 278))
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
    """From shapes alone: one leading block and 1620 tokens, 50 blocks and a short one."""
    q = torch.randn(1, 1, 27 * 60 + 1, 8)
    plan = mra.make_plan(q, q, block_size=32, density=1 / 4, layout=(27, 60))
    assert (plan.nq, plan.nk) == (52, 52)
    assert plan.row_count.unique().tolist() == [13]  # ceil(52 / 4)


def test_plot_shows_the_blocks_of_tiles():
    pytest.importorskip("matplotlib").use("Agg")
    q = torch.randn(1, 1, 101, 8)
    ax = mra.make_plan(q, q, block_size=32, density=0.3, layout=(10, 10)).plot()
    assert "(10, 10)" in ax.get_xlabel() and ax.get_xlim() == (0, 132)


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
    """The layout may come from a shape: one graph as long as patches have one shape (and for any
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
        for shape in ((5, 33, 41, 3), (4, 50, 27, 7), (2, 32, 40, 5), (3, 31, 63, 40)):
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
