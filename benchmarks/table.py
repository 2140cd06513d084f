"""``python -m benchmarks table FILE.json ...``: Markdown of result files, for the README.

``--write README.md`` puts each file's table between ``<!-- results:NAME -->`` and
``<!-- /results:NAME -->``, NAME being the file's name without ``.json``; a file that is not there
yet is skipped. Tables are generated from
the files under benchmarks/results, never typed; a test compares them.
"""

import argparse
import functools
import json
import re
from pathlib import Path

from benchmarks.cases import PASSES, ratio, sides
from benchmarks.frontier import sentence
from benchmarks.report import digits, time_unit

DASH = "–"


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--write", type=Path, metavar="README.md", help="put the tables there")
    args = parser.parse_args(argv[1:])
    for path in args.files:
        if args.write and not path.exists():
            print(f"{path.name}: no such file, its markers stay as they are")
            continue
        text = markdown(json.loads(path.read_text(encoding="utf-8")))
        if args.write:
            readme = args.write.read_text(encoding="utf-8")
            args.write.write_text(replaced(readme, path.stem, text), encoding="utf-8")
        else:
            print(text, end="")


def replaced(readme, name, text):
    """The readme with ``text`` between the markers of ``name``."""
    pattern = re.compile(
        rf"(<!-- results:{re.escape(name)} -->\n).*?(<!-- /results:{re.escape(name)} -->)", re.S
    )
    if not pattern.search(readme):
        raise SystemExit(f"no markers <!-- results:{name} --> and <!-- /results:{name} --> there")
    return pattern.sub(lambda match: match[1] + text + match[2], readme)


def markdown(report):
    """Markdown of one report (a dict as in the JSON file), ending in a newline."""
    kinds = {"speed": _speed, "memory": _memory, "growth": _growth, "layout": _layout}
    kinds |= {"host": _host, "accuracy": _accuracy, "embeddings": _embeddings, "levels": _levels,
              "budgets": _budgets}  # fmt: skip
    if report.get("kind") not in kinds:
        raise SystemExit(f"kind: got {report.get('kind')!r}, expected one of {', '.join(kinds)}")
    return f"{source(report)}\n\n{kinds[report['kind']](report)}"


def source(report):
    """Where the numbers come from, in one line."""
    parts = [report["device"]]
    if report["device_type"] == "cuda":
        parts += [f"driver {report['driver']}", f"CUDA {report['cuda']}"]
    else:
        parts.append(f"{report['threads']} threads")
    parts += [f"torch {report['torch']}", report["date"]]
    if report.get("commit"):
        parts.append(f"commit {report['commit']}")
    return f"{', '.join(parts)}: `{report['command']}`"


def _speed(report):
    """One line for each form of each case; "a / b" is forward / forward + backward."""
    cuda = report["device_type"] == "cuda"
    rows = [case for case in report["cases"] if case["rows"]]
    paper = any(row["faster_than_paper"] for case in rows for row in case["rows"])
    heads = ["case", "exact attention"] + ["FlexAttention, same plan given"] * cuda
    heads += ["equal pairs", "MRA form", "MRA", "× exact"] + ["× paper"] * paper
    heads += ["MRA memory, MiB", "goal"]
    lines = [heads, ["---"] * len(heads)]
    for case in rows:
        first = True
        for form in dict.fromkeys(row["form"] for row in case["rows"] if row["kind"] == "mra"):
            ours = _passes(case, lambda row, form=form: row["form"] == form)
            cells = ["", ""]
            if first:
                cells = [f"{case['name']}: {case['description']}", _best_exact(case)]
            if cuda:
                cells.append(_ms(_passes(case, lambda row: row["kind"] == "flex")) if first else "")
            equal = _passes(case, lambda row: row["kind"] == "equal pairs")
            cells.append(_ms(equal) if first else "")
            cells += [form, _ms(ours), _pair(ours, "faster_than_exact", "{:.2f}")]
            if paper:
                cells.append(_pair(ours, "faster_than_paper", "{:.1f}"))
            cells += [_pair(ours, "peak_bytes", "{:.1f}", 2**-20), _goal(ours)]
            lines.append(cells)
            first = False
    notes = (
        "Milliseconds, median, forward / forward + backward; MRA's include selection and coarse "
        "part. Memory is the peak beyond inputs and outputs. Exact attention is the fastest of "
        "torch's kernels, named behind."
    )
    if cuda:
        notes += (
            " FlexAttention gets MRA's list of blocks for free and drops the other blocks; equal "
            "pairs is dense attention on as many keys as the plan gives each query."
        )
    return _table(lines) + "\n" + notes + "\n"


def _memory(report):
    lines = [["N", "pass", "MiB beyond inputs and outputs", "bytes a token", "exponent"]]
    lines.append(["---"] * 5)
    for row in report["rows"]:
        if row["failed"]:
            lines.append([str(row["N"]), row["pass"], row["failed"], DASH, DASH])
            continue
        peak, grown = row["peak_bytes"], row["exponent"]
        grown = DASH if grown is None else f"{grown:.2f}"
        cells = [f"{peak / 2**20:.1f}", f"{peak / row['N']:.0f}", grown]
        lines.append([str(row["N"]), row["pass"], *cells])
    return _table(lines)


