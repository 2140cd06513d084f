"""Activation checkpointing, whole and selective, and the names that torch.profiler shows."""

import functools

import pytest
import torch
from helpers import DEVICES
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mra_attention import mra_attention

OPS = torch.ops.mra_attention


class Calls(TorchDispatchMode):
    """How often each operator of ours reaches a device."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is OPS.forward.default
        self.backward += func is OPS.backward.default
        return func(*args, **(kwargs or {}))


def block(q, k, v):
    """Attention between elementwise operations that checkpointing may compute again."""
    return mra_attention(q.sin(), k.cos(), v.tanh(), density=0.3, block_size=32).exp()


def keep(op):
    """A policy that saves the results of ``op`` and computes everything else again."""

    def policy(_, func, *args, **kwargs):
        same = func == op
        return CheckpointPolicy.MUST_SAVE if same else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def run(device, data, **how):
    """Output and gradients, with the calls that they took."""
    tensors = [x.to(device).requires_grad_() for x in data]
    with Calls() as calls:
        out = checkpoint(block, *tensors, use_reentrant=False, **how) if how else block(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors)
    return [out, *grads], (calls.forward, calls.backward)


@pytest.mark.parametrize(
    "how, forwards",
    [
        (dict(determinism_check="default"), 2),
        (dict(context_fn=keep(OPS.forward.default)), 1),
        (dict(context_fn=keep(torch.ops.aten.sin.default)), 2),
    ],
    ids=["whole", "attention saved", "sine saved"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_checkpoint(device, how, forwards):
    data = torch.randn(3, 2, 2, 100, 16)
    expected, calls = run(device, data)
    assert calls == (1, 1)
    got, calls = run(device, data, **how)
    assert calls == (forwards, 1)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("saved, forwards", [(OPS.forward.default, 1), (None, 2)])
def test_checkpoint_inside_a_compiled_program(saved, forwards):
    """The compiler's partitioner keeps or repeats the operator as the policy says."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def note(graph, _):
        graphs.append(sum(node.target is OPS.forward.default for node in graph.graph.nodes))
        return graph

    def model(*tensors):
        return checkpoint(block, *tensors, use_reentrant=False, context_fn=keep(saved)).neg()

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition
    )
    data = torch.randn(3, 2, 2, 100, 16)
    runs = []
    for function in (model, torch.compile(model, backend=backend, fullgraph=True)):
        tensors = [x.clone().requires_grad_() for x in data]
        out = function(*tensors)
        runs.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert graphs == [1, forwards - 1]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_profiler_names(device):
    q = torch.randn(1, 2, 100, 16, device=device, requires_grad=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        mra_attention(q, q, q, density=0.3, block_size=32).sum().backward()
    events = {event.key: event for event in profiler.key_averages()}
    for name in ("mra_attention::forward", "mra_attention::backward"):
        assert events[name].count >= 1
        if device == "cuda":
            assert events[name].device_time_total > 0
