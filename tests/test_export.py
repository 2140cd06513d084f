"""torch.export and AOTInductor: programs that outlive the Python that made them."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import CUDA, DEVICES, ROOT, aoti_example
from torch import nn
from torch.export import Dim
from torch.fx.experimental import _config as shape_config

from mra_attention import MRAConfig, MRAMultiheadAttention, mra_attention, replace_attention

BLOCK = 32
CONFIG = MRAConfig(density=0.3, block_size=BLOCK)
E, HEADS = 32, 2
SHAPES = [(2, 70), (3, 33), (1, 97), (5, 260)]


class Function(nn.Module):
    def forward(self, q, k, v, key_mask):
        return mra_attention(q, k, v, key_mask, config=CONFIG, return_lse=True)

    @staticmethod
    def inputs(B, N):
        M = N + 51
        q, k, v = torch.randn(B, HEADS, N, 16), *torch.randn(2, B, 1, M, 16)
        return q, k, v, torch.rand(B, M) < 0.9

    @staticmethod
    def dims(B, N, M):
        return {0: B, 2: N}, {0: B, 2: M}, {0: B, 2: M}, {0: B, 1: M}


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MRAMultiheadAttention(E, HEADS, batch_first=True, config=CONFIG)

    def forward(self, x, ignored):
        return self.attention(x, x, x, key_padding_mask=ignored, need_weights=False)[0]

    @staticmethod
    def inputs(B, N):
        return torch.randn(B, N, E), (torch.arange(N) >= N - 5).expand(B, N)

    @staticmethod
    def dims(B, N, _):
        return {0: B, 1: N}, {0: B, 1: N}


class Encoder(Module):
    def __init__(self):
        nn.Module.__init__(self)
        layer = nn.TransformerEncoderLayer(E, HEADS, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert replace_attention(self, CONFIG) == 2

    def forward(self, x, ignored):
        return self.layers(x, src_key_padding_mask=ignored)


def inputs_of(model, shape, device):
    return [x.to(device) for x in model.inputs(*shape)]


def round_trip(model, strict, *dims, device="cpu"):
    """The model exported, written and read again; and how often attention is in it."""
    program = torch.export.export(
        model, tuple(inputs_of(model, SHAPES[0], device)), strict=strict,
        dynamic_shapes=model.dims(*dims),
    )  # fmt: skip
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    calls = sum("mra_attention.forward" in str(node.target) for node in program.graph.nodes)
    return program.module(), calls


def equal(got, expected):
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind, calls", [(Function, 1), (Module, 1), (Encoder, 2)])
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_round_trip(device, kind, calls, strict):
    """Any batch size, and any length of two blocks or more."""
    model = kind().eval().to(device)
    dims = (Dim("B", min=1), Dim.AUTO, Dim.AUTO)
    loaded, found = round_trip(model, strict, *dims, device=device)
    assert found == calls
    for shape in SHAPES:
        inputs = inputs_of(model, shape, device)
        assert equal(loaded(*inputs), model(*inputs)), shape
    with pytest.raises((AssertionError, RuntimeError), match=re.escape(f"// {BLOCK}")):
        loaded(*inputs_of(model, (2, BLOCK - 5), device))


@pytest.mark.parametrize("strict", [False, True])
def test_round_trip_with_named_lengths(strict):
    long = [Dim(name, min=BLOCK + 1) for name in "NM"]
    model = Function()
    loaded, _ = round_trip(model, strict, Dim("B", min=1), *long)
    for shape in SHAPES:
        inputs = model.inputs(*shape)
        assert equal(loaded(*inputs), model(*inputs)), shape
    with pytest.raises((AssertionError, RuntimeError), match=f">= {BLOCK + 1}"):
        loaded(*model.inputs(2, BLOCK))


@pytest.mark.parametrize("strict", [False, True])
def test_round_trip_of_every_length(strict):
    """torch's switch that keeps sizes of 1 among the others."""
    model = Function()
    with shape_config.patch(backed_size_oblivious=True):
        loaded, _ = round_trip(model, strict, Dim("B"), Dim("N"), Dim("M"))
    for shape in [*SHAPES, (2, 20), (1, 1)]:
        inputs = model.inputs(*shape)
        assert equal(loaded(*inputs), model(*inputs)), shape


def test_exported_program_trains():
    """Gradients of an exported program are those of the model."""
    model = Module().eval()
    loaded, _ = round_trip(model, False, Dim("B", min=1), Dim.AUTO, None)
    x, ignored = model.inputs(3, 80)
    grads = []
    for run in (model, loaded):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(leaf, ignored).square().sum(), leaf)
        grads.append(grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().max() > 0


def test_aot_inductor(aoti_package):
    """A shared library without Python: other batch sizes and lengths than it was compiled for."""
    check_package(aoti_package, "cpu")


@pytest.mark.parametrize("device", [CUDA])
def test_aot_inductor_on_a_gpu(device, tmp_path):
    """In a process of its own, without CXX: packages of any model into which a compiler links
    libstdc++ statically crash in torch's loader (torch 2.11), in a regular expression."""
    code = (
        "import pathlib, helpers, test_export\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        f"test_export.check_package(helpers.aoti_package({device!r}, folder), {device!r})\n"
    )
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    env = {name: value for name, value in os.environ.items() if name != "CXX"}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**env, "PYTHONPATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def check_package(package, device):
    loaded, model = torch._inductor.aoti_load_package(package), aoti_example()
    for B, N in SHAPES:
        q, k, v = torch.randn(3, B, 2, N, 16, device=device)
        expected = model(q, k, v)
        torch.testing.assert_close(loaded(q, k, v), expected)
        assert (expected - q).abs().max() > 0.1
