"""What is installed, and what serves this machine."""

import torch

from . import _load

__all__ = ["info"]


class Info(dict):
    """A dict that prints as a table, one entry a line."""

    def __str__(self):
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in self.items())


def info():
    """Report of the installation as a dict; ``print(info())`` shows it.

    torch, torch_cuda: versions that run. built_for_torch, compiler, cuda, cuda_archs: what the
    operators were compiled with ("" without CUDA). device: the GPU, or "cpu". kernels: those that
    can serve this machine, as dicts of device, stage, kernel, file, arch, dtypes and head_dims.
    problem: None, or one sentence that says what is missing and why. Never raises."""
    report = Info(torch=torch.__version__, torch_cuda=torch.version.cuda or "")
    report.update(built_for_torch="", compiler="", cuda="", cuda_archs="", device=_device())
    report.update(kernels=[], problem=None)
    if _load.extension is None:
        report["problem"] = _load.problem
        return report
    build = _load.extension.build_info()
    report.update(
        built_for_torch=build["torch_version"],
        compiler=build["compiler"],
        cuda=build["cuda_version"],
        cuda_archs=build["cuda_archs"],
    )
    report["problem"] = _cuda_problem(build)
    report["kernels"] = [
        kernel
        for kernel in _load.extension.kernels()
        if kernel["device"] == "cpu" or (report["problem"] is None and torch.cuda.is_available())
    ]
    return report


def _device():
    if not torch.cuda.is_available():
        return "cpu"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return f"{name} (sm_{major}{minor})"


def _cuda_problem(build):
    """Why no CUDA kernel serves this machine; None when one does, or there is no GPU to serve."""
    if not torch.cuda.is_available():
        return None
    if not build["with_cuda"]:
        return (
            "a GPU is here, but only the CPU operators were built (the build said why: no nvcc, or "
            "one that doesn't fit torch); build again to use it"
        )
    have = torch.cuda.get_device_capability()
    if not any(_serves(arch, have) for arch in _split(build["cuda_archs"])):
        return (
            f"the GPU is sm_{have[0]}{have[1]}, the kernels were built for {build['cuda_archs']}: "
            "build again with TORCH_CUDA_ARCH_LIST set for it"
        )
    return None


def _split(archs):
    return archs.replace(";", " ").replace(",", " ").split()


def _serves(arch, have):
    """Whether code for ``arch`` ("8.0", "9.0a", "8.0+PTX") runs on compute capability ``have``."""
    number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
    exact = number[-1] in "af"  # features of one architecture alone
    try:
        major, minor = (int(part) for part in number.rstrip("af").split("."))
    except ValueError:
        return True  # a name such as "Hopper": torch understood it
    if exact:
        return (major, minor) == have
    # Binaries run on the same major version with a higher minor one; PTX on everything newer.
    return (major == have[0] and minor <= have[1]) or (ptx and (major, minor) <= have)


def _text(value):
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, list):
        rows = [
            f"{k['device']} {k['stage']}: {k['kernel']} ({k['arch']}; {k['dtypes']})" for k in value
        ]
        return "".join("\n  " + row for row in rows)
    return str(value)
