"""``python -m benchmarks host``: what the host takes for a call on a GPU that it never waits for.

Inputs are so small that the device is done before the host is, so this is the least that a call
takes, however short, outside of a CUDA graph. Other work on the machine only adds to it: all calls
take turns, some calls each, and of every call the quickest turn counts."""

import argparse
import time

import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.backends import Context, Prepared, prepare_mra
from benchmarks.cases import DEFAULT, DTYPES, PASSES, Case, Form
from benchmarks.options import add_common, begin, listed

FORMS = (Form("none"), Form("block"), Form("row", 1), DEFAULT)
ROUNDS, CALLS = 200, 5  # so few that none waits for the device


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--length", type=listed(int), default=[512, 1024], metavar="N,N,...")
    add("--heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--dtype", choices=DTYPES, default="bf16")
    add("--rounds", type=int, default=ROUNDS, help="turns of each call")
    return parser


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("host", args, argv)
    if device.type != "cuda":
        raise SystemExit(f"--device: got {device.type}, expected cuda: only there a call returns "
                         "before it is done")  # fmt: skip
    result["rows"] = rows = []
    report.print_environment(result)
    report.say("microseconds of the host a call, forward / forward + backward")
    runs = []
    for N in args.length:
        case = Case(f"N{N}", 1, args.heads, N, args.head_dim, dtype=args.dtype, density=1 / 8)
        for name, prepared in backends(Context(case, device, args.seed)):
            rows.append({"N": N, "backend": name} | dict.fromkeys(PASSES, float("inf")))
            runs += [(rows[-1], which, prepared.run(which)) for which in PASSES]
    for _ in range(args.rounds):
        for row, which, run in runs:
            row[which] = min(row[which], microseconds(run))
    for row in rows:
        times = " ".join(f"{row[which]:9.1f}" for which in PASSES)
        report.say(f"{row['N']:>6} {row['backend']:<30} {times}")
    report.write_json(args.json, result)
    return result


def backends(context):
    """(name, Prepared) of what is timed."""
    exact = Prepared(F.scaled_dot_product_attention, context.inputs, context.grad_out)
    yield "scaled_dot_product_attention", exact
    for form in FORMS:
        yield f"mra {form.name}", prepare_mra(form, context)


def microseconds(run):
    """Of the host for one call of ``run``."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return 1e6 * (time.perf_counter() - start) / CALLS
