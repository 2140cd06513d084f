"""torch.func: vmap over attention against a loop, gradients per sample, what is refused."""

import functools

import pytest
import torch
from helpers import DEVICES, limit, relative_error
from torch.func import functional_call, grad, jvp, vjp, vmap

import mra_attention as mra
from mra_attention import MRAConfig, MRAMultiheadAttention, mra_attention

OPS = torch.ops.mra_attention
V, B, H, Hk, N, M, D = 3, 2, 4, 2, 70, 90, 16
FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
OPTIONS = dict(density=0.3, block_size=32)
DTYPES = {"cpu": torch.float64, "cuda": torch.float32}


@pytest.fixture(autouse=True)
def no_fallback():
    """torch's own way round a missing rule is a loop inside."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def draw(device, *lead, dtype=None):
    kind = dict(device=device, dtype=dtype or DTYPES[device])
    q = torch.randn(*lead, B, H, N, D, **kind)
    k, v = torch.randn(2, *lead, B, Hk, M, D, **kind)
    masks = [torch.rand(*lead, B, n, device=device) < 0.8 for n in (M, N)]
    return [q, k, v, *masks]


def close(got, expected, pool="auto"):
    """Gradients of q, k, v. A whole batch may add those of k and v up in another order, and with
    weighted means that of q, to which the pooled keys' gradients go."""
    assert pool != "even" or torch.equal(got[0], expected[0])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= limit(a.dtype, a.device.type, 0)


def loop(function, in_dims, args):
    """What vmap stands for."""
    results = [
        function(*[x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)])
        for i in range(V)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_vmap_is_a_loop(device, coarse, order):
    def attend(*tensors):
        options = dict(OPTIONS, coarse=coarse, order=order, return_lse=True)
        return mra_attention(*tensors, **options)

    args = draw(device, V)
    assert same(vmap(attend)(*args), loop(attend, (0,) * 5, args))


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None, None), (None, 0, 0, 0, None), (0, 0, 0, None, 0), (None, None, 0, 0, 0)],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_are_not_mapped(device, in_dims):
    """And mapped ones whose dimension isn't the first."""

    def attend(*tensors):
        return mra_attention(*tensors, **OPTIONS, return_lse=True)

    args = [x if d == 0 else x[0] for x, d in zip(draw(device, V), in_dims, strict=True)]
    assert same(vmap(attend, in_dims)(*args), loop(attend, in_dims, args))
    last = tuple(None if d is None else 2 if i < 3 else 1 for i, d in enumerate(in_dims))
    moved = [x if d is None else x.movedim(0, d) for x, d in zip(args, last, strict=True)]
    assert same(vmap(attend, last)(*moved), loop(attend, in_dims, args))


