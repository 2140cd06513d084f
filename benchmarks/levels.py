"""``python -m benchmarks levels``: error and time of two resolutions at several budgets, and of
more than two at several, on inputs with structure: which has the lower error in the same time?

Error is ‖o - exact‖ / ‖exact‖ over sampled rows of a head, mean over sampled heads, against exact
attention in float64 on the same inputs. Behind each row with levels stands the error that two
resolutions have in its time: between the two rows beside it, error and time as logarithms.

Inputs are those of ``inputs.py``: ``correlated``; ``smooth L``, noise smoothed over L positions;
``many``, the sum of such noise with L from 16 to 8192.
"""

import argparse
import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.backends import Prepared
from benchmarks.cases import PASSES, Case, Form
from benchmarks.environment import plain
from benchmarks.inputs import correlated, normal, smooth
from benchmarks.options import add_common, add_sizes, begin, levels, listed
from benchmarks.report import number, say
from benchmarks.timing import make_timer
from mra_attention import mra_attention

MANY = (16, 128, 1024, 8192)  # positions over which the parts of "many" are smoothed
SPREAD = 4.5  # standard deviation of the logits of smooth inputs
LEVELS = (((256, 16),), ((256, 32),), ((512, 16),), ((1024, 16), (256, 32)))
HEAD = (
    f"{'blocks':>6} {'levels':<24} {'error':>8} {'fwd ms':>9} {'f+b ms':>9} "
    f"{'two-level error in that time: fwd':>34} {'f+b':>8}"
)


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks levels", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add_sizes(parser, heads=8, blocks_per_row=[4, 8, 16, 32, 64, 128])
    add("--length", type=int, default=1 << 16, metavar="N")
    add("--inputs", type=listed(), default=["correlated", "smooth 1024", "many"])
    add("--levels", type=levels, action="append", metavar="BLOCK:CELLS,...", help="coarser "
        "resolutions, the coarsest first; may be given several times")  # fmt: skip
    add("--levels-blocks", type=listed(int), default=[8, 16, 32], help="blocks a row with levels")
    add("--coarse", choices=("block", "row"), default="row")
    add("--order", type=int, choices=(0, 1), default=1)
    add("--rows", type=int, default=128, help="sampled rows of a head")
    add("--sampled-heads", type=int, default=4)
    add("--seconds", type=float, default=0.3, help="time for each row")
    return parser


def make_inputs(name, case, generator):
    """query, key, value (1, H, N, D) in the dtype of the case."""
    kind, _, length = name.partition(" ")
    if kind == "correlated":
        made = correlated(case, generator)
    elif kind == "many" or (kind == "smooth" and length.isdigit()):
        lengths = MANY if kind == "many" else (int(length),)
        made = smooth((case.B, case.H, case.N, case.D), lengths, SPREAD, generator)
    else:
        raise SystemExit(f"--inputs: got {name!r}, expected correlated, many or 'smooth LENGTH'")
    return [t.to(case.torch_dtype).contiguous() for t in made]


