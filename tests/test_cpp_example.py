"""examples/cpp: configured, built and run; its numbers against Python's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, limit, relative_error

from mra_attention import _load, mra_attention

SIZES = dict(B=2, H=4, Hk=2, N=300, D=64)
NAMES = ("out", "dq", "dk", "dv")


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    # The package of that name puts it beside Python, which need not be on PATH.
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("the C++ example needs cmake: pip install cmake")
    folder = tmp_path_factory.mktemp("cpp")
    code, log = run(
        cmake, "-S", ROOT / "examples" / "cpp", "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
        f"-DTORCH_ROOT={Path(torch.__file__).parent}", f"-DPython3_EXECUTABLE={sys.executable}",
    )  # fmt: skip
    if code and ("Could NOT find Python3" in log or "needs a shared libpython" in log):
        pytest.skip("the C++ example needs a shared libpython, which this Python comes without")
    assert code == 0, log
    code, log = run(cmake, "--build", folder)
    assert code == 0, log
    return folder / "attention"


def numbers(line):
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.e+-]+)", line)}


def inputs():
    """Those of main.cpp: the generator of torch is the same from C++."""
    B, H, Hk, N, D = SIZES.values()
    torch.manual_seed(0)
    k = torch.randn(B, Hk, N, D, dtype=torch.float64).cumsum(2) / 8
    q = k.repeat_interleave(2, 1) + torch.randn(B, H, N, D, dtype=torch.float64) / 2
    return q, k, torch.randn_like(k), torch.randn_like(q)


def errors(density):
    """What main.cpp prints, by Python's function."""
    q, k, v, grad = inputs()

    def results(attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def exact(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    ours = results(lambda q, k, v: mra_attention(q, k, v, density=density, block_size=32))
    pairs = zip(NAMES, ours, results(exact), strict=True)
    return {name: relative_error(a, b) for name, a, b in pairs}


def test_program(program, aoti_package):
    code, output = run(program, _load.extension.__file__, aoti_package)
    assert code == 0, output
    whole, quarter, package = output.strip().splitlines()[-3:]
    assert whole.startswith("density 1: ") and tuple(numbers(whole[10:])) == NAMES, output
    assert all(error <= limit(torch.float64, "cpu", 0) for error in numbers(whole[10:]).values())
    assert quarter.startswith("density 1/4: "), output
    assert numbers(quarter[12:]) == {
        name: pytest.approx(error, rel=0.005) for name, error in errors(0.25).items()
    }, output
    assert all(0.01 < error < 0.5 for error in numbers(quarter[12:]).values()), output
    assert package.startswith("package: "), output
    assert numbers(package[8:])["out"] <= limit(torch.float32, "cpu", 0), output


def test_program_without_the_operators(program, tmp_path):
    code, output = run(program)
    assert code == 2 and "usage:" in output
    code, output = run(program, tmp_path / "missing.so")
    assert code == 1 and "missing.so" in output
