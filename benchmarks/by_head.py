"""The default form with a density for each head of each layer: numbers of exact blocks from one
half of the windows, as many in all as the same for every head would be; errors from the other."""

import dataclasses
import functools
import math

import torch

from benchmarks.cases import DEFAULT, Unsupported
from mra_attention import MRAConfig, mra_attention
from mra_attention.head_density import give_out

FORM = DEFAULT
NAME = f"{FORM.name}, by head"
TRIED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # blocks a row


def errors(out, exact):
    """‖out − exact‖ / ‖exact‖ of each head, (B, H)."""
    return (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


class ByHead:
    """Of entries (windows * layers, H, N, D), windows of ``layers`` entries each, and what exact
    attention gives of them, at one block size.

    tried: numbers of blocks a row. measured: errors (2, len(tried), layers * H), mean over the
    windows of each half."""

    def __init__(self, qkv, exact, layers, block_size, densities):
        if len(exact) < 2 * layers:
            raise Unsupported(f"got {len(exact) // layers} windows, expected at least 2")
        self.layers, self.block_size = layers, block_size
        self.blocks = -(-qkv[1].shape[2] // block_size[1])
        wanted = [self.each(density) for density in densities]
        self.tried = sorted({n for n in (*TRIED, *wanted) if n <= self.blocks})
        halves = []
        for count in self.tried:
            out = mra_attention(*qkv, blocks_per_row=count, block_size=block_size)
            error = errors(out.double(), exact).unflatten(0, (-1, layers))  # windows, layers, H
            halves.append([half.mean(0).flatten() for half in error.chunk(2)])
        self.measured = torch.stack([torch.stack(half) for half in zip(*halves, strict=True)])

    def each(self, density):
        """Blocks a row of every head at one density for all."""
        return max(1, math.ceil(density * self.blocks))

    def given(self, half, density):
        """Which of ``tried`` each head gets by the errors of a half, a list of layers * H."""
        known = self.measured[half]
        total = self.each(density) * known.shape[1]
        return give_out(known.tolist(), self.tried, total=total)

    def config(self, half, density):
        """By the numbers from that half, for the heads of all layers."""
        counts = [self.tried[i] for i in self.given(half, density)]
        each = tuple((count - 0.5) / self.blocks for count in counts)
        return MRAConfig(**dataclasses.asdict(FORM), density=each, block_size=self.block_size)

    def attend(self, config, *qkv):
        """Attention on layers of windows: those of one window are heads of one entry, in the result
        too: to part them again is a copy."""
        if len(qkv[0]) % self.layers:
            raise Unsupported(f"{len(qkv[0])} entries are no windows of {self.layers} layers")
        heads = [x.unflatten(0, (-1, self.layers)).flatten(1, 2) for x in qkv]
        return mra_attention(*heads, config=config)

    def unseen(self, configs, *qkv):
        """Each half by the numbers from the other."""
        windows = len(qkv[0]) // self.layers
        first = -(-windows // 2) * self.layers
        parts = zip(*(x.split((first, len(x) - first)) for x in qkv), strict=True)
        out = torch.cat([self.attend(configs[1 - i], *part) for i, part in enumerate(parts)])
        return out.unflatten(1, (self.layers, -1)).flatten(0, 1)

    def runs(self, density):
        """(function to time, function whose errors count)"""
        configs = [self.config(half, density) for half in (0, 1)]
        return functools.partial(self.attend, configs[0]), functools.partial(self.unseen, configs)
