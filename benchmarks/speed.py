"""The main command: every backend of every case, checked, timed, and written down case by case."""

import dataclasses
import sys
import time

import torch

from benchmarks import formulas, report, stages
from benchmarks.approximation import approximation
from benchmarks.backends import KINDS, Context, list_backends
from benchmarks.cases import PASSES, Unsupported, pick_cases
from benchmarks.check import check
from benchmarks.environment import clocks, plain
from benchmarks.options import SCHEMA, begin, speed_parser
from benchmarks.report import say
from benchmarks.timing import make_timer

ROW = ("backend", "kind", "form", "pass", "status", "reason", "ms", "graph_ms", "error", "errors",
       "plan_agreement", "difference_from_mra", "approximation", "overlap", "peak_bytes", "flops",
       "bytes", "tflops", "floor_ms", "best_exact_ms", "faster_than_exact", "faster_than_paper",
       "goal")  # fmt: skip


def main(argv):
    """Runs the command line; returns the report."""
    args = speed_parser().parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    device, result = begin("speed", args, argv)
    cases, result["cases"] = pick_cases(args, device.type), []
    report.print_environment(result)
    timer, start = make_timer(device, args.seconds, args.repeat), time.perf_counter()
    for case in cases:
        say(f"\n[{time.perf_counter() - start:.0f} s] {case.name}: {case.describe()}")
        entry = {**describe(case), "rows": [], "stages": []}
        result["cases"].append(entry)
        try:
            context = Context(case, device, args.seed, args.layout, args.minilm_file)
            measure_stages(args, context, timer, entry)
            measure(args, context, timer, entry)
        except Unsupported as error:  # of the inputs
            backends = list_backends(case, device.type, args.backend)
            entry["rows"] = [new_row(b, which, device) for b in backends for which in args.passes]
            refuse(entry["rows"], "not supported", plain(error))
        except Exception as error:  # inputs that do not fit, a device that is lost
            entry["failed"] = plain(error)
            say(f"  failed: {entry['failed']}")
        entry["clocks"] = clocks(device)
        report.write_json(args.json, result)
        context = None
        if "torch._dynamo" in sys.modules:  # FlexAttention compiled for this case
            torch.compiler.reset()
        report.free(device)
    say(f"\n[{time.perf_counter() - start:.0f} s] done")
    return result


def describe(case):
    fields = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(case)
        if field.name not in ("forms", "goal")
    }
    return fields | {"description": case.describe()}


def measure(args, context, timer, entry):
    """Rows of one case, into ``entry``: set up and checked first, then timed pass by pass."""
    case, device = context.case, context.device
    if not args.backend:
        return
    prepared, rows, last = {}, entry["rows"], args.passes[-1]
    say(report.HEAD)
    for backend in list_backends(case, device.type, args.backend):
        here = [new_row(backend, which, device) for which in args.passes]
        rows += here
        ready = prepare(backend, context, here, last)
        if ready is None:
            continue
        if backend.kind == "mra":
            found = _or_none(lambda ready=ready: approximation(context, ready))
            for row in here if found else ():
                row |= {"approximation": found.error, "overlap": found.overlap}
        if device.type == "cuda":  # one after the other, so that memory peaks are each one's own
            time_rows(timer, {backend: ready}, here, case, args.graph)
        else:
            prepared[backend] = ready
    time_rows(timer, prepared, rows, case, args.graph)
    report.derive(case, rows)
    report.print_summary(case, rows)


