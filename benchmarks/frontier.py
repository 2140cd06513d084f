"""Errors of methods at equal time, from the rows of ``python -m benchmarks accuracy``.

A method's curve goes through its rows, (milliseconds, error), of all densities and block sizes,
less those that a faster one beats; between two rows straight in the logarithms of both. Slower than
the last row it stays there, faster than the first it has no error: it does not exist in that time.
"""

import math

from benchmarks.report import say

__all__ = ["OURS", "RIVALS", "compare", "curve", "error_at", "print_comparison", "sentence"]

MRA2 = "block, global"
CENTRED = "row + order 1, centred"
OURS = ("row + order 1", CENTRED, f"{CENTRED}, by head", "row + order 1, sampled")
RIVALS = (MRA2, "none, global", "none")  # of the operator's forms; peers are all rivals
GOAL = 0.6  # of MRA-2's error


def curve(points):
    """Of (ms, error) those that no faster one beats, by time."""
    kept = []
    for ms, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((ms, error))
    return kept


def error_at(points, ms):
    """Error of a curve within ``ms``; None where it has no row as fast."""
    if not points or ms < points[0][0]:
        return None
    for (t0, e0), (t1, e1) in zip(points, points[1:], strict=False):
        if ms < t1:
            share = math.log(ms / t0) / math.log(t1 / t0)
            return e0 ** (1 - share) * max(e1, 1e-12) ** share
    return points[-1][1]


def curves(rows):
    """{method: curve} of the rows that were timed."""
    found = {}
    for row in rows:
        if row["status"] == "ok" and row["ms"]:
            found.setdefault(row["method"], []).append((row["ms"], row["error"]))
    return {name: curve(points) for name, points in found.items()}


def compare(rows, exact_ms):
    """Each of OURS against the others: ``ratios`` to MRA-2's error at its own times, where MRA-2
    has rows on both sides; and at every row's time below half of exact attention's the rivals that
    are ``ahead`` of it."""
    found, kinds = curves(rows), {row["method"]: row["kind"] for row in rows}
    rivals = {n: c for n, c in found.items() if n in RIVALS or kinds[n].endswith("peer")}
    theirs, limit = found.get(MRA2, []), exact_ms / 2
    result = {"exact_ms": exact_ms, "goal": GOAL, "forms": []}
    for name in OURS:
        if name not in found:
            continue
        ours = found[name]
        shared = [(ms, error) for ms, error in ours if theirs and theirs[0][0] <= ms]
        shared = [(ms, error) for ms, error in shared if ms <= theirs[-1][0]]
        ratios = [{"ms": ms, "ratio": error / error_at(theirs, ms)} for ms, error in shared]
        budgets = sorted({ms for c in (ours, *rivals.values()) for ms, _ in c if ms <= limit})
        ahead = []
        for ms in budgets:
            mine = error_at(ours, ms)
            for rival, points in rivals.items():
                other = error_at(points, ms)
                if other is not None and (mine is None or other < mine):
                    ahead.append({"ms": ms, "method": rival, "error": other, "ours": mine})
        result["forms"].append({
            "form": name, "fastest_ms": ours[0][0], "ratios": ratios, "budgets": len(budgets),
            "first_budget_ms": min(budgets, default=None), "ahead": ahead,
        })  # fmt: skip
    return result


def sentence(form, exact_ms, unit):
    """(ratios to MRA-2, who is ahead below half of exact attention's time), in words."""
    ratios = ", ".join(f"{r['ratio']:.2f} at {unit(r['ms'])}" for r in form["ratios"])
    half, first = exact_ms / 2, form["fastest_ms"]
    if first > half:
        return ratios or "no time in common", f"first row at {unit(first)}, later than {unit(half)}"
    last = {row["method"]: row for row in form["ahead"] if row["ours"] is not None}
    behind = [
        f"{rival} until {unit(row['ms'])} ({row['error']:.3f} against {row['ours']:.3f})"
        for rival, row in last.items()
    ]
    others = ""
    if form["first_budget_ms"] < first:
        others = f" (others from {unit(form['first_budget_ms'])})"
    where = f"first row at {unit(first)}{others}; from there to {unit(half)} "
    where += f"behind {', '.join(behind)}" if behind else "ahead of all"
    return ratios or "no time in common", where


def print_comparison(result, unit):
    say(f"error at equal time over that of MRA-2 ({MRA2}), goal {result['goal']}; and against all "
        "others")  # fmt: skip
    for form in result["forms"]:
        ratios, ahead = sentence(form, result["exact_ms"], unit)
        say(f"  {form['form']:<24}{ratios}\n  {'':<24}{ahead}")
