"""``python -m benchmarks budgets``: what it would give to let each head of a model have its own
number of exact blocks a row, as many in all. Of one half of the windows every head's error is
measured at several numbers, as `calibrate` does; numbers are then given out where they take most
off, and errors are measured on the other half. Exact pairs, and so the time, stay the same.

What `MRAConfig.density` by head is worth in exact pairs; `python -m benchmarks accuracy` has it in
time."""

import argparse
import math

import torch

from benchmarks import report
from benchmarks.accuracy import LAYERS, add_inputs, errors, exact_attention, load
from benchmarks.cases import ratio, sides
from benchmarks.options import add_common, begin, block_size, listed, share
from mra_attention import mra_attention
from mra_attention.head_density import give_out

TRIED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # blocks a row


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks budgets", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add_inputs(add, ["minilm", "whisper"], [4, 4, 1024, 64])
    add("--density", type=listed(share), default=[1 / 8, 1 / 4, 1 / 2])
    add("--block-size", type=block_size, action="append", metavar="B or BQ,BK",
        help="32; may be given several times")  # fmt: skip
    return parser


@torch.no_grad()
def measure(qkv, layers, size, tried):
    """Errors (2, len(tried), layers * H): mean over the windows of each half."""
    exact, _ = exact_attention(*qkv)
    halves = []
    for count in tried:
        out = mra_attention(*qkv, blocks_per_row=count, block_size=size)
        error = errors(out.double(), exact).unflatten(0, (-1, layers))  # windows, layers, H
        halves.append([half.mean(0).flatten() for half in error.chunk(2)])
    return torch.stack([torch.stack(half) for half in zip(*halves, strict=True)])


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("budgets", args, argv)
    result["rows"] = rows = []
    report.print_environment(result)
    report.say("error on the windows that were not used: the same for all heads, by head")
    for name in args.inputs:
        qkv = load(name, args).to(device).float()
        layers = LAYERS[name]
        if qkv.shape[1] < 2 * layers:
            raise SystemExit(f"{name}: got {qkv.shape[1] // layers} windows, expected at least 2")
        for size in args.block_size or [(32, 32)]:
            blocks = -(-qkv.shape[3] // size[1])
            wanted = [max(1, math.ceil(density * blocks)) for density in args.density]
            tried = sorted({n for n in (*TRIED, *wanted) if n <= blocks})
            known, unseen = measure(qkv.unbind(0), layers, size, tried)
            for density, each in zip(args.density, wanted, strict=True):
                at = give_out(known.tolist(), tried, total=each * known.shape[1])
                counts, at = (torch.tensor(x) for x in ([tried[i] for i in at], at))
                row = {"inputs": name, "block_size": list(size), "density": density}
                row |= {"blocks_per_row": each, "same": unseen[tried.index(each)].mean().item()}
                row["by_head"] = unseen.gather(0, at[None].to(device)).mean().item()
                row["counts"] = counts.tolist()
                rows.append(row)
                report.say(
                    f"{name:<10} blocks of {sides(size)} {ratio(density):>5} "
                    f"{row['same']:.4f} {row['by_head']:.4f}  {min(row['counts'])} to "
                    f"{max(row['counts'])} blocks a row, {counts.float().mean():.2f} of {each}"
                )
                report.write_json(args.json, result)
    return result
