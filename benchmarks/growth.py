"""``python -m benchmarks growth``: time and memory of a token against N, at a fixed number of
blocks a row.

The exact part is linear then; not all is. The plan scores (N / 64)² pairs of blocks, and "row" has
N (N / 64) pairs of a query and a block: in the end the time of a token grows with N. So the
operator ``plan`` (with its pooling of queries and keys) is timed alone too, and each row says its
share. With ``--levels`` the blocks are a few more sizes, and both stay nearly linear.
"""

import argparse
import dataclasses

from benchmarks import formulas, report
from benchmarks.backends import Context, list_backends
from benchmarks.cases import Case, Form
from benchmarks.environment import free_bytes, plain
from benchmarks.options import add_common, add_sizes, begin, levels
from benchmarks.report import say
from benchmarks.speed import new_row, prepare, refuse, time_rows
from benchmarks.timing import make_timer

FORMS = (Form("none"), Form("block"), Form("row", 1))
PLAN = "plan"  # stands where the name of a form does
ROW = ("N", "form", "pass", "status", "reason", "ms", "ns_per_token", "relative", "plan_share",
       "error", "plan_agreement", "peak_bytes", "bytes_per_token")  # fmt: skip
HEAD = (
    f"{'N':>9} {'form':<13} {'pass':<4} {'ms':>10} {'ns/token':>9} {'plan':>6} {'bytes/token':>12} "
    f"{'error':>8}"
)


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add_sizes(parser, heads=16)
    add("--min", type=int, default=1 << 12, metavar="N", help="first N; each next is twice that")
    add("--max", type=int, default=1 << 20, metavar="N")
    add("--base", type=int, default=1 << 14, metavar="N", help="what time per token is set against")
    add("--levels", type=levels, default=(), metavar="BLOCK:CELLS,...", help="coarser resolutions, "
        "the coarsest first: 4096:8,512:16; their errors: python -m benchmarks levels")  # fmt: skip
    add("--seconds", type=float, default=0.3, help="time for each row")
    add("--longest", type=float, default=3.0, help="seconds that one call may take: a form stops "
        "where it would take longer, or not fit in memory")  # fmt: skip
    return parser


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("growth", args, argv)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    sizes = {"dtype": dtype, "block_size": args.block_size, "blocks_per_row": args.blocks_per_row,
             "levels": args.levels}  # fmt: skip
    rows = result["rows"] = []
    result["base"] = args.base
    report.print_environment(result)
    say(f"{args.heads} heads of {args.head_dim}, {dtype}, {args.blocks_per_row} blocks a row")
    say(HEAD)
    timer, N = make_timer(device, args.seconds), args.min
    while N <= args.max:
        case = Case(f"N{N}", 1, args.heads, N, args.head_dim, forms=FORMS, **sizes)
        here = measure(args, case, device, timer, rows)
        rows += here
        compare(rows, args.base)
        report.write_json(args.json, result)
        report.free(device)
        if all(row["status"] != "ok" for row in here):
            break
        N *= 2
    print_relative(rows, args.base)
    return result


def measure(args, case, device, timer, before):
    """Rows of one N, checked and timed one form after the other; ``before``: those of smaller N. A
    form that has stopped there has no row."""
    backends = {b.form.name: b for b in list_backends(case, device.type, ["mra"])}
    plan = dict.fromkeys(ROW) | {"form": PLAN, "pass": "forward", "status": "ok"}
    rows, live, free = [], {}, free_bytes(device)
    for row in (plan, *(new_row(b, p, device) for b in backends.values() for p in args.passes)):
        done = [r for r in before if (r["form"], r["pass"]) == (row["form"], row["pass"])]
        if done and done[-1]["status"] != "ok":
            continue
        row |= dict.fromkeys(ROW) | row | {"N": case.N}
        rows.append(row)
        reason = stops(args.longest, free, case, row["pass"], done)
        if reason:
            refuse([row], "stopped", reason, _print)
        else:
            live.setdefault(row["form"], []).append(row)

    def show(row):
        complete(row, case, plan)
        _print(row)

    try:
        context = Context(case, device, args.seed) if live else None
    except Exception as error:
        refuse(sum(live.values(), []), "failed", plain(error), _print)
        live = {}
    for name, here in live.items():
        if name == PLAN:
            time_plan(context, timer, plan)
            show(plan)
            continue
        backend = backends[name]
        ready = prepare(backend, context, here, here[-1]["pass"], show)
        if ready:
            time_rows(timer, {backend: ready}, here, case, show=show)
    return [{key: row[key] for key in ROW} for row in rows]