def _host(report):
    """One line for each N and backend; "a / b" is forward / forward + backward."""
    lines = [["N", "call", "µs of the host"], ["---"] * 3]
    for row in report["rows"]:
        times = " / ".join(f"{row[which]:.0f}" for which in PASSES)
        lines.append([str(row["N"]), row["backend"], times])
    return _table(lines)


def _growth(report):
    """One line for each N and form; "a / b" is forward / forward + backward."""
    base = report["base"]
    lines = [["N", "form", "ms", "ns a token", f"× that at {base}", "plan alone", "bytes a token"]]
    lines.append(["---"] * 7)
    for N, form in dict.fromkeys((row["N"], row["form"]) for row in report["rows"]):
        here = [row for row in report["rows"] if (row["N"], row["form"]) == (N, form)]
        rows = _passes({"rows": here}, lambda row: True)
        if not any(rows):
            continue
        cells = [_pair(rows, "ns_per_token", "{:.1f}"), _pair(rows, "relative", "{:.2f}")]
        cells.append("" if form == "plan" else _pair(rows, "plan_share", "{:.0%}"))
        lines.append([str(N), form, _ms(rows), *cells, _pair(rows, "bytes_per_token", "{:.0f}")])
    notes = (
        "Median, forward / forward + backward; memory is the peak beyond inputs and outputs. Plan "
        "alone is the share of the time that the operator plan takes."
    )
    for row in report["rows"]:
        if row["status"] != "ok":
            notes += f" {row['form']}, {row['pass']}, from N {row['N']}: {row['reason']}."
    return _table(lines) + "\n" + notes + "\n"


def _levels(report):
    """A table for each input: one line for each budget; "a / b" is forward / forward + backward."""
    parts = []
    for name in dict.fromkeys(row["inputs"] for row in report["rows"]):
        lines = [["blocks a row", "levels", "error", "ms", "error of two levels in that time"]]
        lines.append(["---"] * 5)
        for row in report["rows"]:
            if row["inputs"] != name or row["status"] != "ok":
                continue
            both = [
                " / ".join(form(row[key][p]) if row[key].get(p) else DASH for p in PASSES)
                for key, form in (("ms", digits), ("two_levels", "{:.4f}".format))
            ]
            cells = [", ".join(f"{cells} of {block}" for block, cells in row["levels"]) or DASH]
            cells += [f"{row['error']:.4f}", both[0], both[1] if row["levels"] else ""]
            lines.append([str(row["blocks_per_row"]), *cells])
        parts.append(f"{name}:\n\n{_table(lines)}")
    notes = (
        "Error: ‖o − exact‖ / ‖exact‖ of sampled rows, mean over sampled heads. Median "
        "milliseconds, forward / forward + backward. Levels: so many cells a row of blocks of so "
        "many tokens; error of two levels: between the rows without levels, error and time as "
        "logarithms."
    )
    return "\n".join([*parts, notes + "\n"])


def _layout(report):
    """One line for each input and density; "a → b" is as it comes → in patches or along a curve."""
    ran = [row for row in report["rows"] if row["status"] == "ok"]
    forms = list(dict.fromkeys(form for row in ran for form in row["errors"]))
    heads = ["input", "N", "density", "exact pairs", "overlap", *forms]
    lines = [heads, ["---"] * len(heads)]
    for name, density in dict.fromkeys((row["input"], row["density"]) for row in ran):
        rows = [row for row in ran if (row["input"], row["density"]) == (name, density)]

        def arrow(form, value, rows=rows):
            return " → ".join(form.format(value(row)) for row in rows)

        cells = [arrow("{:.3f}", lambda row: row["exact_pairs"])]
        cells.append(arrow("{:.2f}", lambda row: row["overlap"]))
        cells += [arrow("{:.3f}", lambda row, form=form: row["errors"][form]) for form in forms]
        lines.append([name, str(rows[0]["N"]), f"1/{1 / density:g}", *cells])
    notes = (
        "‖o − exact‖ / ‖exact‖, mean over heads: tokens as they come → in patches (pictures, "
        "videos) or along a Hilbert curve (points). Exact pairs is the share of pairs of tokens."
    )
    for row in report["rows"]:
        if row["status"] != "ok":
            notes += f" {row['input']}: {row['reason']}."
    return _table(lines) + "\n" + notes + "\n"


