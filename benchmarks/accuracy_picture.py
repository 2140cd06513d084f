"""The picture of ``python -m benchmarks accuracy``: for each input, error against time, and the
error of every head against the entropy of its attention. Needs matplotlib."""

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.cases import ratio, sides

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLORS = {
    "none": "#7f7f7f",
    "block, global": "#E69F00",
    "block + order 1": "#009E73",
    "row + order 1": "#0072B2",
    "row + order 1, centred": "#8C510A",
    "row + order 1, centred, by head": "#000080",
    "row + order 1, sampled": "#D55E00",
    "SLA, untrained": "#999933",
    "PISA": "#882255",
    "local window": "#CC79A7",
    "local + first tokens": "#56B4E9",
    "Nyströmformer": "#000000",
    "Linformer, means": "#F0E442",
}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
HEADS_AT = 1 / 8  # or the density nearest to it
PEERS_DASHED = {"linestyle": "--", "marker": "^"}


def draw(path, result):
    """Writes the picture of a report (a dict as in the JSON file) to ``path``."""
    entries = [entry for entry in result["inputs"] if entry["status"] == "ok"]
    if not entries:
        return
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.3 * len(entries)), layout="constrained")
        for entry, (left, right) in zip(
            entries, figure.subplots(len(entries), 2, squeeze=False), strict=True
        ):
            size = entry["rows"][0]["block_size"]
            rows = [r for r in entry["rows"] if r["block_size"] == size and r["status"] == "ok"]
            _times(left, entry, rows, result["device"])
            _heads(right, entry, rows)
        figure.savefig(path, dpi=110)


def _times(axes, entry, rows, device):
    for name, color in COLORS.items():
        shown = [row for row in rows if row["method"] == name and row["ms"] and row["density"] < 1]
        if shown:
            style = PEERS_DASHED if shown[0]["kind"].endswith("peer") else {"marker": "o"}
            points = [row["ms"] for row in shown], [row["error"] for row in shown]
            axes.plot(*points, color=color, label=name, markersize=4, **style)
    if entry["exact"]["ms"]:
        axes.axvline(entry["exact"]["ms"], color="#444444", linewidth=1, label="exact attention")
    densities = sorted({row["density"] for row in rows if row["density"] < 1})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds, forward, the batch")
    axes.set_ylabel("relative error")
    blocks = sides(rows[0]["block_size"]) if rows else ""
    axes.set_title(f"{entry['inputs']}: densities {', '.join(map(ratio, densities))}, blocks of "
                   f"{blocks}; {device}", loc="left", fontsize=9)  # fmt: skip
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _heads(axes, entry, rows):
    with_heads = [row for row in rows if "heads" in row]
    nearest = min((row["density"] for row in with_heads), default=HEADS_AT,
                  key=lambda density: abs(density - HEADS_AT))  # fmt: skip
    for row in with_heads:
        if row["density"] == nearest:
            axes.scatter(entry["entropy"], row["heads"], s=14, alpha=0.8,
                         color=COLORS[row["method"]], label=row["method"])  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("entropy of the head's attention, nats")
    axes.set_ylabel("relative error of the head")
    axes.set_title(
        f"{entry['inputs']}: every head, density {ratio(nearest)}", loc="left", fontsize=9
    )
    axes.grid(alpha=0.25)
    if with_heads:
        axes.legend(frameon=False, fontsize=8)
