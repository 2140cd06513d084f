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


def test_blocks_go_where_they_take_most_off():
    tried = [1, 2, 4]
    error = torch.tensor([[0.9, 0.5, 0.3], [0.1, 0.5, 0.2], [0.05, 0.5, 0.0]])
    assert budgets.give_out(error, tried, 1).tolist() == [1, 1, 1]
    # Three to spare: one for head 0, which gains 0.8, one for head 2; its next step takes two.
    assert budgets.give_out(error, tried, 2).tolist() == [2, 1, 2]
    assert budgets.give_out(error, tried, 4).tolist() == [4, 1, 4]  # nothing to gain in head 1


def test_steps_follow_the_hull():
    """A step that gains nothing alone is taken together with the one behind it."""
    tried = [1, 2, 3]
    error = torch.tensor([[0.5, 0.4], [0.5, 0.3], [0.1, 0.2]])
    assert budgets.give_out(error, tried, 2).tolist() == [3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_it_never_spends_more(seed):
    g = torch.Generator().manual_seed(seed)
    tried, heads = [1, 2, 3, 4, 6, 8, 12, 16], 20
    error = torch.rand(len(tried), heads, generator=g).sort(0, descending=True).values
    for each in tried:
        counts = budgets.give_out(error, tried, each)
        assert counts.sum() <= each * heads and counts.min() >= 1
        at = [tried.index(n) for n in counts.tolist()]
        ours = error[at, torch.arange(heads)].mean()
        # The hull leaves at most one step of one head over.
        assert ours <= error[tried.index(each)].mean() + 1 / heads


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
    with pytest.raises(SystemExit, match="got 1 windows, expected at least 2"):
        main(["budgets", "--device", "cpu", "--inputs", "synthetic"])
