"""The Plan object: dense and back, density, devices, printing, drawing, compile, pytrees."""

import pytest
import torch
from helpers import DEVICES
from torch.utils import _pytree as pytree

import mra_attention as mra
from mra_attention import Plan
from mra_attention.reference import mra_attention_reference


def make(device="cpu", N=150, M=203, **options):
    q = torch.randn(2, 4, N, 16, device=device)
    k = torch.randn(2, 2, M, 16, device=device)
    return q, k, mra.make_plan(q, k, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("block_size", [32, (64, 16)])
def test_dense_and_back(device, selection, block_size):
    _, _, plan = make(device, density=0.3, selection=selection, block_size=block_size)
    dense = plan.to_dense()
    assert dense.dtype == torch.bool and dense.shape == (2, 4, plan.nq, plan.nk)
    assert dense.device.type == device
    # The lists, read one entry at a time.
    for b, h, x in ((0, 0, 0), (1, 3, plan.nq - 1), (1, 2, 1)):
        start, count = plan.row_start[b, h, x].item(), plan.row_count[b, h, x].item()
        entries = plan.row_index[b, h, start : start + count].tolist()
        assert entries == dense[b, h, x].nonzero().flatten().tolist()
    again = Plan.from_dense(dense, 150, 203, block_size)
    assert torch.equal(again.to_dense(), dense)
    assert torch.equal(again.row_count, plan.row_count)
    assert plan.density() == pytest.approx(dense.double().mean().item(), abs=1e-12)
    assert plan.shape == (2, 4, 150, 203)


def test_density_is_the_share_of_blocks():
    _, _, plan = make(N=160, M=320, density=0.25, block_size=32)
    assert plan.density() == 3 / 10  # ceil(10 / 4) = 3 of 10 key blocks
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    mask[..., 0, 1] = True
    assert Plan.from_dense(mask, 64, 64, 32).density() == 0.25


def test_junk_between_lists_and_out_of_range_is_skipped():
    lists = torch.tensor([[[9, 2, 0, 7, 3, -1]]], dtype=torch.int32)
    start = torch.tensor([[[1, 3]]], dtype=torch.int32)
    count = torch.tensor([[[2, 3]]], dtype=torch.int32)
    plan = Plan(start, count, lists, 32, 64, (16, 16))
    expected = torch.tensor([[[[True, False, True, False], [False, False, False, True]]]])
    assert torch.equal(plan.to_dense(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coarse", ["none", "block", "row"])
def test_a_given_plan_is_used(device, coarse):
    q, k, _ = make(device, block_size=32)
    v = torch.randn_like(k)
    dense = torch.rand(2, 4, 5, 7, device=device) < 0.4
    plan = Plan.from_dense(dense, 150, 203, 32)
    out = mra.mra_attention(q, k, v, plan=plan, coarse=coarse)
    expected = mra_attention_reference(
        *(x.double() for x in (q, k, v)), plan=dense, block_size=32, coarse=coarse
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_from_dense_causal():
    """Crossing pairs are added, the future is dropped."""
    none = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    plan = Plan.from_dense(none, 90, 90, (32, 16), is_causal=True)
    crossing = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(plan.to_dense()[0, 0], crossing)
    full = Plan.from_dense(~none, 90, 90, (32, 16), is_causal=True).to_dense()[0, 0]
    assert full.sum(-1).tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("mask", TypeError, dict(mask=[[True]])),
        ("mask", TypeError, dict(mask=torch.ones(1, 1, 2, 2))),
        ("mask", ValueError, dict(mask=torch.ones(2, 2, dtype=torch.bool))),
        ("mask", ValueError, dict(N=200)),
        ("block_size", ValueError, dict(block_size=24)),
        ("N", TypeError, dict(N=64.0)),
        ("M", ValueError, dict(M=0)),
        ("is_causal", TypeError, dict(is_causal=None)),
        ("is_causal", ValueError, dict(is_causal=True, M=63)),
        ("layout", TypeError, dict(layout=8)),
        ("layout", ValueError, dict(layout=(9, 9))),
        ("layout", ValueError, dict(layout=(8, 8), M=63)),
        ("is_causal", ValueError, dict(layout=(8, 8), is_causal=True)),
    ],
)
def test_from_dense_refuses(name, error, arguments):
    good = dict(mask=torch.ones(1, 1, 2, 2, dtype=torch.bool), N=64, M=64, block_size=32)
    Plan.from_dense(**good)
    with pytest.raises(error, match=name):
        Plan.from_dense(**{**good, **arguments})


def test_prints_shape_density_and_picture():
    mask = torch.eye(3, dtype=torch.bool)[None, None]
    plan = Plan.from_dense(mask, 96, 90, 32)
    text = str(plan)
    assert "shape=(1, 1, 96, 90)" in text and "density=33.33%" in text
    assert "██····\n··██··\n····██" in text
    large = Plan.from_dense(torch.ones(1, 1, 200, 100, dtype=torch.bool), 3200, 1600, 16)
    rows = [line for line in str(large).splitlines() if "█" in line]
    assert len(rows) == 32 and all(len(row) == 64 for row in rows)
    assert "\n" not in repr(plan)


def test_plot_draws_the_plan():
    pytest.importorskip("matplotlib").use("Agg")
    _, _, plan = make(density=0.3, block_size=32)
    ax = plan.plot(batch=1, head=2)
    image = torch.as_tensor(ax.images[0].get_array().data.copy())
    assert torch.equal(image.bool(), plan.to_dense()[1, 2])
    with pytest.raises(IndexError, match="head"):
        plan.plot(head=4)


@pytest.mark.parametrize("device", DEVICES)
def test_to(device):
    _, _, plan = make(density=0.3, block_size=32)
    moved = plan.to(device)
    assert moved.device.type == device and moved.shape == plan.shape
    assert torch.equal(moved.to_dense().cpu(), plan.to_dense())


def test_pytree():
    _, _, plan = make(density=0.3, block_size=32, N=150, M=150, is_causal=True)
    leaves, spec = pytree.tree_flatten({"plan": plan})
    assert len(leaves) == 3
    again = pytree.tree_unflatten(leaves, spec)["plan"]
    assert again.is_causal and again.shape == plan.shape and again.block_size == plan.block_size


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole_with_dynamic_shapes(device):
    """A plan made inside, given from outside, and returned; lengths change without a break."""

    def both(q, k, v, given):
        made = mra.make_plan(q, k, density=0.3, block_size=32)
        a = mra.mra_attention(q, k, v, plan=made, coarse="block")
        return a + mra.mra_attention(q, k, v, plan=given), made

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, M in ((150, 203), (97, 160), (64, 64)):
        q, k, given = make(device, N, M, density=0.5, block_size=32)
        v = torch.randn_like(k)
        out, made = compiled(q, k, v, given)
        expected, plan = both(q, k, v, given)
        torch.testing.assert_close(out, expected)
        assert isinstance(made, Plan) and torch.equal(made.to_dense(), plan.to_dense())
