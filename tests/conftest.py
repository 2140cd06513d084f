"""Fresh inputs by default, `--seed N` repeats a run; without a GPU, its tests skip, counted."""

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# torch's inductor keeps graphs on disk and doesn't look at an operator's Meta kernel: those that
# were compiled with another build may have other strides.
BUILD = Path(find_spec("mra_attention._C").origin).stat()
CACHE = f"mra_attention-{os.getuid()}-{BUILD.st_size:x}-{BUILD.st_mtime_ns:x}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / CACHE))

NO_GPU = "needs a CUDA device"


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of every random input")


def pytest_configure(config):
    import helpers

    helpers.FIXED_SEED = config.getoption("--seed")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])  # of all workers, with pytest-xdist
    count = sum(report.longrepr[2] == f"Skipped: {NO_GPU}" for report in skipped)
    if count:
        terminalreporter.write_line(f"GPU tests skipped: {count}, no CUDA device")


@pytest.fixture(scope="session")
def aoti_package(tmp_path_factory):
    """What helpers.aoti_package compiles for the CPU: a path."""
    from helpers import aoti_package

    return aoti_package("cpu", tmp_path_factory.mktemp("aoti"))
