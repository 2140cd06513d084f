"""Errors at equal time: curves, and who is ahead."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import frontier  # noqa: E402
from benchmarks.report import time_unit  # noqa: E402

MRA2, DEFAULT = "block, global", "row + order 1"
MICRO = time_unit("cuda")


def rows(method, kind, *points):
    return [{"method": method, "kind": kind, "status": "ok", "ms": ms, "error": error}
            for ms, error in points]  # fmt: skip


def test_curve_drops_what_a_faster_row_beats():
    assert frontier.curve([(4, 0.1), (1, 0.4), (3, 0.5), (2, 0.4)]) == [(1, 0.4), (4, 0.1)]


def test_error_at_a_time():
    points = [(1, 0.4), (4, 0.1), (8, 0.05)]
    assert frontier.error_at(points, 0.9) is None and frontier.error_at([], 1) is None
    assert frontier.error_at(points, 1) == pytest.approx(0.4)
    assert frontier.error_at(points, 2) == pytest.approx(0.2)  # halfway in both logarithms
    assert frontier.error_at(points, 4) == pytest.approx(0.1)
    assert frontier.error_at(points, 100) == 0.05


def test_ratio_to_mra2_where_both_are():
    measured = rows(MRA2, "mra", (1, 0.4), (4, 0.1)) + rows(DEFAULT, "mra", (0.5, 0.4), (2, 0.1))
    (form,) = frontier.compare(measured, 10)["forms"]
    assert form["form"] == DEFAULT
    assert form["ratios"] == [{"ms": 2, "ratio": pytest.approx(0.5)}]
    assert form["ahead"] == [] and form["fastest_ms"] == 0.5
    assert frontier.sentence(form, 10, MICRO) == (
        "0.50 at 2000 µs", "first row at 500 µs; from there to 5000 µs ahead of all",
    )  # fmt: skip


def test_who_is_ahead_below_half_of_exact():
    measured = rows(DEFAULT, "mra", (2, 0.2), (4, 0.1))
    measured += rows("window", "peer", (1, 0.3), (3, 0.19), (60, 0.01))
    measured += rows("row", "mra", (0.1, 0.001))  # no rival: another of our forms
    measured += [{"method": "slow", "kind": "peer", "status": "not supported", "reason": "no"}]
    result = frontier.compare(measured, 10)
    (form,) = result["forms"]
    assert form["ratios"] == [] and form["budgets"] == 4  # 1, 2, 3 and 4 ms
    (early,) = form["ahead"]
    assert early == {"ms": 1, "method": "window", "error": 0.3, "ours": None}
    assert frontier.sentence(form, 10, MICRO) == (
        "no time in common",
        "first row at 2000 µs (others from 1000 µs); from there to 5000 µs ahead of all",
    )
    measured += rows("linear", "block peer", (3, 0.05))
    (form,) = frontier.compare(measured, 10)["forms"]
    text = frontier.sentence(form, 10, MICRO)[1]
    assert text.endswith("to 5000 µs behind linear until 4000 µs (0.050 against 0.100)")
    (form,) = frontier.compare(measured, 3)["forms"]
    assert frontier.sentence(form, 3, MICRO)[1] == "first row at 2000 µs, later than 1500 µs"


def test_units():
    assert MICRO(0.3126) == "313 µs" and time_unit("cpu")(12.34) == "12.3 ms"
