"""What torch's own tools ask of every option of the operators."""

import torch
import torch._dynamo.testing

import mra_attention as mra


def same_on_meta(op, args):
    """Results of ``op``, of which Meta gives the shapes, strides and dtypes."""
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    real = op(*args)
    for i, (x, y) in enumerate(zip(real, op(*meta), strict=True)):
        assert y.is_meta
        got = (y.shape, y.stride(), y.dtype)
        assert got == (x.shape, x.stride(), x.dtype), f"{op} result {i}"
    return real


def track(args):
    """The floating tensors among ``args`` as leaves that take a gradient."""
    return tuple(
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    )


def check_one_graph(config, dynamic):
    """Compiled as eager, values and gradients, in one graph for all lengths."""
    torch._dynamo.reset()

    def model(q, k, v):
        return mra.mra_attention(q * 2, k, v, config=config) + 1

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for N in (300, 420, 900) if dynamic else (300,):
        x = [torch.randn(2, 2, N, 16, requires_grad=True) for _ in range(3)]
        ours, theirs = compiled(*x), model(*x)
        assert torch.allclose(ours, theirs, atol=1e-6)
        grad = torch.randn_like(ours)
        for a, b in zip(*(torch.autograd.grad(y, x, grad) for y in (ours, theirs)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert counter.frame_count == 1


def check_export(config):
    """Exported at one length, run at another."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return mra.mra_attention(q, k, v, config=config)

    x, dim = torch.randn(1, 2, 300, 16), {2: torch.export.Dim.AUTO}
    program = torch.export.export(Model(), (x, x, x), dynamic_shapes=(dim,) * 3)
    y = torch.randn(1, 2, 517, 16)
    assert torch.equal(program.module()(y, y, y), Model()(y, y, y))


def check_transforms(config):
    """vmap, gradients per sample, autocast."""
    q, k, v = (torch.randn(3, 2, 2, 200, 8, dtype=torch.float64) for _ in range(3))

    def attend(q, k, v):
        return mra.mra_attention(q, k, v, config=config)

    def loss(q, k, v):
        return attend(q, k, v).sin().sum()

    expected = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    assert torch.equal(torch.func.vmap(attend)(q, k, v), expected)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    leaves = [x[0].clone().requires_grad_() for x in (q, k, v)]
    for got, one in zip(grads, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.allclose(got[0], one, atol=1e-12)
    low = [x[0].float() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(*low)
    assert torch.equal(mixed, attend(*(x.bfloat16() for x in low)))


def check_backward_under_autocast(config, device):
    """Gradients don't change where backward itself runs under autocast."""
    x = [torch.randn(1, 2, 260, 32, device=device, requires_grad=True) for _ in range(3)]
    out = mra.mra_attention(*x, config=config)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, x, grad, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        grads = torch.autograd.grad(out, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
