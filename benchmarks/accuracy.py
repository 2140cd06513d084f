"""``python -m benchmarks accuracy``: approximation error on synthetic inputs, by density and form.

Inputs are sequences in which neighbours resemble each other, as embeddings of a text or a recording
do: noise smoothed over ``--smooth`` positions; queries and keys share half of their variance, as
projections of one sequence do, and are scaled so that ``--spread`` is about the standard deviation
of the logits. The demo has the same on a real model's inputs.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.cases import FORMS, ratio
from benchmarks.inputs import smoothed
from benchmarks.options import add_common, begin, block_size, listed, shape, share
from mra_attention import mra_attention


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks accuracy", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add("--shape", type=shape, default=[1, 4, 1024, 64], metavar="B,H,N,D")
    add("--density", type=listed(share), default=[1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0])
    add("--block-size", type=block_size, default=(32, 32))
    add("--smooth", type=int, default=16, help="positions that a neighbourhood reaches")
    add("--spread", type=float, default=2.0, help="standard deviation of the logits")
    return parser


def inputs(sizes, smooth, spread, seed, device):
    """query, key, value (B, H, N, D), float32."""
    B, H, N, D = sizes
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, B, H, D, N + smooth - 1, generator=generator)
    x = smoothed(noise, torch.hann_window(smooth + 2, periodic=False)[1:-1])
    x = x.transpose(-1, -2).contiguous().to(device)
    return *((spread / 2) ** 0.5 * (x[:2] + x[2])), x[3]


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("accuracy", args, argv)
    result["rows"] = []
    q, k, v = inputs(args.shape, args.smooth, args.spread, args.seed, device)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    report.print_environment(result)
    report.say("|o - exact| / |exact|, mean over heads")
    report.say(f"{'density':>8}" + "".join(f"{form.name:>18}" for form in FORMS))
    for density in args.density:
        row = {"density": density}
        for form in FORMS:
            out = mra_attention(
                q, k, v, density=density, block_size=args.block_size, coarse=form.coarse,
                order=form.order,
            )  # fmt: skip
            error = (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
            row[form.name] = error.mean().item()
        result["rows"].append(row)
        report.say(f"{ratio(density):>8}" + "".join(f"{row[f.name]:18.4f}" for f in FORMS))
    report.write_json(args.json, result)
    return result