def stops(longest, free, case, which, done):
    """Why a call of this size is not tried, by the rows ``done`` of smaller ones; None: it is. Time
    grows as at the step before, twofold to fourfold; memory twofold. ``free``: bytes, or None."""
    if not done:
        return None
    ms = [row["ms"]["median"] for row in done[-2:]]
    seconds = 1e-3 * ms[-1] * (min(4, max(2, ms[-1] / ms[0])) if len(ms) > 1 else 4)
    if seconds > longest:
        return f"one call would take some {seconds:.1f} s"
    inputs = formulas.output_bytes(case, "backward")  # query, key, value, grad_out
    need = inputs + formulas.output_bytes(case, which) + 2 * (done[-1]["peak_bytes"] or 0)
    if free is not None and need > free:
        return f"would need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None


def time_plan(context, timer, row):
    """Time and memory of the operator plan alone, into ``row``."""

    def run():
        plan = context.plan(FORMS[0])
        return sum(t.nbytes for t in (plan.row_start, plan.row_count, plan.row_index))

    try:
        row["ms"] = dataclasses.asdict(timer.measure(run))
        row["peak_bytes"] = max(0, timer.peak(run) - run())
    except Exception as error:
        row |= {"status": "failed", "reason": plain(error)}


def complete(row, case, plan):
    """Adds the figures of a token, and the share of the time that the plan alone takes."""
    if row["ms"]:
        ms, tokens = row["ms"]["median"], case.B * case.N
        row["ns_per_token"] = 1e6 * ms / tokens
        row["plan_share"] = plan["ms"]["median"] / ms if plan["ms"] else None
    if row["peak_bytes"] is not None:
        row["bytes_per_token"] = row["peak_bytes"] / (case.B * case.N)


def compare(rows, base):
    """Sets ``relative``: time of a token over that at N = ``base``, of the same form and pass."""
    at = {(r["form"], r["pass"]): r["ns_per_token"] for r in rows if r["N"] == base}
    for row in rows:
        unit = at.get((row["form"], row["pass"]))
        row["relative"] = row["ns_per_token"] / unit if unit and row["ns_per_token"] else None


def _print(row):
    start = f"{row['N']:>9} {row['form']:<13} {report.SHORT[row['pass']]:<4}"
    if row["status"] != "ok":
        say(f"{start} {row['status']}: {row['reason']}")
        return
    say(
        f"{start} {row['ms']['median']:10.3f} {row['ns_per_token']:9.1f} "
        f"{report.number(row['plan_share'], '.0%'):>6} "
        f"{report.number(row['bytes_per_token'], '.1f'):>12} "
        f"{report.number(row['error'], '.1e'):>8}"
    )


def print_relative(rows, base):
    """One line for each form and pass, one column for each N."""
    lengths = list(dict.fromkeys(row["N"] for row in rows))
    say(f"time of a token, times that at N {base}")
    say(f"{'form':<13} {'pass':<4}" + "".join(f"{N:>9}" for N in lengths))
    found = {(r["form"], r["pass"], r["N"]): r["relative"] for r in rows}
    for form, which in dict.fromkeys((row["form"], row["pass"]) for row in rows):
        cells = [report.number(found.get((form, which, N)), ".2f") for N in lengths]
        say(f"{form:<13} {report.SHORT[which]:<4}" + "".join(f"{cell:>9}" for cell in cells))
