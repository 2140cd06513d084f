"""torch.func over the operators: vmap folds its dimension into the batch, grad stays reverse mode.

The operators' own gradient is a C++ ``autograd::Function``, which torch refuses under ``grad``,
``vjp`` and ``jacrev``. While such a transform is active, :func:`mra_attention` goes through the
Functions here, which call the same operators.
"""

import torch

from . import _load

__all__ = ["active", "forward", "reorder"]

QUERY_KEY_VALUE = 3  # the first tensor arguments of forward, which get gradients
RESULTS_WITH_GRADIENT = 2  # out and lse


def active():
    """Whether a torch.func transform is running. Not inside torch.compile, which can't trace the
    Functions here: compiled programs have vmap, through the operators' rules, and no torch.func
    gradient."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def forward(*args):
    """``torch.ops.mra_attention.forward``, differentiable under torch.func. Same arguments, and its
    twelve results; as there, only out and lse get gradients, and only once."""
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return _Forward.apply(*args)
    # What is saved for backward has to be what the operator saw.
    dtype = torch.get_autocast_dtype(device)
    tensors = [x if x.dtype == torch.float64 else x.to(dtype) for x in args[:QUERY_KEY_VALUE]]
    with torch.autocast(device, enabled=False):
        return _Forward.apply(*tensors, *args[QUERY_KEY_VALUE:])


def reorder(inputs, index, inverse):
    """``torch.ops.mra_attention.reorder``, differentiable under torch.func."""
    return _Reorder.apply(index, inverse, *inputs)


def folded(function, info, in_dims, args):
    """``function`` with the vmapped dimension of its tensors folded into their first, the batch;
    tensors without that dimension are repeated. Returns the results and their vmapped dimensions.

    Heads of one batch entry share nothing with those of another, so this is what a loop gives."""
    size = info.batch_size

    def fold(x, dim):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    results = function(*map(fold, args, in_dims))
    # The operators give a tensor of no elements, of one dimension, for what they don't have.
    there = [x.dim() > 1 for x in results]
    results = [
        x.unflatten(0, (size, x.shape[0] // size)) if whole else x
        for x, whole in zip(results, there, strict=True)
    ]
    return tuple(results), tuple(0 if whole else None for whole in there)


def _reverse_mode(name):
    """Gives the Function of an operator its vmap, and refuses forward-mode differentiation."""

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"mra_attention::{name}: forward-mode differentiation (jvp, dual tensors) is not "
            "supported; use reverse mode (backward)"
        )

    def decorate(function):
        def vmap(info, in_dims, *args):
            return folded(function.apply, info, in_dims, args)

        function.vmap, function.jvp = staticmethod(vmap), staticmethod(jvp)
        return function

    return decorate


@_reverse_mode("forward")
class _Forward(torch.autograd.Function):
    """The forward operator; its backward is _Backward."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.mra_attention.forward(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, key_mask, query_mask, *plan = inputs[:8]
        out, lse, share, *made = output
        plan = made[:3] if plan[0] is None else plan
        ctx.save_for_backward(
            query, key, value, key_mask, query_mask, out, lse, share, *plan, *made[3:]
        )
        block_q, block_k, coarse, order = inputs[10:14]
        is_causal, scale, levels, pool, keep = inputs[17:]
        assert keep  # what a transform's backward reads
        ctx.options = (block_q, block_k, coarse, order, is_causal, scale, levels, pool)
        ctx.mark_non_differentiable(*output[RESULTS_WITH_GRADIENT:])

    @staticmethod
    def backward(ctx, grad_out, grad_lse, *_):
        saved = ctx.saved_tensors
        tensors, kept = saved[:11], [x if x.dim() > 1 else None for x in saved[11:]]
        *options, levels, pool = ctx.options
        grads = _Backward.apply(grad_out, grad_lse, *tensors, *options, *kept, levels, pool)
        return (*grads, *[None] * 19)


@_reverse_mode("backward")
class _Backward(torch.autograd.Function):
    """The backward operator. Without a gradient of its own, and says so."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.mra_attention.backward(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "mra_attention::backward: double backward is not supported (a second derivative of "
            "mra_attention was asked for)"
        )


class _Reorder(torch.autograd.Function):
    """The operator reorder, whose gradient is itself with the two orders exchanged."""

    @staticmethod
    def forward(index, inverse, *inputs):
        return tuple(torch.ops.mra_attention.reorder(inputs, index, inverse))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, *grads):
        index, inverse = ctx.saved_tensors
        return None, None, *_Reorder.apply(inverse, index, *grads)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "mra_attention::reorder: forward-mode differentiation (jvp, dual tensors) is not "
            "supported; use reverse mode (backward)"
        )

    @staticmethod
    def vmap(info, in_dims, index, inverse, *inputs):
        results = _reorder_folded(info, in_dims[2:], inputs, index, inverse, _Reorder.apply)
        return tuple(results), (0,) * len(results)


def _reorder_folded(info, in_dims, inputs, index, inverse, function):
    size = info.batch_size
    inputs = [
        (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(inputs, in_dims, strict=True)
    ]
    results = function(index, inverse, *inputs)
    return [x.unflatten(0, (size, x.shape[0] // size)) for x in results]


def _register():
    """Batching rules of the operators themselves."""
    for name in ("pool", "plan", "forward", "backward"):
        op = getattr(torch.ops.mra_attention, name)

        def rule(info, in_dims, *args, op=op):
            return folded(op, info, in_dims, args)

        torch.library.register_vmap(f"mra_attention::{name}", rule)

    def reorder_rule(info, in_dims, inputs, index, inverse):
        def call(index, inverse, *inputs):
            return torch.ops.mra_attention.reorder(inputs, index, inverse)

        results = _reorder_folded(info, in_dims[0], inputs, index, inverse, call)
        return results, [0] * len(results)

    torch.library.register_vmap("mra_attention::reorder", reorder_rule)


if _load.extension is not None:
    _register()