class Sample:
    """Rows of some heads, and exact attention of these: memory O(rows * N)."""

    def __init__(self, inputs, rows, heads, generator):
        query, key, value = inputs
        H, N = query.shape[1:3]
        self.heads = torch.linspace(0, H - 1, min(heads, H)).long().tolist()
        self.rows = torch.randperm(N, generator=generator, device=query.device)[:rows]
        self.exact = [
            F.scaled_dot_product_attention(
                *(t.double()[None, None] for t in (query[0, h, self.rows], key[0, h], value[0, h]))
            )[0, 0]
            for h in self.heads
        ]

    def error(self, out):
        errors = [
            (out[0, h, self.rows] - exact).norm() / exact.norm()
            for h, exact in zip(self.heads, self.exact, strict=True)
        ]
        return torch.stack(errors).mean().item()


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("levels", args, argv)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    form = Form(args.coarse, args.order)
    result["rows"] = []
    report.print_environment(result)
    say(f"{args.heads} heads of {args.head_dim}, N {args.length}, {dtype}, {form.name}")
    base = Case("levels", 1, args.heads, args.length, args.head_dim, dtype=dtype,
                block_size=args.block_size, forms=(form,))  # fmt: skip
    budgets = [(blocks, ()) for blocks in args.blocks_per_row]
    for one in args.levels or LEVELS:
        budgets += [(blocks, one) for blocks in args.levels_blocks]
    timer = make_timer(device, args.seconds)
    for name in args.inputs:
        generator = torch.Generator(device).manual_seed(args.seed)
        inputs = make_inputs(name, base, generator)
        grad_out = normal(base, generator, base.H, base.N)
        sample = Sample(inputs, args.rows, args.sampled_heads, generator)
        say(f"{name}\n{HEAD}")
        here = []
        for blocks, one in budgets:
            case = dataclasses.replace(base, blocks_per_row=blocks, levels=one)
            attend = functools.partial(mra_attention, **case.options(form))
            row = {"inputs": name, "blocks_per_row": blocks, "levels": [list(x) for x in one]}
            row |= measure(Prepared(attend, inputs, grad_out), sample, timer, args.passes)
            here.append(row)
            compare(here)
            print_row(row)
        result["rows"] += here
        report.write_json(args.json, result)
        say_verdict(here)
        report.free(device)
    return result


def measure(prepared, sample, timer, passes):
    """Error and times {pass: milliseconds} of one row, or why there are none."""
    row = {"status": "ok", "reason": None, "error": None, "ms": {}, "two_levels": {}}
    try:
        row["error"] = sample.error(prepared.forward())
        for which in passes:
            row["ms"][which] = timer.measure(prepared.run(which)).median
    except Exception as problem:  # one budget that can't run is a row that says why
        row |= {"status": "failed", "reason": plain(problem)}
    return row


def compare(rows):
    """Sets ``two_levels`` of rows with levels: {pass: error of two resolutions in its time}."""
    for which in PASSES:
        points = [
            (r["ms"][which], r["error"]) for r in rows if not r["levels"] and which in r["ms"]
        ]
        for row in rows:
            if row["levels"] and which in row["ms"]:
                row["two_levels"][which] = error_at(points, row["ms"][which])


def error_at(points, ms):
    """The error that goes with the time ``ms`` between (time, error) points; None outside."""
    points = sorted(points)
    for (t0, e0), (t1, e1) in zip(points, points[1:], strict=False):
        if t0 <= ms <= t1:
            part = math.log(ms / t0) / math.log(t1 / t0) if t1 > t0 else 0.0
            return math.exp((1 - part) * math.log(e0) + part * math.log(e1))
    return None


def text_of(pairs):
    return ",".join(f"{block}:{cells}" for block, cells in pairs) or "-"


def print_row(row):
    start = f"{row['blocks_per_row']:>6} {text_of(row['levels']):<24}"
    if row["status"] != "ok":
        say(f"{start} {row['status']}: {row['reason']}")
        return
    ms = [f"{number(row['ms'].get(which), '.3f'):>9}" for which in PASSES]
    other = [number(row["two_levels"].get(which), ".4f") for which in PASSES]
    say(f"{start} {row['error']:8.4f} {' '.join(ms)} {other[0]:>34} {other[1]:>8}")


def say_verdict(rows):
    """How many rows with levels are no worse than two resolutions in the same time."""
    for which in PASSES:
        pairs = [
            (row["error"], row["two_levels"][which])
            for row in rows
            if row["two_levels"].get(which) is not None
        ]
        if pairs:
            good = sum(error <= other for error, other in pairs)
            say(f"{report.SHORT[which]}: {good} of {len(pairs)} with levels are no worse than two "
                "resolutions in the same time")  # fmt: skip
