"""The command budgets: how it gives blocks out, and what it says of windows it has not seen."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import budgets  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.table import markdown  # noqa: E402


def test_small_run(tmp_path, capsys, monkeypatch):
    """Windows of two heads, of which one attends so sharply that it needs many blocks."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 256, 16, generator=g)
    x[0, :, 1] *= 6
    monkeypatch.setattr(budgets, "load", lambda name, args: x)
    file = tmp_path / "budgets.json"
    main(["budgets", "--device", "cpu", "--inputs", "synthetic", "--density", "1/4,1",
          "--block-size", "16", "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    quarter, whole = report["rows"]
    assert report["kind"] == "budgets" and quarter["blocks_per_row"] == 4
    assert len(quarter["counts"]) == 2 and sum(quarter["counts"]) <= 8
    assert quarter["same"] > 0.01 and quarter["by_head"] > 0.01
    assert whole["same"] < 1e-5 and whole["counts"] == [16, 16] and whole["by_head"] < 1e-5
    assert f"{quarter['same']:.4f} {quarter['by_head']:.4f}" in capsys.readouterr().out
    text = markdown(report)
    assert "| synthetic, blocks of 16 | " in text and "(4: " in text


def test_one_window_is_not_enough(monkeypatch):
    monkeypatch.setattr(budgets, "load", lambda name, args: torch.randn(3, 1, 2, 64, 16))
    with pytest.raises(SystemExit, match="synthetic: got 1 windows, expected at least 2"):
        main(["budgets", "--device", "cpu", "--inputs", "synthetic"])
