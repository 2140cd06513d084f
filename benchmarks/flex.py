"""FlexAttention over one of our plans, or over windows: the list of blocks made before the timing,
for free.

FlexAttention's kernels need mask blocks that are multiples of their tiles, and torch's own tiles
are up to 128: a plan of smaller blocks gets tiles of its block size. For the forward kernel options
say so; the backward looks at the tile's defaults alone when it accepts a mask, so that those are
replaced while it compiles. Mask blocks of 128 run with torch's defaults.
"""

import contextlib
import unittest.mock

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.peers import BLOCK, FIRST, budget, windows

TILE = 64  # of the windows' masks: their budgets are a few such tiles


def flex_attend(plan, case):
    """Function (query, key, value) -> out, compiled at its first calls for this plan alone, and the
    context that its runs need."""
    mask = block_mask(plan)
    block = min(plan.block_size)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    around = contextlib.nullcontext
    options = {"block_mask": mask, "enable_gqa": case.H != case.Hk}
    if block < 128:
        stages = 3 if case.D <= 64 else 2
        options["kernel_options"] = {
            "fwd_BLOCK_M": plan.block_size[0], "fwd_BLOCK_N": plan.block_size[1],
            "fwd_num_stages": 3, "fwd_num_warps": 4,
        }  # fmt: skip
        around = _Compiling(block, stages)

    def attend(query, key, value):
        return compiled(query, key, value, **options)

    return attend, around


def block_mask(plan):
    """BlockMask whose full blocks are the plan's pairs, and that has no partial block."""
    dense = plan.to_dense()
    count = dense.sum(-1, dtype=torch.int32)
    index = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(index), count, index,
        BLOCK_SIZE=plan.block_size, seq_lengths=(plan.N, plan.M),
    )  # fmt: skip


def flex_windows(query, key, value, density, first_tokens=False):
    """Function (query, key, value) -> out, compiled: ``peers.local``, or ``local_global`` with
    ``first_tokens``. The arguments give sizes and device."""
    mask = window_mask(query.shape[2], key.shape[2], budget(density, key), first_tokens, key.device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    options = {
        "fwd_BLOCK_M": TILE, "fwd_BLOCK_N": TILE, "fwd_num_stages": 3, "fwd_num_warps": 4,
    }  # fmt: skip
    return lambda *qkv: compiled(*qkv, block_mask=mask, kernel_options=options)


def window_mask(N, M, count, first_tokens, device):
    """BlockMask of windows as peers.py has them, ``count`` keys a query. By tables with an entry
    for each query, so that all densities compile to one kernel."""
    first = count // FIRST if first_tokens else 0
    low, width = windows(N, M, count - first, first, device=device)
    low = low.int().repeat_interleave(BLOCK, output_size=BLOCK * len(low))[:N]
    high, front = low + width, torch.full_like(low, first)
    low[:first], high[:first] = 0, M  # the first tokens see all

    def seen(b, h, i, j):
        return (j < front[i]) | ((j >= low[i]) & (j < high[i]))

    return create_block_mask(seen, None, None, N, M, device, BLOCK_SIZE=TILE)


class _Compiling:
    """Context that gives inductor our backward tile, for the first calls, in whichever thread it
    compiles; then costs nothing."""

    def __init__(self, block, stages, calls=8):
        self.block, self.stages, self.calls = block, stages, calls

    def __call__(self):
        self.calls -= 1
        if self.calls < 0:
            return contextlib.nullcontext()
        from torch._inductor.choices import InductorChoices
        from torch._inductor.template_heuristics.triton import FlexBwDConfig

        tile = FlexBwDConfig(*(self.block,) * 4, self.stages, 4)
        return unittest.mock.patch.object(
            InductorChoices, "get_flex_attention_bwd_configs", lambda *args, **kwargs: [tile]
        )
