"""``exact_below``: calls with few keys run as exact attention, which is faster there.

The comparison reads shapes alone. Under ``torch.compile`` with dynamic lengths it is a guard: a
program for each side of the threshold, and one more compilation when the first call crosses it.
"""

import math
import operator
import threading
import time

import torch

from . import transforms
from ._constant import constant
from .config import mean_density, pool_of
from .exact import exact_attention
from .functional import mra_attention, pad_head_dim

__all__ = ["BELOW", "FALLBACK", "below", "tokens"]

BELOW = "below exact_below"  # the reason under which such calls are counted
FALLBACK = 1024  # keys below which "auto" is exact where nothing was measured and nothing may be
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
RUNS = 5

_measured = {}  # (device, dtype, head_dim, options) -> tokens
_measuring = threading.Lock()  # two measurements at once would disturb each other


def below(exact_below, query, key, config):
    """Whether a call on query, key (..., N, D), (..., M, D) is one for exact attention.

    exact_below: None never; an int: with fewer keys than that; "auto": with fewer than
        :func:`tokens` measured for this device, dtype, head dim and config.

    "auto" measures at the first eager call that asks. It doesn't while a program is traced, a CUDA
    graph is captured, torch.func transforms the call, or a dispatch mode watches (fake tensors,
    FLOP counters): then it takes what is measured already, else ``FALLBACK``: exact attention where
    it is seldom slower. A compiled program keeps the number that it was traced with. Results near
    the threshold depend on a timing, so give an int where runs, or the processes of one job, must
    agree."""
    if exact_below is None:
        return False
    if exact_below == "auto":
        dtype = _autocast_dtype(query)
        device, head_dim = query.device, operator.index(query.shape[-1])
        if torch.compiler.is_compiling() or not _may_measure(query):
            exact_below = _known(device, _class(dtype), head_dim, *_options(config))
        else:
            exact_below = tokens(device, dtype, head_dim, config)
    return key.shape[-2] < exact_below


def tokens(device, dtype, head_dim, config):
    """The number of keys from which MRA attention with ``config`` is the faster one.

    Measured once in a process for each device, dtype (half types count as one), head_dim and
    config; call it before ``torch.compile`` so that programs with "auto" know. The first of
    ``LENGTHS`` at which the forward pass of MRA attention, without masks or a layout, takes less
    time than exact attention; twice the last one if it never does. Takes a fraction of a second on
    a GPU, up to some seconds on a CPU.

    Raises what :func:`mra_attention.mra_attention` does for a device, dtype or head_dim that it
    doesn't serve."""
    device = torch.empty(0, device=device).device  # with its index
    # Without a layout: of pictures, the lengths here are not theirs. Nor are the heads.
    density = mean_density(config.density)
    config = config.replace(layout=None, pool=pool_of(config), density=density)
    key = (device, _class(dtype), head_dim, *_options(config))
    with _measuring:
        if key not in _measured:
            _measured[key] = _measure(device, dtype, head_dim, config)
        return _measured[key]


def _measure(device, dtype, head_dim, config):
    # A CPU works through heads one by one; a GPU wants enough of them to be busy.
    heads = 4 if device.type == "cpu" else 32
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for length in LENGTHS:
            # No random numbers: a user's generator stays where it is.
            x = torch.arange(3 * heads * length * head_dim, device=device).sin()
            q, k, v = x.to(dtype).view(3, 1, heads, length, head_dim)
            exact = _seconds(lambda: exact_attention(q, k, v), device)  # noqa: B023
            ours = _seconds(
                lambda: mra_attention(*pad_head_dim(q, k, v), config=config, scale=0.1),  # noqa: B023
                device,
            )
            if ours < exact:
                return length
    return 2 * LENGTHS[-1]


def _seconds(call, device):
    """The least time of a call among RUNS."""
    repeat = 1 if device.type == "cpu" else 10  # launches overlap, as they do in a model
    best = math.inf
    for run in range(RUNS + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        _wait(device)
        if run > 0:  # the first one loads code and allocates
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _may_measure(x):
    watched = torch._C._len_torch_dispatch_stack() > 0 or transforms.active()
    if x.device.type not in ("cpu", "cuda") or watched:
        return False
    return x.device.type == "cpu" or not torch.cuda.is_current_stream_capturing()


@constant  # no guard on the table: measuring recompiles nothing
def _known(*key):
    return _measured.get(key, FALLBACK)


def _options(config):
    """config as constants, which a traced program can look up, where its numbers are symbols."""
    block = config.block_size if isinstance(config.block_size, tuple) else (config.block_size,) * 2
    density, count = config.density, config.blocks_per_row
    return (
        None if density is None else operator.index(int(mean_density(density) * 2**30)),
        None if count is None else operator.index(count),
        operator.index(block[0]), operator.index(block[1]), config.coarse,
        operator.index(config.order), config.selection, operator.index(config.diagonal_blocks),
        operator.index(config.first_blocks), pool_of(config),
        *(operator.index(n) for p in config.levels for n in p),
    )  # fmt: skip


def _class(dtype):
    return torch.float16 if dtype == torch.bfloat16 else dtype


def _autocast_dtype(x):
    """The dtype in which autocast will have attention on ``x`` computed."""
    device = x.device.type
    if x.dtype in (torch.float64, torch.float16, torch.bfloat16):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
