"""layout=(H, W) and (T, H, W): blocks that are patches of a picture or a video."""

import math

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, DEVICES, Case, compare, limit, new_seed
from torch.nn import functional as F

import mra_attention as mra
from mra_attention.reference import mra_attention_reference

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
        return mra.mra_attention(
            q, k, v, case.key_mask, plan=plan, **case.values, return_lse=True
        )  # fmt: skip

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


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
    out = mra.mra_attention(case.q, case.k, case.v, *masks, plan=plan, pool="even")  # knows it
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
