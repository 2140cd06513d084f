"""Where the numbers come from. Names hardware and software; no path and no host name."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment(device, commit=None):
    """Device, versions, commit of the checkout and date, as a dict for JSON."""
    report = {
        "device": device_name(device),
        "device_type": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit or _commit(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        report |= {"cuda": torch.version.cuda, "capability": capability}
        report |= {"cudnn": torch.backends.cudnn.version(), "driver": _smi("driver_version")}
    return report


def device_name(device):
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    return match[1].strip() if match else platform.machine()


def free_bytes(device):
    """Memory that is free now on the GPU, or on the machine; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def clocks(device):
    """The GPU's clocks (MHz), power (W) and temperature (C) as they are now; None on a CPU."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    values = _smi(",".join(fields))
    return (
        dict(zip(fields, (v.strip() for v in values.split(",")), strict=False)) if values else None
    )


def plain(error):
    """One line that says what an exception says, without paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"(?:[A-Za-z]:)?(?:[/\\][\w.+-]+){2,}", "...", text)
    return text if len(text) <= 200 else text[:197] + "..."


def _commit():
    """Short hash of the checkout, with -dirty when tracked files differ; None outside of one."""
    head = _run("git", "rev-parse", "--short", "HEAD")
    if not head:
        return None
    return head + ("-dirty" if _run("git", "status", "--porcelain", "-uno") else "")


def _smi(query):
    index = str(torch.cuda.current_device())
    found = _run("nvidia-smi", "-i", index, f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return found.splitlines()[0] if found else None


def _run(*command):
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
