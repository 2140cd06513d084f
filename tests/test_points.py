"""order_points: a permutation along a Hilbert curve."""

import pytest
import torch
from helpers import DEVICES
from torch.nn import functional as F

from mra_attention import mra_attention, order_points
from mra_attention.points import _along_curve


def grid(d, k):
    return torch.cartesian_prod(*[torch.arange(2**k)] * d)


def in_order(points, *args):
    return points.take_along_dim(order_points(points, *args).unsqueeze(-1), -2)


def test_first_curve_by_hand():
    """2 x 2: one corner after the other; of 4 x 4 the halves are known from that."""
    assert in_order(grid(2, 1)).tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]
    quarters = (in_order(grid(2, 2)) // 2).view(4, 4, 2)
    assert (quarters == quarters[:, :1]).all()
    assert quarters[:, 0].tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d, k", [(2, 1), (2, 3), (2, 6), (3, 1), (3, 2), (3, 4)])
@pytest.mark.parametrize("bits", ["those of the grid", None])
def test_neighbours_on_the_curve_are_neighbours_in_space(device, d, k, bits):
    cells = grid(d, k).to(device)
    cells = cells[torch.randperm(len(cells), device=device)]
    points = 0.37 * cells.double() - 5  # anywhere, of any size
    for given in (cells, points, points.float()):
        index = order_points(given, k if bits else None)
        assert index.device.type == device and index.dtype == torch.int64
        assert torch.equal(index.sort().values, torch.arange(len(cells), device=device))
        steps = cells[index].diff(dim=0).abs().sum(-1)
        assert (steps == 1).all()


@pytest.mark.parametrize("d, most", [(2, 31), (3, 20)])
def test_most_bits(d, most):
    """Corners and points next to them stay apart, and together."""
    corners = grid(d, 1).double()
    inner = corners + (1 - 2 * corners) * 2.0**-most
    pairs = order_points(torch.cat([corners, inner]), most) % len(corners)
    assert torch.equal(pairs[::2], pairs[1::2])
    at = _along_curve(list((grid(d, 1) * (2**most - 1)).unbind(-1)), most)
    assert at.min() == 0 and at.max() == 2 ** (d * most) - 1  # the curve ends in a corner


def test_sets_of_a_batch_have_nothing_to_do_with_each_other():
    points = torch.randn(3, 200, 3) * torch.tensor([1.0, 1e-6, 1e6]).view(3, 1, 1)
    index = order_points(points)
    for own, together in zip(points, index, strict=True):
        assert torch.equal(order_points(own), together)


def test_equal_points_keep_their_order():
    assert torch.equal(order_points(torch.full((2, 7, 2), 3.5)), torch.arange(7).expand(2, 7))
    assert torch.equal(order_points(torch.zeros(1, 2)), torch.zeros(1, dtype=torch.int64))
    assert order_points(torch.zeros(0, 5, 2)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_masked_points_come_last(dtype):
    points = (100 * torch.randn(2, 60, 2)).to(dtype)
    mask = torch.rand(2, 60) < 0.7
    points[0, ~mask[0]] = 10**9  # doesn't count for the box
    index = order_points(points, mask=mask)
    for b in (0, 1):
        n = mask[b].sum()
        assert mask[b][index[b, :n]].all()
        kept = mask[b].nonzero().squeeze(1)
        assert torch.equal(index[b, :n], kept[order_points(points[b, kept])])


def test_no_gradient_and_compiles_whole():
    points = torch.randn(2, 50, 3, requires_grad=True)
    assert not order_points(points).requires_grad
    compiled = torch.compile(order_points, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 50, 3), (3, 70, 3)):
        points = torch.randn(shape)
        assert torch.equal(compiled(points), order_points(points))


def test_points_in_order_are_approximated_better():
    """Queries that look at their neighbourhood: exp(s q.k) falls with the distance. Even means: the
    queries have little in common but a term of the keys' own."""
    points = torch.rand(1, 1024, 2)
    lifted = torch.cat([points, points.square().sum(-1, keepdim=True)], -1)
    q = F.pad(torch.cat([2 * points, -torch.ones(1, 1024, 1)], -1), (0, 5)).unsqueeze(1)
    k, v = F.pad(lifted, (0, 5)).unsqueeze(1), F.pad(torch.sin(9 * points), (0, 6)).unsqueeze(1)
    options = dict(scale=200.0, block_size=32, density=1 / 8, pool="even")
    exact = F.scaled_dot_product_attention(q, k, v, scale=200.0)
    index = order_points(points)[:, None, :, None]
    ordered = mra_attention(*(x.take_along_dim(index, 2) for x in (q, k, v)), **options)
    ordered = ordered.take_along_dim(index.argsort(2), 2)
    plain = mra_attention(q, k, v, **options)
    assert (ordered - exact).norm() < 0.5 * (plain - exact).norm()


@pytest.mark.parametrize(
    "name, error, arguments",
    [
        ("points", TypeError, dict(points=[[0.0, 1.0]])),
        ("points", TypeError, dict(points=torch.ones(4, 2, dtype=torch.bool))),
        ("points", TypeError, dict(points=torch.ones(4, 2, dtype=torch.complex64))),
        ("points", ValueError, dict(points=torch.ones(4))),
        ("points", ValueError, dict(points=torch.ones(4, 4))),
        ("points", ValueError, dict(points=torch.ones(1, 1, 4, 2))),
        ("points", ValueError, dict(points=torch.ones(2, 0, 2))),
        ("bits", TypeError, dict(bits=8.0)),
        ("bits", TypeError, dict(bits=True)),
        ("bits", ValueError, dict(bits=0)),
        ("bits", ValueError, dict(bits=32)),
        ("bits", ValueError, dict(bits=21, points=torch.ones(4, 3))),
        ("mask", TypeError, dict(mask=[True] * 4)),
        ("mask", TypeError, dict(mask=torch.ones(4))),
        ("mask", ValueError, dict(mask=torch.ones(3, dtype=torch.bool))),
    ],
)
def test_refuses(name, error, arguments):
    good = dict(points=torch.rand(4, 2), bits=8, mask=torch.ones(4, dtype=torch.bool))
    order_points(**good)
    with pytest.raises(error, match=name):
        order_points(**{**good, **arguments})
