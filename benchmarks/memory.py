"""``python -m benchmarks memory``: memory beyond inputs and outputs against N, at a fixed number of
blocks for each row. The claim is O(N): the exponent of the last doubling is to be about 1."""

import argparse
import dataclasses
import math

from benchmarks import formulas, report
from benchmarks.backends import Context, prepare_mra
from benchmarks.cases import Case, Form
from benchmarks.environment import plain
from benchmarks.options import add_common, add_sizes, begin, listed
from benchmarks.timing import make_timer

LINEAR = 1.1  # the largest exponent that counts as linear


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add("--length", type=listed(int), default=[32768, 65536, 131072, 262144], metavar="N,N,...")
    add_sizes(parser, heads=1)
    add("--coarse", choices=("none", "block", "row"), default="row")
    add("--order", type=int, choices=(0, 1), default=1)
    add("--selection", choices=("row", "global"), default="row")
    return parser


def exponent(small, large):
    """How memory grows between two (N, bytes): 1 is linear, 2 quadratic."""
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("memory", args, argv)
    form = Form(args.coarse, args.order if args.coarse != "none" else 0, args.selection)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    result["form"], result["rows"] = form.name, []
    rows = result["rows"]
    report.print_environment(result)
    report.say(f"{form.name}, {args.blocks_per_row} blocks a row; MiB beyond inputs and outputs")
    report.say(f"{'N':>9} {'pass':<4} {'MiB':>10} {'bytes/token':>12} {'exponent':>9}  inputs MiB")
    timer, last = make_timer(device), {}
    for N in args.length:
        case = Case(
            f"N{N}", 1, args.heads, N, args.head_dim, dtype=dtype, block_size=args.block_size,
            blocks_per_row=args.blocks_per_row,
        )  # fmt: skip
        for which in args.passes:
            row = {"N": N, "pass": which, "peak_bytes": None, "exponent": None, "failed": None}
            rows.append(row)
            try:
                peak = _peak(case, form, which, device, timer, args.seed)
                row["peak_bytes"] = peak
                if which in last and peak > 0:
                    row["exponent"] = exponent(last[which], (N, peak))
                last[which] = N, peak
            except Exception as error:
                row["failed"] = plain(error)
            _print(row, case)
        report.write_json(args.json, result)
        report.free(device)
    ends = {row["pass"]: row["exponent"] for row in rows if row["exponent"] is not None}
    result["linear"] = {which: value <= LINEAR for which, value in ends.items()}
    for which, value in ends.items():
        verdict = "linear" if value <= LINEAR else "NOT linear"
        report.say(f"{which}: {verdict}, exponent {value:.3f} at the last step")
    report.write_json(args.json, result)
    return result


def _peak(case, form, which, device, timer, seed):
    prepared = prepare_mra(form, Context(case, device, seed))
    run = prepared.run(which)
    run()  # what is made once and kept is not this call's
    return timer.peak(run) - formulas.output_bytes(case, which)


def _print(row, case):
    start = f"{row['N']:>9} {report.SHORT[row['pass']]:<4}"
    if row["failed"]:
        report.say(f"{start} failed: {row['failed']}")
        return
    inputs = formulas.output_bytes(dataclasses.replace(case), "backward") / 2**20
    grown = "-" if row["exponent"] is None else f"{row['exponent']:.3f}"
    peak = row["peak_bytes"]
    report.say(f"{start} {peak / 2**20:10.2f} {peak / row['N']:12.1f} {grown:>9}  {inputs:.2f}")
