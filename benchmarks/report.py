"""What the terminal and the JSON file get."""

import json
import os
from pathlib import Path

import torch

from benchmarks.cases import PASSES

SHORT = {"forward": "fwd", "backward": "f+b"}


def say(text):
    print(text, flush=True)


def print_environment(env):
    parts = [env["device"]]
    if env["device_type"] == "cuda":
        parts.append(f"driver {env['driver']}, CUDA {env['cuda']}, cuDNN {env['cudnn']}")
    else:
        parts.append(f"{env['threads']} threads")
    commit = f", commit {env['commit']}" if env["commit"] else ""
    say(f"{', '.join(parts)}, torch {env['torch']}{commit}")


def time_unit(device_type):
    """How times in milliseconds are written: microseconds on CUDA."""
    if device_type == "cuda":
        return lambda ms: f"{1e3 * ms:.0f} µs"
    return lambda ms: f"{digits(ms)} ms"


def digits(x):
    """Three significant digits or more, never an exponent."""
    return f"{x:.{3 if x < 1 else 2 if x < 10 else 1 if x < 100 else 0}f}"


def number(x, spec):
    """``x`` by a format, a dash where there is none."""
    return "-" if x is None else format(x, spec)


HEAD = (
    f"  {'backend':<30} {'pass':<4} {'ms':>9} {'p10':>9} {'p90':>9} {'graph':>9} {'error':>8} "
    f"{'approx.':>8} {'overlap':>8} {'MiB':>8} {'TFLOP/s':>8}"
)


def print_row(row):
    start = f"  {row['backend']:<30} {SHORT[row['pass']]:<4}"
    if row["status"] != "ok":
        say(f"{start} {row['status']}: {row['reason']}")
        return
    ms = row["ms"]
    mib = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
    say(
        f"{start} {ms['median']:9.3f} {ms['p10']:9.3f} {ms['p90']:9.3f} "
        f"{number(row['graph_ms'], '.3f'):>9} {number(row['error'], '.1e'):>8} "
        f"{number(row['approximation'], '.3f'):>8} {number(row['overlap'], '.3f'):>8} "
        f"{number(mib, '.1f'):>8} {row['tflops']:8.1f}"
    )


def print_summary(case, rows):
    """Ours against exact attention, the paper and the goal; one line for each form and pass."""
    ours = [row for row in rows if row["kind"] == "mra" and row["status"] == "ok"]
    if not ours:
        return
    say(f"  {'':<30} {'pass':<4} {'ms':>9} {'exact':>9} {'x faster':>9} {'x paper':>8}  goal")
    for row in ours:
        exact, paper = row["faster_than_exact"], row["faster_than_paper"]
        best = f"{row['best_exact_ms']:9.3f} {exact:8.2f}x" if exact else f"{'-':>9} {'-':>9}"
        paper = f"{paper:7.1f}x" if paper else f"{'-':>8}"
        say(
            f"  {row['backend']:<30} {SHORT[row['pass']]:<4} {row['ms']['median']:9.3f} {best} "
            f"{paper}  {goal_text(row)}"
        )


def goal_text(row):
    """The goals of a row, each with yes or no; empty for a form without one."""
    parts = []
    goal = row.get("goal") or {}
    if goal.get("ms"):
        parts.append(f"{goal['ms']:g} ms: {_met(row['ms']['median'] <= goal['ms'])}")
    if goal.get("exact") and row["faster_than_exact"]:
        parts.append(
            f"{goal['exact']:.3g}x exact: {_met(row['faster_than_exact'] >= goal['exact'])}"
        )
    if goal.get("paper") and row["faster_than_paper"]:
        met = _met(row["faster_than_paper"] >= goal["paper"])
        parts.append(f"{goal['paper']:g}x paper: {met}")
    return ", ".join(parts)


def _met(good):
    return "yes" if good else "no"


def derive(case, rows):
    """Adds what compares rows: against the fastest exact attention, the paper, the goal."""
    for which in PASSES:
        here = [row for row in rows if row["pass"] == which and row["status"] == "ok"]
        exact = min((r["ms"]["median"] for r in here if r["kind"] == "exact"), default=None)
        at = PASSES.index(which)
        goal = case.goal
        paper = goal.paper_ms[at] if goal.paper_ms else None
        for row in here:
            ms = row["ms"]["median"]
            row["best_exact_ms"] = exact
            row["faster_than_exact"] = exact / ms if exact else None
            row["faster_than_paper"] = paper / ms if paper else None
            if row["kind"] == "mra" and row["form"] == goal.form.name:
                row["goal"] = {
                    "ms": goal.ms[at] if goal.ms else None,
                    "exact": goal.exact[at] if goal.exact else None,
                    "paper": goal.paper,
                }


def write_json(path, report):
    """Whole or not at all: a run that is cut off leaves the last complete file."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def free(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
