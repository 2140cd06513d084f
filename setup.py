"""Builds mra_attention._C: the CPU operators always, the CUDA kernels when nvcc fits torch.

Reads only TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, and MRA_CPU_ONLY=1 (no CUDA kernels).
"""

import os
import re
import subprocess
import sys
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    raise SystemExit(
        "mra_attention is built against the PyTorch that is installed: install torch first, then "
        "run 'pip install --no-build-isolation .' (pip's isolated build environment hides torch)."
    ) from None

WITHOUT_TORCH = {"egg_info", "dist_info", "sdist"}  # commands that compile nothing


def cuda_problem():
    """Why the CUDA kernels are left out: a sentence, or None when they can be built."""
    if os.environ.get("MRA_CPU_ONLY") == "1":
        return "MRA_CPU_ONLY=1 is set"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    home = cpp_extension.CUDA_HOME
    nvcc = os.path.join(home, "bin", "nvcc") if home else None
    if not nvcc or not os.path.exists(nvcc):
        return "nvcc was not found (set CUDA_HOME to build the CUDA kernels)"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", text)
    major = torch.version.cuda.split(".")[0]
    if not release or release[1] != major:
        return f"nvcc of {home} is CUDA {release[1] if release else '?'}, torch needs CUDA {major}"
    return None


def default_archs():
    """Those of the visible GPUs (9.0a: Hopper's own kernels), else the oldest that is taken."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
        return ";".join("9.0a" if gpu == (9, 0) else f"{gpu[0]}.{gpu[1]}" for gpu in found)
    return "8.0+PTX"


def extension():
    sources = glob("csrc/*.cpp") + glob("csrc/common/*.cpp") + glob("csrc/cpu/*.cpp")
    include_dirs = [os.path.abspath("csrc")]
    # -fopenmp at compile time only: the OpenMP runtime is the one that libtorch carries.
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-sign-compare"]
    problem = cuda_problem()
    if problem:
        print(f"mra_attention: CPU-only build, {problem}.", file=sys.stderr)
        return cpp_extension.CppExtension(
            "mra_attention._C",
            sorted(sources),
            include_dirs=include_dirs,
            extra_compile_args={"cxx": cxx},
        )
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_archs())
    print(f"mra_attention: CPU and CUDA build for {archs}.", file=sys.stderr)
    for pattern in ("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp"):
        sources += glob(pattern, recursive=True)
    macros = []
    if "9.0a" in archs:
        macros = [("MRA_SM90A", None)]
    else:  # Hopper's own kernels are for this architecture alone
        sources = [s for s in sources if "/sm90/" not in s]
    if os.environ.get("MRA_RACECHECK"):  # see the Makefile: slower, for compute-sanitizer alone
        macros.append(("MRA_EVERY_LANE_ARRIVES", None))
    return cpp_extension.CUDAExtension(
        "mra_attention._C",
        sorted(sources),
        include_dirs=include_dirs,
        define_macros=macros
        + [
            ("MRA_WITH_CUDA", None),
            ("MRA_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("MRA_CUDA_ARCHS", f'"{archs}"'),
        ],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
    )


setup(
    ext_modules=[] if WITHOUT_TORCH & set(sys.argv) else [extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
