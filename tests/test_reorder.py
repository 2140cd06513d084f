"""The operator reorder: rows of several tensors in another order."""

import itertools

import pytest
import torch
from helpers import CUDA_DTYPES, DEVICES, kernels_of
from tools import same_on_meta

import mra_attention as mra
from mra_attention import layout as layouts
from mra_attention.layout import Tiles

REORDER = torch.ops.mra_attention.reorder
DTYPES = [("cpu", t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.bool)]
DTYPES += CUDA_DTYPES + [pytest.param("cuda", torch.bool, marks=pytest.mark.gpu)]


def orders(L, P, device):
    """index (P,) with rows left out where P is larger, and its inverse (L,)."""
    places = torch.randperm(P)
    inverse = places[:L].int()
    index = torch.full((P,), -1, dtype=torch.int32)
    index[places[:L]] = torch.arange(L, dtype=torch.int32)
    return index.to(device), inverse.to(device)


def expected(x, index):
    rows = x.transpose(1, 2).index_select(1, index.clamp(min=0))
    return rows.masked_fill((index < 0).view(1, -1, 1, 1), 0).transpose(1, 2)


def strided(make, B, H, L, D):
    """Tensors of that shape whose dimensions lie in memory in all kinds of ways."""
    yield make(B, H, L, D)
    yield make(B, L, H, D).transpose(1, 2)
    yield make(B, L, H, 3 * D)[..., D : 2 * D].transpose(1, 2)
    yield make(D, L, B, H).permute(2, 3, 1, 0)
    yield make(B, H, L, D + 1)[..., 1:]
    yield make(B, H, 2 * L, 2 * D)[:, :, ::2, ::2]
    yield make(B, 1, L, D).expand(B, H, L, D)
    yield make(H, L, D).expand(B, H, L, D)


