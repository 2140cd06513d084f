"""The command growth: its rows, where a form stops, its table."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import growth  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import PASSES, Case  # noqa: E402
from benchmarks.report import SHORT  # noqa: E402
from benchmarks.table import markdown  # noqa: E402

SERIES = [("plan", "forward")] + [
    (form, which) for form in ("none", "block", "row + order 1") for which in PASSES
]
SMALL = ["growth", "--device", "cpu", "--heads", "2", "--head-dim", "16", "--block-size", "16",
         "--blocks-per-row", "4", "--min", "256", "--base", "512", "--seconds", "0.01"]  # fmt: skip


def test_small_run(tmp_path, capsys):
    file = tmp_path / "growth.json"
    main([*SMALL, "--max", "1024", "--json", str(file)])
    text, printed = file.read_text(), capsys.readouterr().out
    report = json.loads(text)
    assert str(tmp_path) not in text
    assert report["kind"] == "growth" and report["base"] == 512
    found = {(row["N"], row["form"], row["pass"]): row for row in report["rows"]}
    assert list(found) == [(N, *series) for N in (256, 512, 1024) for series in SERIES]
    for (N, form, which), row in found.items():
        assert set(row) == set(growth.ROW) and row["status"] == "ok", row
        ns = 1e6 * row["ms"]["median"] / N
        assert row["ns_per_token"] == pytest.approx(ns)
        assert row["relative"] == pytest.approx(ns / found[512, form, which]["ns_per_token"])
        share = found[N, "plan", "forward"]["ms"]["median"] / row["ms"]["median"]
        assert row["plan_share"] == pytest.approx(share)
        assert row["bytes_per_token"] == row["peak_bytes"] / N > 0
        if form != "plan":
            assert 0 < row["error"] < 1e-5 and row["plan_agreement"] > 0.99
        cells = [f"{row['ms']['median']:.3f}", f"{ns:.1f}", f"{row['plan_share']:.0%}",
                 f"{row['bytes_per_token']:.1f}"]  # fmt: skip
        start = [str(N), *form.split(), SHORT[which]]
        (line,) = (x.split() for x in printed.splitlines() if x.split()[: len(start)] == start)
        assert line[len(start) :][:4] == cells
    assert "time of a token, times that at N 512" in printed
    last = found[1024, "row + order 1", "backward"]["relative"]
    assert printed.splitlines()[-1].split()[-2:] == ["1.00", f"{last:.2f}"]
    assert f"| 1024 | plan | {found[1024, 'plan', 'forward']['ms']['median']:.3f} / – |" in (
        markdown(report)
    )


def test_file_is_complete_after_each_size(tmp_path, monkeypatch):
    file, files = tmp_path / "growth.json", []
    free = growth.report.free

    def after(device):
        files.append(json.loads(file.read_text()))
        free(device)

    monkeypatch.setattr(growth.report, "free", after)
    main([*SMALL, "--max", "512", "--pass", "forward", "--json", str(file)])
    assert [[row["N"] for row in report["rows"]] for report in files] == [
        [256] * 4, [256] * 4 + [512] * 4
    ]  # fmt: skip


def test_a_form_stops_once_and_says_why(tmp_path, capsys):
    file = tmp_path / "growth.json"
    main([*SMALL, "--max", "1048576", "--longest", "0", "--json", str(file)])
    report = json.loads(file.read_text())
    stopped = [row for row in report["rows"] if row["N"] == 512]
    assert {row["N"] for row in report["rows"]} == {256, 512}
    assert [(row["form"], row["pass"]) for row in stopped] == SERIES
    for row in stopped:
        assert row["status"] == "stopped" and row["ms"] is None and row["relative"] is None
        assert row["reason"].startswith("one call would take some ")
    assert capsys.readouterr().out.count(" stopped: one call would take some ") == len(SERIES)
    assert "none, backward, from N 512: one call would take some" in markdown(report)


def test_other_passes_go_on(monkeypatch):
    def stops(longest, free, case, which, done):
        return "enough" if done and which == "backward" else None

    monkeypatch.setattr(growth, "stops", stops)
    rows = growth.main([*SMALL, "--max", "1024"])["rows"]
    found = {(row["N"], row["pass"]): row["status"] for row in rows}
    assert found == {
        (256, "forward"): "ok", (256, "backward"): "ok", (512, "forward"): "ok",
        (512, "backward"): "stopped", (1024, "forward"): "ok",
    }  # fmt: skip


def test_inputs_that_fail_are_rows(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(growth, "Context", broken)
    rows = growth.main([*SMALL, "--max", "1024"])["rows"]
    assert [(row["form"], row["pass"]) for row in rows] == SERIES  # and no larger N
    assert {(row["status"], row["reason"]) for row in rows} == {("failed", "out of memory")}


def test_stops_by_hand():
    case = Case("c", 1, 2, 1024, 32, dtype="fp32", blocks_per_row=4)
    inputs, peak = 4 * 2 * 1024 * 32 * 4, 1000

    def stops(*ms, longest=1.0, free=None, which="forward"):
        done = [{"ms": {"median": x}, "peak_bytes": peak} for x in ms]
        return growth.stops(longest, free, case, which, done)

    assert stops() is None
    assert stops(249.0) is None and "1.0 s" in stops(251.0)  # one size: it may grow fourfold
    assert stops(100.0, 300.0, longest=0.91) is None  # as at the last step: threefold
    assert "0.9 s" in stops(100.0, 300.0, longest=0.89)
    assert "0.6 s" in stops(290.0, 300.0, longest=0.59)  # twofold at least
    assert stops(1.0, free=inputs + inputs // 4 + 2 * peak) is None
    assert "0.0 GiB are free" in stops(1.0, free=inputs + inputs // 4 + 2 * peak - 1)
    assert stops(1.0, free=2 * inputs + 2 * peak, which="backward") is None
    assert "would need" in stops(1.0, free=2 * inputs + 2 * peak - 1, which="backward")


def test_table_by_hand():
    def row(N, form, which, ms, **more):
        empty = dict.fromkeys(growth.ROW) | {"N": N, "form": form, "pass": which, "status": "ok"}
        return empty | {"ms": {"median": ms}} | more

    rows = [
        row(64, "plan", "forward", 1.0, ns_per_token=15.6, relative=1.0, plan_share=1.0,
            bytes_per_token=16),
        row(64, "none", "forward", 2.0, ns_per_token=31.2, relative=1.0, plan_share=0.5,
            bytes_per_token=20),
        row(64, "none", "backward", 4.0, ns_per_token=62.5, relative=1.25, plan_share=0.25,
            bytes_per_token=40),
        row(128, "none", "backward", None, status="stopped", reason="too long"),
    ]  # fmt: skip
    report = {"kind": "growth", "device": "GPU", "device_type": "cpu", "threads": 1, "base": 64,
              "torch": "2.11", "date": "2026-01-01", "command": "x", "rows": rows}  # fmt: skip
    lines = markdown(report).splitlines()
    assert lines[2].split(" | ")[4] == "× that at 64"
    assert lines[4] == "| 64 | plan | 1.00 / – | 15.6 / – | 1.00 / – |  | 16 / – |"
    assert lines[5] == (
        "| 64 | none | 2.00 / 4.00 | 31.2 / 62.5 | 1.00 / 1.25 | 50% / 25% | 20 / 40 |"
    )
    assert lines[6] == "" and lines[7].endswith(" none, backward, from N 128: too long.")