def _accuracy(report):
    """For each input what OURS are at equal time, then a table for each block size: one line for
    each method, a column a density."""
    parts, unit = [], time_unit(report["device_type"])
    for entry in report["inputs"]:
        if entry["status"] != "ok":
            parts.append(f"{entry['inputs']}: {entry['reason']}\n")
            continue
        B, H, N, D = entry["shape"]
        about = f"{entry['inputs']}, B{B} H{H} N{N} D{D} {entry['dtype']}"
        exact, batch = entry["exact"]["ms"], entry.get("batch", B)
        exact = f"; exact attention {unit(exact)}" if exact else ""
        exact += f" for {batch} entries" if exact and batch != B else ""
        if "comparison" in entry:
            parts += [f"{about}{exact}\n", _comparison(entry["comparison"], unit)]
        for size in dict.fromkeys(tuple(row["block_size"]) for row in entry["rows"]):
            here = [row for row in entry["rows"] if tuple(row["block_size"]) == size]
            parts.append(f"{about}, blocks of {sides(size)}{exact}\n")
            parts.append(_by_density(here, "method", functools.partial(_error, unit=unit)))
    name = "microseconds" if report["device_type"] == "cuda" else "milliseconds"
    notes = "Error: ‖o − exact‖ / ‖exact‖, mean over heads, layers and windows."
    if any(row.get("ms") for entry in report["inputs"] for row in entry["rows"]):
        notes += (
            f" Behind it the {name} of one call on all of them; forms without are dense prototypes."
        )
    return "\n".join([*parts, notes + "\n"])


def _comparison(comparison, unit):
    heads = ["form", "error / MRA-2's in the same time", "below half of exact attention's time"]
    lines = [heads, ["---"] * 3]
    for form in comparison["forms"]:
        lines.append([form["form"], *sentence(form, comparison["exact_ms"], unit)])
    return _table(lines)


def _error(row, unit):
    if row["status"] != "ok":
        return row["reason"]
    return f"{row['error']:.3f}" + (f" ({unit(row['ms']).split()[0]})" if row["ms"] else "")


def _embeddings(report):
    cell = lambda row: f"{row['cosine']:.4f}, {row['lowest']:.4f}"  # noqa: E731
    goals = {row["density"]: row["goal"] for row in report["rows"] if row["goal"]}
    goals = ", ".join(f"{goal} at density {ratio(density)}" for density, goal in goals.items())
    return (
        _by_density(report["rows"], "form", cell)
        + f"\nCosine with the exact encoder's embedding: mean, lowest of {report['documents']} "
        f"documents of {report['tokens']} tokens. Goal for the mean: {goals}.\n"
    )


def _budgets(report):
    """A line for each input and block size: errors "the same for all → by head"."""
    lines = [
        dict(row, what=f"{row['inputs']}, blocks of {sides(row['block_size'])}")
        for row in report["rows"]
    ]

    def cell(row):
        counts = f"{min(row['counts'])} to {max(row['counts'])}"
        return f"{row['same']:.3f} → {row['by_head']:.3f} ({row['blocks_per_row']}: {counts})"

    return _by_density(lines, "what", cell) + (
        "\nError: ‖o − exact‖ / ‖exact‖, mean over heads, layers and the windows that the numbers "
        "were not made from: the same number of exact blocks a row for all heads → by head, as "
        "many on average. Behind it that number, and the least and the most that a head gets.\n"
    )


def _by_density(rows, key, cell):
    densities = list(dict.fromkeys(row["density"] for row in rows))
    lines = [[key, *(f"density {ratio(density)}" for density in densities)]]
    lines.append(["---"] * len(lines[0]))
    for name in dict.fromkeys(row[key] for row in rows):
        found = {row["density"]: cell(row) for row in rows if row[key] == name}
        lines.append([name, *(found.get(density, DASH) for density in densities)])
    return _table(lines)


def _table(lines):
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _passes(case, chosen):
    """[row of forward or None, row of backward or None] of one backend; rows that ran."""
    found = {row["pass"]: row for row in case["rows"] if chosen(row) and row["status"] == "ok"}
    return [found.get(which) for which in PASSES]


def _ms(rows):
    cells = [digits(row["ms"]["median"]) if row else DASH for row in rows]
    return " / ".join(cells) if any(rows) else DASH


def _pair(rows, key, form, factor=1):
    cells = [
        form.format(row[key] * factor) if row and row[key] is not None else DASH for row in rows
    ]
    return " / ".join(cells) if set(cells) != {DASH} else DASH


def _best_exact(case):
    """The fastest kernel of each pass, with its name; once where it is the same."""
    best = []
    for which in PASSES:
        rows = [
            row
            for row in case["rows"]
            if row["kind"] == "exact" and row["pass"] == which and row["status"] == "ok"
        ]
        best.append(min(rows, key=lambda row: row["ms"]["median"], default=None))
    names = list(dict.fromkeys(row["backend"].removeprefix("exact ") for row in best if row))
    return f"{_ms(best)} ({', '.join(names)})" if names else DASH


def _goal(rows):
    goals = [row["goal"] if row else None for row in rows]
    if not any(goals):
        return ""
    parts = []
    for key, form in (("ms", "{:g}"), ("exact", "{:.2g}× exact"), ("paper", "{:g}× paper")):
        cells = [form.format(g[key]) if g and g[key] is not None else DASH for g in goals]
        plain = key == "exact" and all(g is None or g[key] == 1 for g in goals)
        if set(cells) == {DASH} or plain:
            continue
        parts.append(" / ".join(dict.fromkeys(cells)))
    return "; ".join(parts)