@pytest.mark.parametrize("D", [1, 3, 8, 40, 64, 256])
@pytest.mark.parametrize("device, dtype", DTYPES)
def test_is_index_select(device, dtype, D):
    """Any strides, heads that differ, more places than rows."""

    def make(*shape):
        x = torch.randn(shape, device=device)
        return x < 0 if dtype == torch.bool else x.to(dtype)

    for L, P in ((37, 37), (65, 192), (1, 1)):
        index, inverse = orders(L, P, device)
        for x in strided(make, 2, 3, L, D):
            inputs = [x, x[:, :1], x[:, :2], x[:1]]
            for count in (1, 3, 4):
                results = REORDER(inputs[:count], index, inverse)
                for result, y in zip(results, inputs, strict=False):
                    assert torch.equal(result, expected(y, index))
                    kept = result if y.is_contiguous() else result.transpose(1, 2)
                    assert kept.is_contiguous()
                    assert torch.equal(REORDER([result], inverse, index)[0], y)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_of_zero(device):
    index, inverse = orders(5, 8, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 5, 0)):
        empty, full = torch.ones(shape, device=device), torch.ones(1, 1, 5, 8, device=device)
        results = REORDER([empty, full], index, inverse)
        assert results[0].shape == (*shape[:2], 8, shape[3])
        assert torch.equal(results[1], expected(full, index))
    x = torch.ones(1, 2, 0, 8, device=device)
    (result,) = REORDER([x], torch.full_like(index, -1), none)
    assert result.shape == (1, 2, 8, 8) and not result.any()
    assert REORDER([full], none, inverse)[0].shape == (1, 1, 0, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_are_not_there_are_zeros(device):
    x = torch.full((1, 1, 4, 8), torch.nan, device=device)
    index = torch.tensor([-1, 4, 1000, -5], dtype=torch.int32, device=device)
    assert torch.equal(REORDER([x], index, index)[0], torch.zeros_like(x))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_meta(device):
    index, inverse = orders(9, 16, device)
    x = torch.randn(2, 3, 9, 8, device=device)
    inputs = [x.clone().requires_grad_(), x[:, :1].clone(), x.mT.contiguous().mT.requires_grad_()]
    torch.library.opcheck(REORDER.default, (inputs, index, inverse))
    same_on_meta(lambda *x: REORDER(x[:3], *x[3:]), [*map(torch.detach, inputs), index, inverse])


def test_gradients_of_gradients():
    index, inverse = orders(5, 8, "cpu")
    inputs = [torch.randn(2, H, 5, 3, dtype=torch.float64, requires_grad=True) for H in (2, 1)]

    def function(*inputs):
        return REORDER(inputs, index, inverse)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    first, second = inputs[0], inputs[1].detach()
    a, b = REORDER([first, second], index, inverse)
    assert a.requires_grad and not (a * b).sum().backward()
    torch.testing.assert_close(first.grad, second.expand_as(first))


def test_transforms():
    index, inverse = orders(5, 8, "cpu")
    x, y = torch.randn(4, 2, 2, 5, 3), torch.randn(2, 4, 1, 5, 3)

    def weighted(x, y):
        rows = mra.transforms.reorder([x, y], index, inverse)
        return (rows[0] * rows[1] * torch.arange(8).view(8, 1)).sum()

    mapped = torch.vmap(torch.func.grad(weighted, (0, 1)), (0, 1))(x, y)
    for i in range(4):
        single = torch.func.grad(weighted, (0, 1))(x[i], y[:, i])
        torch.testing.assert_close([m[i] for m in mapped], list(single))
    rows = torch.vmap(lambda x, y: REORDER([x, y], index, inverse), (0, None))(x, y[:, 0])
    assert torch.equal(rows[0][1], expected(x[1], index))
    assert torch.equal(rows[1][3], expected(y[:, 0], index))


BAD = [
    ("inputs", ValueError, lambda x, i, j: ([], i, j)),
    ("inputs", ValueError, lambda x, i, j: ([x] * 5, i, j)),
    ("inputs", ValueError, lambda x, i, j: ([x[0]], i, j)),
    ("inputs", ValueError, lambda x, i, j: ([x, x[:, :, 1:]], i, j)),
    ("inputs", TypeError, lambda x, i, j: ([x, x.double()], i, j)),
    ("inputs", ValueError, lambda x, i, j: ([x, x.to("meta")], i, j)),
    ("index", TypeError, lambda x, i, j: ([x], i.long(), j)),
    ("index", ValueError, lambda x, i, j: ([x], i[None], j)),
    ("inverse", TypeError, lambda x, i, j: ([x], i, j.float())),
    ("inverse", ValueError, lambda x, i, j: ([x], i, j[0])),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, error, arguments", BAD)
def test_bad_input(device, name, error, arguments):
    x = torch.randn(1, 1, 5, 8, device=device)
    with pytest.raises(error, match=name):
        REORDER(*arguments(x, *orders(5, 8, device)))


def test_forward_mode_is_refused():
    x, (index, inverse) = torch.randn(1, 1, 5, 8), orders(5, 8, "cpu")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            REORDER([dual], index, inverse)


# On CUDA, within attention


def picture(dtype, heads=(4, 2, 2), layout=(21, 30), lead=0, D=64):
    N = lead + layout[0] * layout[1]
    options = dict(device="cuda", dtype=dtype, requires_grad=True)
    return [torch.randn(2, N, H, D, **options) for H in heads]


@pytest.mark.gpu
@pytest.mark.parametrize("lead", [0, 3])
def test_launches(lead):
    """Forward and backward two each, for query, key and value and for the result."""
    x = picture(torch.bfloat16, lead=lead)

    def call(backward=False):
        q, k, v = (t.transpose(1, 2) for t in x)
        out = mra.mra_attention(q, k, v, layout=(21, 30), pool="even")
        if backward:
            torch.autograd.grad(out, x, torch.ones_like(out))

    names = kernels_of(call)
    assert sum("reorder_kernel" in name for name in names) == 2
    plain = kernels_of(lambda: mra.mra_attention(*(t.transpose(1, 2) for t in x), pool="even"))
    # nothing else but the masks of leading tokens
    assert len(names) - len(plain) - 2 <= (8 if lead else 0), names
    names = kernels_of(lambda: call(backward=True))
    assert sum("reorder_kernel" in name for name in names) == 4


@pytest.mark.gpu
def test_same_bits_as_a_gather():
    q, k, v = (t.transpose(1, 2) for t in picture(torch.bfloat16))
    tiles = Tiles.of((21, 30), 630, (64, 64))
    index, inverse = (x.long() for x in tiles.orders(q))

    def results(ours):
        if ours:
            return mra.mra_attention(q, k, v, layout=(21, 30), return_lse=True)
        rows = [x.index_select(2, index) for x in (q, k, v)]
        return [x.index_select(2, inverse) for x in mra.mra_attention(*rows, return_lse=True)]

    found = []
    for ours in (True, False):
        out, lse = results(ours)
        grads = torch.autograd.grad([out, lse], (q, k, v), [torch.ones_like(out), lse.detach()])
        found.append([out, lse, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_no_wait_for_the_device():
    x = [t.transpose(1, 2) for t in picture(torch.bfloat16, layout=(19, 31), lead=2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = mra.mra_attention(*x, layout=(19, 31))  # of which no index is kept yet
        torch.autograd.grad(out, x, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True])
def test_cuda_graph(known):
    """Whether or not the index was made before; and what it reads is never given up."""
    layout = (18, 33 + known)
    x = [t.detach().transpose(1, 2) for t in picture(torch.bfloat16, layout=layout)]
    y = [torch.randn_like(t) for t in x]
    mra.mra_attention(*y, layout=layout if known else None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mra.mra_attention(*x, layout=layout)
    layouts._kept.clear()
    torch.randint(100, (20, x[0].shape[2]), device="cuda", dtype=torch.int32)  # takes free memory
    for t, other in zip(x, y, strict=True):
        t.copy_(other)
    graph.replay()
    assert torch.equal(out, mra.mra_attention(*y, layout=layout))


@pytest.mark.gpu
def test_streams():
    x = [t.detach().transpose(1, 2) for t in picture(torch.bfloat16, layout=(40, 50))]
    expected = mra.mra_attention(*x, layout=(40, 50))
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            out = mra.mra_attention(*x, layout=(40, 50))
        stream.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_deterministic_and_in_little_memory():
    x = [t.detach().transpose(1, 2) for t in picture(torch.bfloat16, layout=(100, 120))]
    own = sum(t.nbytes for t in x) + x[0].nbytes  # copies of q, k, v; the result in blocks

    def peak(layout):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = mra.mra_attention(*x, layout=layout)
        return torch.cuda.max_memory_allocated() - before, out

    for layout in (None, (100, 120)):
        peak(layout)
    plain, _ = peak(None)
    most, out = peak((100, 120))
    assert most <= plain + own + 2**20
    assert torch.equal(out, peak((100, 120))[1])


@pytest.mark.gpu
def test_more_than_2_31_elements():
    D, L = 256, 2**17
    x = torch.zeros(1, 65, L, D, device="cuda", dtype=torch.bfloat16)
    x[0, :, :, 0] = torch.arange(65, device="cuda")[:, None] % 251
    x[0, 0, :, 1] = torch.arange(L, device="cuda") % 256
    index = torch.arange(L, device="cuda", dtype=torch.int32).flip(0)
    (y,) = REORDER([x], index, index)
    for h, at in itertools.product((0, 64), (0, L // 2, L - 1)):
        assert torch.equal(y[0, h, at], x[0, h, L - 1 - at])
