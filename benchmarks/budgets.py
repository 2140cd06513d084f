"""``python -m benchmarks budgets``: what it would give to let each head of a model have its own
number of exact blocks a row, as many in all. Of one half of the windows every head's error is
measured at several numbers, as `calibrate` does; numbers are then given out where they take most
off, and errors are measured on the other half. Exact pairs, and so the time, stay the same.

What `MRAConfig.density` by head is worth in exact pairs; `python -m benchmarks accuracy` has it in
time."""

import argparse

import torch

from benchmarks import report
from benchmarks.accuracy import LAYERS, add_inputs, exact_attention, load
from benchmarks.by_head import ByHead
from benchmarks.cases import Unsupported, ratio, sides
from benchmarks.options import add_common, begin, block_size, listed, share


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
def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("budgets", args, argv)
    result["rows"] = rows = []
    report.print_environment(result)
    report.say("error on the windows that were not used: the same for all heads, by head")
    for name in args.inputs:
        qkv = load(name, args).to(device).float()
        layers = LAYERS[name]
        exact, _ = exact_attention(*qkv)
        for size in args.block_size or [(32, 32)]:
            try:
                numbers = ByHead(qkv.unbind(0), exact, layers, size, args.density)
            except Unsupported as problem:
                raise SystemExit(f"{name}: {problem}") from None
            unseen = numbers.measured[1]
            for density in args.density:
                each, at = numbers.each(density), numbers.given(0, density)
                same = unseen[numbers.tried.index(each)].mean().item()
                own = unseen.gather(0, torch.tensor([at], device=device)).mean().item()
                counts = [numbers.tried[i] for i in at]
                row = {"inputs": name, "block_size": list(size), "density": density}
                row |= {"blocks_per_row": each, "same": same, "by_head": own, "counts": counts}
                rows.append(row)
                report.say(
                    f"{name:<10} blocks of {sides(size)} {ratio(density):>5} "
                    f"{same:.4f} {own:.4f}  {min(counts)} to {max(counts)} blocks a row, "
                    f"{sum(counts) / len(counts):.2f} of {each}"
                )
                report.write_json(args.json, result)
    return result
