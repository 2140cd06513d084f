"""The operators as torch sees them: schemas, Meta, autograd, autocast, torch.compile."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from helpers import BEST, DEVICES, Case
from tools import same_on_meta, track

import mra_attention as mra

OPS = torch.ops.mra_attention
FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
# Every form with every selection, causal and masks switched on and off along the way.
MODES = [
    dict(coarse=coarse, order=order, selection=selection, is_causal=causal, masks=masks)
    for ((coarse, order), selection), (causal, masks) in zip(
        itertools.product(FORMS, ["row", "global"]),
        itertools.cycle([(False, "none"), (True, "both"), (False, "both"), (True, "none")]),
        strict=False,
    )
]
DTYPES = [*BEST, ("cpu", torch.float32), ("cpu", torch.bfloat16)]
DTYPES += [pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)]


def name(mode):
    return "-".join(str(v) for v in mode.values())


def small(device, dtype, mode):
    """A small case and the arguments of plan and forward."""
    case = Case(device, dtype, N=70, M=70 if mode["is_causal"] else 90, D=16, H=2, Hk=1, **mode)
    o = case.options
    rest = (*case.block, o["coarse"], o["order"], o["selection"], 0, 0, o["is_causal"], None)
    masks = (case.key_mask, case.query_mask)
    plan = (case.q, case.k, *masks, None, o["density"], *case.block, o["selection"], 0, 0)
    plan += (o["is_causal"], None)
    forward = (case.q, case.k, case.v, *masks, None, None, None, None, o["density"], *rest)
    return case, plan, forward


def backward_args(case, results):
    o = case.options
    out, lse, share, start, count, index, *means = results
    means = [mean if mean.dim() > 1 else None for mean in means]
    return (
        case.grad_out, case.grad_lse, case.q, case.k, case.v, case.key_mask, case.query_mask,
        out, lse, share, start, count, index, *case.block, o["coarse"], o["order"],
        o["is_causal"], None, *means,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("device, dtype", BEST + DTYPES[-1:])
def test_opcheck(device, dtype, mode):
    case, plan, forward = small(device, dtype, mode)
    torch.library.opcheck(OPS.pool.default, (case.k, case.key_mask, case.block[1]))
    torch.library.opcheck(OPS.plan.default, plan)
    torch.library.opcheck(OPS.forward.default, track(forward))
    lists = OPS.plan(*plan)
    given = (*forward[:5], *lists, None, None, *forward[10:])
    torch.library.opcheck(OPS.forward.default, track(given))
    torch.library.opcheck(OPS.backward.default, backward_args(case, OPS.forward(*forward)))


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("device, dtype", DTYPES)
def test_meta_agrees_with_the_device(device, dtype, mode):
    case, plan, forward = small(device, dtype, mode)
    same_on_meta(OPS.pool, (case.q, case.query_mask, case.block[0]))
    same_on_meta(OPS.plan, plan)
    same_on_meta(OPS.backward, backward_args(case, same_on_meta(OPS.forward, forward)))


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("device, dtype", BEST)
def test_backward_makes_the_means_it_is_not_given(device, dtype, mode):
    case, _, forward = small(device, dtype, mode)
    args = backward_args(case, OPS.forward(*forward))
    for given, made in zip(OPS.backward(*args), OPS.backward(*args[:-9]), strict=True):
        assert torch.equal(given, made)


@pytest.mark.parametrize("device, dtype", BEST)
def test_backward_refuses_some_of_the_means(device, dtype):
    case, _, forward = small(device, dtype, dict(MODES[2], is_causal=False))
    assert case.options["coarse"] == "block"
    args = list(backward_args(case, OPS.forward(*forward)))
    for i in range(-9, -4):
        wrong = [*args]
        wrong[i] = None
        with pytest.raises(ValueError, match="_mean|_count"):
            OPS.backward(*wrong)
    wrong = [*args]
    wrong[-8] = args[-8][:, :, 1:]
    with pytest.raises(ValueError, match="key_mean"):
        OPS.backward(*wrong)


@pytest.mark.parametrize("device, dtype", BEST)
def test_backward_refuses_wrong_moments(device, dtype):
    case, _, forward = small(device, dtype, MODES[4])
    assert case.options["order"] == 1 and not case.options["is_causal"]
    args = list(backward_args(case, OPS.forward(*forward)))
    moments = args[-4]
    assert moments.shape == (2, 1, 2, 32, 32)
    for wrong in (moments[..., 1:], moments[:, :, :1], moments.double().half()):
        with pytest.raises((ValueError, TypeError), match="moments"):
            OPS.backward(*args[:-4], wrong)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_is_refused(device):
    q, k, v = (torch.randn(1, 1, 40, 8, device=device, requires_grad=True) for _ in range(3))
    out = mra.mra_attention(q, k, v, density=0.5, block_size=32)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode_is_refused(device):
    q, k, v = (torch.randn(1, 1, 40, 8, device=device) for _ in range(3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            mra.mra_attention(dual, k, v)


@pytest.mark.parametrize("device", DEVICES)
def test_plan_and_pool_are_constants(device):
    x = torch.randn(1, 1, 40, 8, device=device, requires_grad=True)
    mean, count = OPS.pool(x, None, 32)
    assert not mean.requires_grad and not count.requires_grad
    assert not any(
        t.requires_grad for t in vars(mra.make_plan(x, x)).values() if torch.is_tensor(t)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_casts_as_scaled_dot_product_attention(device):
    q, k, v = (torch.randn(1, 2, 80, 16, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device, torch.bfloat16):
        out, lse = mra.mra_attention(q, k, v, block_size=32, return_lse=True)
        mixed = mra.mra_attention(q.bfloat16(), k, v, block_size=32)
    low = [x.detach().bfloat16() for x in (q, k, v)]
    expected = mra.mra_attention(*low, block_size=32)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected) and torch.equal(mixed, expected)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (q, k, v))
    if device == "cpu":
        wide = [x.detach().double() for x in (q, k, v)]
        with torch.autocast(device, torch.bfloat16):
            assert mra.mra_attention(*wide, block_size=32).dtype == torch.float64


def compiled_runs(backend, dynamic, device, lengths):
    """Largest difference between compiled and eager results, and how often a later length was
    compiled again. (The first may start over while it is being compiled.)"""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    config = mra.MRAConfig(density=0.3, block_size=32)

    def model(q, k, v):
        return mra.mra_attention(q * 2, k, v, config=config) + 1

    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    worst, first = 0.0, None
    for length in lengths:
        x = [torch.randn(2, 2, length, 16, device=device, requires_grad=True) for _ in range(3)]
        grad = torch.randn(2, 2, length, 16, device=device)
        runs = []
        for function in (model, compiled):
            out = function(*x)
            runs.append([out, *torch.autograd.grad(out, x, grad)])
        for a, b in zip(*runs, strict=True):
            assert a.shape == b.shape and a.stride() == b.stride()
            worst = max(worst, float((a - b).detach().abs().max()))
        first = first or counter.frame_count
    assert first
    return worst, counter.frame_count - first


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
def test_compile(device, backend, dynamic):
    lengths = [100, 132, 260] if dynamic else [100]
    worst, again = compiled_runs(backend, dynamic, device, lengths)
    assert worst < 1e-5
    assert again == 0


@pytest.mark.parametrize("device", DEVICES)
def test_module_compiles_in_one_graph(device):
    torch._dynamo.reset()
    config = mra.MRAConfig(density=0.5, block_size=32)
    module = mra.MRAMultiheadAttention(32, 2, batch_first=True, config=config).to(device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 70, 32, device=device)
    expected, _ = module(x, x, x, need_weights=False)
    got, _ = compiled(x, x, x, need_weights=False)
    assert torch.allclose(got, expected, atol=1e-6)


def test_export_keeps_one_operator():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return mra.mra_attention(q, k, v, block_size=32)

    x = torch.randn(1, 2, 70, 16)
    program = torch.export.export(Model(), (x, x, x))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("mra_attention.forward" in target for target in targets) == 1
    assert torch.equal(program.module()(x, x, x), Model()(x, x, x))