@pytest.mark.parametrize("device", DEVICES)
def test_nested_vmap(device):
    def attend(q, k, v):
        return (mra_attention(q, k, v, **OPTIONS),)

    q, k, v, *_ = draw(device, V, 2)
    got = vmap(vmap(attend, (0, None, None)), (0, 0, 0))(q, k[:, 0], v[:, 0])
    expected = [attend(q[i, j], k[i, 0], v[i, 0])[0] for i in range(V) for j in range(2)]
    assert torch.equal(got[0].flatten(0, 1), torch.stack(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_vmap_of_plans(device):
    """Made under vmap and given, mapped and not."""
    q, k, v, *_ = draw(device, V)

    def both(q, k, v, shared):
        plan = mra.make_plan(q, k, **OPTIONS)
        return mra_attention(q, k, v, plan=plan), mra_attention(q, k, v, plan=shared)

    shared = mra.make_plan(q[0], k[0], **OPTIONS)
    got = vmap(lambda q, k, v: both(q, k, v, shared))(q, k, v)
    assert same(got, loop(lambda q, k, v: both(q, k, v, shared), (0,) * 3, (q, k, v)))
    mean, count = vmap(lambda x: OPS.pool(x, None, 32))(k)
    assert same((mean, count), loop(lambda x: OPS.pool(x, None, 32), (0,), (k,)))


def loss(q, k, v, key_mask=None, query_mask=None, pool="auto"):
    options = dict(OPTIONS, pool=pool, return_lse=True)
    out, lse = mra_attention(q, k, v, key_mask, query_mask, **options)
    return (out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()) / 7


def autograd(*args, pool="auto"):
    """The gradients of ``loss`` without torch.func."""
    tensors = [x.clone().requires_grad_() for x in args[:3]]
    return torch.autograd.grad(loss(*tensors, *args[3:], pool=pool), tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_grad_and_vjp(device):
    args = draw(device)
    expected = autograd(*args)
    assert same(grad(loss, (0, 1, 2))(*args), expected)
    _, pull = vjp(lambda q, k, v: loss(q, k, v, *args[3:]), *args[:3])
    assert same(pull(torch.ones((), device=device)), expected)


@pytest.mark.parametrize("pool", ["even", "auto"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_per_sample(device, pool):
    args, alone = draw(device, V), functools.partial(autograd, pool=pool)
    each = grad(functools.partial(loss, pool=pool), (0, 1, 2))
    close(vmap(each)(*args), loop(alone, (0,) * 5, args), pool)
    dims = (0, None, None, 0, None)
    args = [x if d == 0 else x[0] for x, d in zip(args, dims, strict=True)]
    close(vmap(each, dims)(*args), loop(alone, dims, args), pool)


@pytest.mark.parametrize("pool", ["even", "auto"])
@pytest.mark.parametrize("how", ["grad of vmap", "backward of vmap"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_a_vmap(device, how, pool):
    q, k, v, *_ = draw(device, V)
    k, v = k[0], v[0]

    def total(q, k, v):
        return vmap(functools.partial(loss, pool=pool), (0, None, None))(q, k, v).sum()

    if how == "grad of vmap":
        got = grad(total, (0, 1, 2))(q, k, v)
    else:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        got = torch.autograd.grad(total(*leaves), leaves)
    each = loop(functools.partial(autograd, pool=pool), (0, None, None), (q, k, v))
    close(got, [each[0], each[1].sum(0), each[2].sum(0)], pool)


@pytest.mark.parametrize("device", DEVICES)
def test_per_sample_gradients_of_a_module(device):
    """The usual recipe: functional_call of a module, vmap of grad over the samples. A float mask,
    whose values are looked at where that is possible."""
    config = MRAConfig(density=0.5, block_size=32)
    module = MRAMultiheadAttention(16, 2, batch_first=True, config=config)
    module.to(device, DTYPES[device])
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(V, 60, 16, device=device, dtype=DTYPES[device])

    ignored = torch.zeros_like(x[:, :, 0])
    ignored[:, 50:] = -torch.inf

    def sample(weights, x, ignored):
        inputs, masks = (x[None],) * 3, dict(key_padding_mask=ignored[None], need_weights=False)
        out, _ = functional_call(module, weights, inputs, masks)
        return out.square().sum()

    got = vmap(grad(sample), (None, 0, 0))(weights, x, ignored)
    for i in range(V):
        inputs = (x[i : i + 1],) * 3
        out, _ = module(*inputs, key_padding_mask=ignored[i : i + 1], need_weights=False)
        expected = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        for (name, _), e in zip(module.named_parameters(), expected, strict=True):
            assert relative_error(got[name][i], e) <= limit(e.dtype, device, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    q, k, v, *_ = draw(device, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        got = grad(lambda *x: loss(*x).float(), (0, 1, 2))(q, k, v)
        expected = autograd(q, k, v)
    assert all(x.dtype == torch.float32 for x in got)
    assert same(got, expected) and not same(got, autograd(q, k, v))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    args = draw(device, V)
    torch._dynamo.reset()
    compiled = torch.compile(vmap(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), vmap(loss)(*args))
    compiled = torch.compile(vmap(grad(loss)), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="functorch transforms"):
        compiled(*args)


def test_what_is_refused():
    q, k, v, *_ = draw("cpu")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda q: mra_attention(q, k, v, **OPTIONS), (q,), (q,))
    with pytest.raises(NotImplementedError, match="double backward"):
        grad(lambda q: grad(loss)(q, k, v).sum())(q)
    with pytest.raises(NotImplementedError, match="double backward"):
        leaf = q.clone().requires_grad_()
        grad(loss)(leaf, k, v).sum().backward()


# What follows query, key and value in a call of the forward operator, with OPTIONS.
CALL = (None, None, None, None, None, None, 0.3, 32, 32, "row", 1, "row", 0, 0, False, None)


@pytest.mark.parametrize("device", DEVICES)
def test_rules_of_the_operators(device):
    """Called by name: forward with torch's ordinary backward through it, and backward itself."""
    inputs = draw(device, V)[:3]
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = vmap(lambda *x: OPS.forward(*x, *CALL))(*leaves)
    expected = loop(lambda *x: OPS.forward(*x, *CALL), (0,) * 3, inputs)
    # Query means, and what belongs to weighted means, aren't among the results of this form; what
    # is absent has no mapped dimension.
    absent = [x.numel() == 0 for x in results]
    assert absent == [x.numel() == 0 for x in expected] and sum(absent) == 5
    assert same(
        *zip(*[p for p in zip(results, expected, strict=True) if p[0].numel()], strict=True)
    )
    grad_out, grad_lse = torch.randn_like(results[0]), torch.randn_like(results[1])
    got = torch.autograd.grad(results[:2], leaves, (grad_out, grad_lse))

    def backward(grad_out, grad_lse, q, k, v, *results):
        out, lse, share, start, count, index, *_ = results
        lists = (out, lse, share, start, count, index)
        return OPS.backward(
            grad_out, grad_lse, q, k, v, None, None, *lists, 32, 32, "row", 1, False, None
        )

    kept = [x.detach() for x in results[:6]]
    each = (grad_out, grad_lse, *inputs, *kept)
    expected = loop(backward, (0,) * len(each), each)
    close(got, expected)
    close(vmap(backward)(*each), expected)


def test_the_operator_itself_has_no_torch_func_gradient():
    """Only mra_attention() goes round torch's limit on C++ Functions."""
    q, k, v, *_ = draw("cpu")
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda q: OPS.forward(q, k, v, *CALL)[0].sum())(q)
