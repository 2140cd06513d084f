"""The demo's one picture: error against density, time against N, and one head's maps."""

import torch
from matplotlib import rc_context
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLORS = {
    "none": "#7f7f7f",
    "block (MRA-2)": "#E69F00",
    "block + order 1": "#009E73",
    "row + order 1": "#0072B2",
}
MARKERS = dict(zip(COLORS, "sv^o", strict=True))


STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(path, rows, timing, head, device):
    """Writes the picture to ``path``. Arguments as ``examples.demo`` makes them."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 8.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.02])
        left, right = top.subplots(1, 2)
        _errors(left, rows)
        _times(right, timing, device)
        _maps(bottom, head)
        figure.savefig(path, dpi=110)


def _errors(axes, rows):
    for form, color in COLORS.items():
        # At density 1 only rounding is left: nothing that a logarithmic axis could show.
        shown = [r for r in rows if r["form"] == form and r["density"] < 1]
        if not shown:
            continue
        axes.plot(
            [r["density"] for r in shown], [r["error"] for r in shown],
            color=color, marker=MARKERS[form], label=form,
        )  # fmt: skip
    densities = sorted({r["density"] for r in rows if r["density"] < 1})
    axes.set_xscale("log", base=2)
    axes.set_xticks(densities, [f"1/{round(1 / d)}" for d in densities])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("density: share of the pairs of blocks that are exact")
    axes.set_ylabel("relative error of the attention outputs")
    axes.set_title("MiniLM on real text, 512 tokens, blocks of 32", loc="left", fontsize=11)
    worst = max((r["error"] for r in rows if r["density"] == 1), default=None)
    if worst is not None:
        axes.text(
            0.02, 0.03, f"at density 1: at most {worst:.0e}, in every form",
            transform=axes.transAxes, color="#444444", fontsize=9,
        )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(title="the other pairs", frameon=False)


def _times(axes, timing, device):
    lines = {
        "exact": ("black", "-", "exact, forward"),
        "exact f+b": ("black", "--", "exact, forward + backward"),
        "mra": (COLORS["row + order 1"], "-", "MRA, forward"),
        "mra f+b": (COLORS["row + order 1"], "--", "MRA, forward + backward"),
    }
    for key, (color, style, label) in lines.items():
        shown = [(r["N"], 1e3 * r[key]) for r in timing["rows"] if r[key] is not None]
        axes.plot(
            *zip(*shown, strict=True),
            color=color,
            linestyle=style,
            marker="o",
            markersize=4,
            label=label,
        )
    sizes = [r["N"] for r in timing["rows"]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n // 1024}K" if n >= 1024 else str(n) for n in sizes])
    axes.set_xlabel(f"N ({timing['H']} heads of {timing['D']}, {timing['dtype']}, random inputs)")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"{device}; density 1/16, blocks of 64", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _maps(figure, head):
    one, two, three = figure.subplots(1, 3, sharex=True, sharey=True)
    N = head["true"].shape[0]
    norm = LogNorm(vmin=1e-5, vmax=0.3, clip=True)  # a weight that is negative or 0 shows as vmin
    density = f"1/{round(1 / head['density'])}"
    image = one.imshow(head["true"], norm=norm, cmap="magma", interpolation="nearest")
    three.imshow(head["seen"].clamp(min=1e-5), norm=norm, cmap="magma", interpolation="nearest")
    plan = ListedColormap(["#E8EEF4", COLORS["row + order 1"]])
    two.imshow(head["plan"].to(torch.uint8), cmap=plan, vmin=0, vmax=1, interpolation="nearest")
    one.set_title("true attention map", fontsize=11)
    two.set_title(f"its plan, density {density} (blue: exact)", fontsize=11)
    three.set_title(f"the map that MRA applies, error {head['error']:.2f}", fontsize=11)
    for axes in (one, two, three):
        axes.set_xlabel("key")
        axes.set_xticks([0, N // 2, N])
        axes.set_yticks([0, N // 2, N])
        axes.spines[["top", "right"]].set_visible(True)
    one.set_ylabel("query")
    figure.colorbar(
        image, ax=[one, two, three], label="weight (lower ones as black)", shrink=0.85, pad=0.01
    )
    figure.suptitle(
        f"One head, the one of median error: layer {head['layer'] + 1}, head {head['head'] + 1}; "
        "row + order 1",
        fontsize=11,
    )
