"""The build: what was compiled, what info() says of it, and what setup.py says where it can't."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mra_attention as mra
from mra_attention import _load
from mra_attention import info as info_function

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup.py"
INFO = sys.modules[info_function.__module__]


def cuda_operators():
    """Whether the dispatcher has CUDA kernels for every operator."""
    has = [
        torch._C._dispatch_has_kernel_for_dispatch_key(f"mra_attention::{name}", "CUDA")
        for name in ("pool", "plan", "forward", "backward", "reorder")
    ]
    assert all(has) or not any(has), has
    return all(has)


def nvcc():
    """nvcc of CUDA_HOME or PATH when it has the major version that torch was built for, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if not found or torch.version.cuda is None or os.environ.get("MRA_CPU_ONLY") == "1":
        return None
    text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", text)
    return found if release and release[1] == torch.version.cuda.split(".")[0] else None


def test_info_tells_what_was_compiled():
    """info() against the dispatcher, which knows what is there."""
    report, build = mra.info(), _load.extension.build_info()
    assert build["with_cuda"] == cuda_operators()
    table = {kernel["device"] for kernel in _load.extension.kernels()}
    if cuda_operators():
        assert report["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert re.fullmatch(r"[\w.+;, ]+", report["cuda_archs"])
        assert table == {"cpu", "cuda"}
    else:
        assert report["cuda"] == report["cuda_archs"] == "" and table == {"cpu"}
    serves = {kernel["device"] for kernel in report["kernels"]}
    gpu = torch.cuda.is_available() and cuda_operators() and report["problem"] is None
    assert serves == ({"cpu", "cuda"} if gpu else {"cpu"})
    assert report["built_for_torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all((ROOT / kernel["file"]).exists() for kernel in _load.extension.kernels())


def test_cuda_is_compiled_where_nvcc_is():
    found = nvcc()
    if found is None:
        pytest.skip(f"no nvcc that fits torch {torch.__version__} (CUDA {torch.version.cuda})")
    assert cuda_operators(), f"{found} is here, but the CUDA kernels were not compiled"


def test_hopper_kernels_compile_without_spills():
    """Every kernel of sm90/: the fine ones hold all of their registers, none serialises wgmma."""
    found = nvcc()
    if found is None:
        pytest.skip("no nvcc that fits torch")

    def compile(source):
        flags = ["-std=c++17", "--expt-relaxed-constexpr", "-O3", "-arch=sm_90a", "-Xptxas", "-v"]
        command = [found, *flags, "-cubin", "-o", os.devnull, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        return source.stem, done.returncode, done.stdout + done.stderr

    sources = sorted((ROOT / "csrc/cuda/sm90/instances").glob("*.cu"))
    assert len(sources) == 84
    with ThreadPoolExecutor(2) as pool:
        for name, code, log in pool.map(compile, sources):
            assert code == 0, log
            assert "serialized" not in log, log
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
            # Outside of the loops over keys but for some words of short heads without order 1:
            # where the rest of the registers is worth more (docs/kernels.md).
            most = {"forward_head_order1": 16, "forward_head_centred": 24}
            most |= {"forward_head_sampled": 20, "forward_head_state": 8, "forward_head_row": 12}
            outside = max((n for start, n in most.items() if name.startswith(start)), default=0)
            assert spills and max(spills) <= outside, log


class FakeExtension:
    """A build of each kind, seen by info()."""

    def __init__(self, cuda, archs="8.0+PTX"):
        self.cuda, self.archs = cuda, archs if cuda else ""

    def build_info(self):
        return {
            "torch_version": "2.11.0", "compiler": "g++", "with_cuda": self.cuda,
            "cuda_version": "13.0" if self.cuda else "", "cuda_archs": self.archs,
        }  # fmt: skip

    def kernels(self):
        devices = ("cpu", "cuda") if self.cuda else ("cpu",)
        return [
            dict.fromkeys(("stage", "kernel", "file", "arch", "dtypes", "head_dims"), "x")
            | {"device": device}
            for device in devices
        ]


@pytest.mark.parametrize(
    ("cuda", "archs", "gpu", "problem", "devices"),
    [
        (False, "", None, None, {"cpu"}),
        (True, "8.0", None, None, {"cpu"}),
        (False, "", (9, 0), "only the CPU operators", {"cpu"}),
        (True, "8.0", (9, 0), "sm_90", {"cpu"}),
        (True, "8.0+PTX", (9, 0), None, {"cpu", "cuda"}),
        (True, "8.0;9.0a", (9, 0), None, {"cpu", "cuda"}),
    ],
)
def test_info_of_every_build_and_machine(monkeypatch, cuda, archs, gpu, problem, devices):
    monkeypatch.setattr(_load, "extension", FakeExtension(cuda, archs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
    report = mra.info()
    assert {kernel["device"] for kernel in report["kernels"]} == devices
    assert (report["cuda"] != "") == cuda and report["cuda_archs"] == archs
    if problem is None:
        assert report["problem"] is None
    else:
        assert problem in report["problem"] and "build again" in report["problem"]
    assert ("sm_90" in report["device"]) == (gpu is not None)


def test_info_without_a_build(monkeypatch):
    monkeypatch.setattr(_load, "extension", None)
    monkeypatch.setattr(_load, "problem", "not built")
    report = mra.info()
    assert report["problem"] == "not built" and report["kernels"] == []


@pytest.mark.parametrize("command", ["build_ext", "bdist_wheel", "--version"])
def test_setup_without_torch_says_what_to_do(tmp_path, command):
    """A Python that has setuptools and no torch: one sentence, no traceback, nothing built."""
    # -S leaves the site-packages out; setuptools comes back in through a folder of its own.
    site = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for package in ("setuptools", "_distutils_hack"):
        (tmp_path / package).symlink_to(site / package)
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['setup.py', {command!r}]; runpy.run_path({str(SETUP)!r}, run_name='__main__')"  # noqa: E501
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout + run.stderr
    message = run.stderr.strip()
    assert "Traceback" not in message and len(message.splitlines()) == 1, message
    assert "install torch first" in message and "pip install --no-build-isolation ." in message
    assert {p.name for p in tmp_path.iterdir()} == {"setuptools", "_distutils_hack"}


def test_package_without_torch_says_what_to_do():
    """So does importing the package."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mra_attention"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert re.search(r"ImportError: mra_attention needs PyTorch.*install torch", run.stderr)
    assert "--no-build-isolation" in run.stderr.strip().splitlines()[-1]


def setup_functions(monkeypatch, **environment):
    """The functions of setup.py, without its call of setup()."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    source = SETUP.read_text(encoding="utf-8").split("\nsetup(\n")[0]
    names = {"__name__": "setup", "__file__": str(SETUP)}
    exec(compile(source, str(SETUP), "exec"), names)
    return names


def test_setup_says_why_cuda_is_left_out(monkeypatch, tmp_path):
    names = setup_functions(monkeypatch, MRA_CPU_ONLY="1")
    assert names["cuda_problem"]() == "MRA_CPU_ONLY=1 is set"
    monkeypatch.delenv("MRA_CPU_ONLY")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in names["cuda_problem"]()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setattr(names["cpp_extension"], "CUDA_HOME", None)
    assert "nvcc was not found" in names["cuda_problem"]()
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 98.1, V98.1'\n")
    fake.chmod(0o755)
    monkeypatch.setattr(names["cpp_extension"], "CUDA_HOME", str(tmp_path))
    assert names["cuda_problem"]() == f"nvcc of {tmp_path} is CUDA 98, torch needs CUDA 99"
    monkeypatch.setattr(torch.version, "cuda", "98.3")
    assert names["cuda_problem"]() is None


def test_cpu_build_carries_no_cuda_source(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = setup_functions(monkeypatch, MRA_CPU_ONLY="1")
    built = names["extension"]()
    assert not [s for s in built.sources if s.endswith(".cu") or "cuda" in s]
    assert "CPU-only build, MRA_CPU_ONLY=1 is set" in capsys.readouterr().err
