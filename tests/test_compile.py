"""torch.compile of whole models: one graph, and one for all batch sizes and lengths.

test_operators.py compiles the bare function with each backend."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from helpers import CUDA, DEVICES, ROOT
from torch import nn
from torch._dynamo.utils import counters

from mra_attention import MRAConfig, MRAMultiheadAttention, mra_attention, replace_attention

BLOCK = 32
CONFIG = MRAConfig(density=0.3, block_size=BLOCK)
E, HEADS = 32, 2
# Two shapes to compile, then others that have to run on what was compiled.
FIRST = [(2, 100), (3, 132)]
LATER = [(4, 260), (5, 97), (2, 65), (7, 33)]
# Lengths of one block. torch.compile takes sizes of 1 for constants, the number of blocks too.
ONE_BLOCK = [(3, 20), (4, 32), (2, 7)]


def lengths(B, N, device):
    """bool (B, N), True where a sequence goes on: each one shorter than the one before."""
    at = torch.arange(N, device=device)
    return at < (N - torch.arange(B, device=device)).clamp(min=1)[:, None]


def function(device, **options):
    def model(q, k, v, mask):
        return mra_attention(q, k, v, mask, mask, config=CONFIG, **options)

    def inputs(B, N):
        q, k, v = (torch.randn(B, HEADS, N, 16, device=device) for _ in range(3))
        return q, k, v, lengths(B, N, device)

    return model, inputs


def cross(device):
    """Keys of another length than queries, fewer key heads, the lse too."""

    def model(q, k, v):
        out, lse = mra_attention(q, k, v, config=CONFIG.replace(coarse="block"), return_lse=True)
        return out * lse.sigmoid().unsqueeze(-1)

    def inputs(B, N):
        q, k = torch.randn(B, HEADS, N, 16), torch.randn(B, 1, 2 * N - 13, 16)
        return q.to(device), k.to(device), k.to(device)

    return model, inputs


def module(device):
    attention = MRAMultiheadAttention(E, HEADS, batch_first=True, config=CONFIG).to(device)

    def model(x, ignored):
        return attention(x, x, x, key_padding_mask=ignored, need_weights=False)[0]

    return model, lambda B, N: (torch.randn(B, N, E, device=device), ~lengths(B, N, device))


def layer(device, train):
    encoder = nn.TransformerEncoderLayer(E, HEADS, 64, dropout=0.0, batch_first=True)
    assert replace_attention(encoder, CONFIG) == 1
    encoder.train(train).to(device)

    def model(x, ignored):
        return encoder(x, src_key_padding_mask=ignored)

    return model, lambda B, N: (torch.randn(B, N, E, device=device), ~lengths(B, N, device))


MODELS = {
    "function": lambda device: function(device),
    "causal": lambda device: function(device, is_causal=True),
    "cross": cross,
    "module": module,
    "encoder layer": lambda device: layer(device, train=True),
    "encoder layer in eval": lambda device: layer(device, train=False),
}


class Compiled:
    """A model compiled whole, and how many graphs that took. Called with inputs, it compares
    results and input gradients with the model's own."""

    def __init__(self, model, inputs):
        torch._dynamo.reset()
        counters.clear()
        self.model, self.inputs = model, inputs
        self.counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        self.compiled = torch.compile(model, backend=self.counter, fullgraph=True)

    def __call__(self, B, N):
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in self.inputs(B, N)]
        wanted = [x for x in inputs if x.requires_grad]
        runs = []
        for model in (self.model, self.compiled):
            out = model(*inputs)
            grad = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
            runs.append([out, *torch.autograd.grad(out, wanted, grad)])
        for expected, got in zip(*runs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_for_all_shapes(device, name):
    run = Compiled(*MODELS[name](device))
    for shape in FIRST:
        run(*shape)
    graphs = run.counter.frame_count
    assert 1 <= graphs <= len(FIRST)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in LATER:
            run(*shape)
    assert run.counter.frame_count == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_of_one_block_share_a_graph_of_their_own(device):
    run = Compiled(*function(device))
    for shape in FIRST:
        run(*shape)
    graphs = run.counter.frame_count
    for shape in ONE_BLOCK:
        run(*shape)
    assert run.counter.frame_count == graphs + 1
    assert not counters["graph_break"]


def test_a_recompile_would_be_seen():
    """What the tests above rely on: an option that changes compiles again, and says so."""

    def model(q, k, v, density):
        return mra_attention(q, k, v, density=density, block_size=BLOCK)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    q = torch.randn(1, HEADS, 100, 16)
    compiled(q, q, q, 0.3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(q[:, :, :70], q, q, 0.3)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["function", "module"])
def test_cuda_graphs_replay_what_eager_gives(device, name):
    """mode="reduce-overhead": capture and replays, on new data each time."""
    torch._dynamo.reset()
    counters.clear()
    model, inputs = MODELS[name](device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        x = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(2, 300)]
        wanted = [t for t in x if t.requires_grad]
        runs = []
        for run in (model, compiled):
            out = run(*x)
            grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
            runs.append([out, *torch.autograd.grad(out, wanted, grad)])
        for expected, got in zip(*runs, strict=True):
            if name == "function":  # nothing but the operators
                assert torch.equal(got, expected)
            torch.testing.assert_close(got, expected)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_import_takes_no_compiler():
    """What torch loads only when asked stays out of the import: it takes seconds."""
    code = (
        "import sys, torch, mra_attention;"
        "print([m for m in ('torch._dynamo', 'torch.distributed.tensor', 'transformers')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