def new_row(backend, which, device):
    """What is known of a row before it runs; README.md says what each key means."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    work = backend.work(which)
    row = dict.fromkeys(ROW)
    row |= {"backend": backend.name, "kind": backend.kind, "pass": which, "status": "ok"}
    row |= {"form": backend.form.name if backend.form else None}
    return row | {"flops": work.flops, "bytes": work.bytes, "floor_ms": work.floor_ms(name)}


def prepare(backend, context, rows, last, show=report.print_row):
    """Set up and check; None, with the reason in the rows, where that ends. ``show(row)`` for each
    row that failed."""
    try:
        ready = backend.setup(context)
        if ready.form is None or context.case.levels:  # the check knows two resolutions
            ready.run(last)()
            return ready
        found = None
        try:
            found = check(context, ready, last)
        except Unsupported:
            raise
        except Exception as error:
            if last == "forward" or len(rows) == 1:
                raise
            # The backward may be what does not run: the forward is a row of its own.
            found = check(context, ready, "forward")
            rows[-1] |= {"status": "failed", "reason": plain(error)}
        problem = found.problem(strict=backend.kind == "mra")
        for row in rows:
            names = ["out"] if row["pass"] == "forward" else list(found.errors)
            row["errors"] = {name: found.errors[name] for name in names}
            row["error"] = max(row["errors"].values())
            row["plan_agreement"] = found.agreement
            row["difference_from_mra"] = found.difference
            if problem:
                row |= {"status": "failed", "reason": problem}
        failed = [row for row in rows if row["status"] != "ok"]
        for row in failed:
            show(row)
        return ready if len(failed) < len(rows) else None
    except Unsupported as error:
        status, reason = "not supported", plain(error)
    except Exception as error:
        no_kernel = "No available kernel" in str(error)
        status = "not supported" if no_kernel else "failed"
        reason = plain(error)
    refuse(rows, status, reason, show)
    return None


def refuse(rows, status, reason, show=report.print_row):
    for row in rows:
        row |= {"status": status, "reason": reason}
        show(row)


def time_rows(timer, prepared, rows, case, graph=False, show=report.print_row):
    """Times those of ``rows`` that are still ok, all backends of a pass together; ``show(row)`` as
    each is known."""
    by_name = {backend.name: (backend, ready) for backend, ready in prepared.items()}
    for which in PASSES:
        live = {
            row["backend"]: row
            for row in rows
            if row["pass"] == which and row["status"] == "ok" and row["backend"] in by_name
        }
        runs = {name: by_name[name][1].run(which) for name in live}

        def finish(name, result, live=live, runs=runs, which=which):
            row, backend = live[name], by_name[name][0]
            if isinstance(result, Exception):
                row |= {"status": "failed", "reason": plain(result)}
            else:
                row["ms"] = dataclasses.asdict(result)
                row["tflops"] = row["flops"] / result.median / 1e9
                returned = formulas.output_bytes(case, which, backend.keys)
                row["peak_bytes"] = _or_none(lambda: max(0, timer.peak(runs[name]) - returned))
                if graph:
                    row["graph_ms"] = _or_none(lambda: timer.measure_graph(runs[name]).median)
            show(row)

        timer.measure_all(runs, finish)


def _or_none(function):
    try:
        return function()
    except Exception:  # an extra of a row whose time is known
        return None


def measure_stages(args, context, timer, entry):
    """Stage times (and kernels) of every form, into ``entry``."""
    for form in context.case.forms if args.stage or args.kernels else ():
        for which in args.passes:
            line = {"form": form.name, "pass": which, "ms": None, "kernels": None}
            entry["stages"].append(line)
            # Here the backward is the operator's own, without the forward.
            title = f"  {form.name:<24} {which:<8} alone: "
            try:
                runs = stages.stage_runs(context, form, which)
                if args.stage:
                    times = timer.measure_all(runs)
                    wrong = next((t for t in times.values() if isinstance(t, Exception)), None)
                    if wrong:
                        raise wrong
                    medians = {name: t.median for name, t in times.items()}
                    ms = stages.stages_of(medians, which)
                    line["ms"] = {n: ms[n] for n in ms if n in args.stage or n == "whole"}
                    say(title + "  ".join(f"{n} {t:.3f}" for n, t in line["ms"].items()) + " ms")
                if args.kernels and context.device.type == "cuda":
                    line["kernels"] = stages.kernels(runs["whole"])
                    for k in line["kernels"]:
                        cost = f"{k['us']:9.1f} us {k['count']:3d}x"
                        say(f"    {cost} {k['stage']:<16} {k['name'][:90]}")
            except Exception as error:
                line["failed"] = plain(error)
                say(f"{title}failed: {line['failed']}")


def dry_run(args):
    """Lists what would run, with the work that it needs; touches no device."""
    target = next(iter(formulas.CEILINGS)) if args.device == "cuda" else None
    result = {"schema": SCHEMA, "kind": "dry run", "cases": []}
    for case in pick_cases(args, args.device):
        rows = []
        say(f"{case.name}: {case.describe()}")
        say(
            f"  {'backend':<30} {'pass':<4} {'GFLOP':>12} {'MB':>10}" + " {:>10}".format("floor ms")
        )
        for backend in list_backends(case, args.device, args.backend or KINDS):
            for which in args.passes:
                work = backend.work(which)
                floor = work.floor_ms(target)
                rows.append(
                    {"backend": backend.name, "pass": which, "flops": work.flops,
                     "bytes": work.bytes, "floor_ms": floor}
                )  # fmt: skip
                ms = "-" if floor is None else f"{floor:.3f}"
                say(
                    f"  {backend.name:<30} {report.SHORT[which]:<4} {work.flops / 1e9:12.2f} "
                    f"{work.bytes / 1e6:10.2f} {ms:>10}"
                )
        result["cases"].append({**describe(case), "rows": rows})
    report.write_json(args.json, result)
    return result
