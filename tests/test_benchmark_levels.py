"""The command levels: its inputs, its errors, what it says of two resolutions in the same time."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import levels  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import PASSES  # noqa: E402
from benchmarks.inputs import smooth  # noqa: E402
from benchmarks.table import markdown  # noqa: E402

SMALL = ["levels", "--device", "cpu", "--heads", "2", "--head-dim", "16", "--block-size", "16",
         "--length", "512", "--seconds", "0.01", "--rows", "20"]  # fmt: skip


def test_small_run(tmp_path, capsys):
    file = tmp_path / "levels.json"
    budgets = ["--blocks-per-row", "1,8,32", "--levels-blocks", "2,8"]
    budgets += ["--levels", "64:2", "--levels", "128:1,64:8"]
    main([*SMALL, "--inputs", "correlated,smooth 64,many", *budgets, "--json", str(file)])
    report, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert report["kind"] == "levels"
    found = [(r["inputs"], r["blocks_per_row"], r["levels"]) for r in report["rows"]]
    two = [[64, 2]], [[128, 1], [64, 8]]
    budgets = [(n, []) for n in (1, 8, 32)] + [(n, one) for one in two for n in (2, 8)]
    assert found == [(name, *b) for name in ("correlated", "smooth 64", "many") for b in budgets]
    for row in report["rows"]:
        assert row["status"] == "ok" and set(row["ms"]) == set(PASSES), row
        assert set(row["two_levels"]) == (set(PASSES) if row["levels"] else set())
        if row["blocks_per_row"] == 32 and not row["levels"]:
            assert row["error"] < 1e-5  # all blocks
        else:
            assert 1e-5 < row["error"] < 1
        assert f"{row['error']:8.4f} {row['ms']['forward']:9.3f}" in printed
    text = markdown(report)
    assert text.count("| blocks a row | levels | error | ms |") == 3
    assert "| 8 | 1 of 128, 8 of 64 | " in text


def test_a_budget_that_fails_is_a_row(capsys):
    rows = main([*SMALL, "--inputs", "many", "--blocks-per-row", "4", "--levels", "48:2",
                 "--levels-blocks", "4", "--pass", "forward"])["rows"]  # fmt: skip
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert "levels: got" in rows[1]["reason"] and rows[1]["reason"] in capsys.readouterr().out


def test_unknown_inputs():
    for name in ("smoth 4", "smooth", "smooth x"):
        with pytest.raises(SystemExit, match="--inputs: got"):
            main([*SMALL, "--inputs", name])


def test_error_in_the_same_time_by_hand():
    points = [(16.0, 0.01), (1.0, 1.0), (4.0, 0.1)]
    assert levels.error_at(points, 4.0) == pytest.approx(0.1)
    assert levels.error_at(points, 2.0) == pytest.approx(10**-0.5)
    assert levels.error_at(points, 8.0) == pytest.approx(10**-1.5)
    assert levels.error_at(points, 0.9) is None and levels.error_at(points, 17.0) is None
    assert levels.error_at(points[:1], 16.0) is None


def test_smooth_inputs():
    """Neighbours resemble each other, logits have about the spread that was asked for."""
    q, k, v = smooth((1, 4, 4096, 32), (16, 64), 2.0, torch.Generator().manual_seed(0))
    assert q.shape == k.shape == v.shape == (1, 4, 4096, 32)
    logits = 32**-0.5 * q @ k.mT
    assert 1.6 < logits.std() < 2.4 and 0.9 < v.std() < 1.1
    near = (v[:, :, 1:] * v[:, :, :-1]).mean()
    far = (v[:, :, 200:] * v[:, :, :-200]).mean()
    assert near > 0.9 and far.abs() < 0.1
