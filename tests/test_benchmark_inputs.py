"""Inputs of the speed command: what correlated ones are, MiniLM's from its file, what is shown."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import minilm  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.approximation import approximation, overlap  # noqa: E402
from benchmarks.backends import Context, prepare_mra  # noqa: E402
from benchmarks.cases import Case, Form, Unsupported  # noqa: E402
from benchmarks.inputs import smoothed  # noqa: E402

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--shape", "3,2,256,32", "--block-size", "32", "--density", "1/4",
         "--coarse", "none,row", "--backend", "mra", "--pass", "forward",
         "--seconds", "0.05"]  # fmt: skip


def case(inputs, **changes):
    sizes = {"B": 1, "H": 4, "N": 4096, "D": 32, "Hk": 2, "dtype": "fp32", "density": 1 / 8}
    return Case("c", **sizes | changes, inputs=inputs)


def correlation(x, distance):
    """Of the rows of x (..., L, D) with those ``distance`` further on."""
    return (x[..., :-distance, :] * x[..., distance:, :]).mean() / x.square().mean()


def test_correlated_inputs_are_what_they_should_be():
    query, key, value = Context(case("correlated"), CPU).inputs
    assert query.shape == (1, 4, 4096, 32) and key.shape == value.shape == (1, 2, 4096, 32)
    for x in (query, key, value):
        assert correlation(x, 1) > 0.95
        assert 0.2 < correlation(x, 100) < 0.55  # 1/e
        assert abs(correlation(x, 1000)) < 0.15
    assert value.var().item() == pytest.approx(1, abs=0.1)
    logits = query @ key.repeat_interleave(2, 1).mT / 32**0.5
    assert logits.std().item() == pytest.approx(1, abs=0.2)


def test_offset_queries_agree_on_key_blocks():
    longest = {}
    for inputs in ("normal", "offset"):
        context = Context(case(inputs, block_size=(32, 32)), CPU)
        query = context.inputs[0]
        assert query.square().mean().item() == pytest.approx(1, abs=0.05)
        mean = query.mean(2).norm(dim=-1) / query.norm(dim=-1).mean(-1)
        assert mean == pytest.approx(0.5 if inputs == "offset" else 0, abs=0.05)
        plan = context.plan(Form("none", 0)).to_dense()
        longest[inputs] = plan.sum(2).max().item()
    assert longest["offset"] > 2 * longest["normal"]


@pytest.mark.parametrize("inputs", ["normal", "offset", "correlated", "minilm"])
@pytest.mark.parametrize("layout", ["bnhd", "bhnd"])
def test_inputs_have_the_layout(layout, inputs, file):
    context = Context(case(inputs, H=2, N=96), CPU, 0, layout, file)
    for x in (*context.inputs, context.grad_out):
        assert (x if layout == "bhnd" else x.transpose(1, 2)).is_contiguous()


def test_correlated_plans_overlap_and_err_less():
    found = {}
    for inputs in ("normal", "correlated"):
        context = Context(case(inputs, block_size=(32, 32)), CPU)
        found[inputs] = approximation(context, prepare_mra(Form("row", 1), context))
    assert found["normal"].overlap == pytest.approx(1 / 8, abs=0.03)  # as chance has it
    assert found["correlated"].overlap > 2 * found["normal"].overlap
    assert found["correlated"].error < found["normal"].error / 2


@pytest.mark.parametrize("is_causal", [False, True])
def test_approximation_is_none_at_density_1(is_causal):
    whole = case("normal", N=200, density=1.0, is_causal=is_causal)
    context = Context(whole, CPU)
    assert approximation(context, prepare_mra(Form("row", 1), context)).error < 1e-5


def test_overlap_by_hand():
    rows = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert overlap(rows) == 0.25  # a half, nothing; the empty and the last row don't count
    assert overlap(rows[:1]) is None


def test_smoothed_is_the_sum_over_neighbours():
    noise, weights = torch.randn(2, 9), torch.tensor([1.0, 2.0, 2.0])
    expected = (noise[:, 2:] + 2 * noise[:, 1:-1] + 2 * noise[:, :-2]) / 3
    torch.testing.assert_close(smoothed(noise, weights), expected)


@pytest.fixture
def file(tmp_path):
    """As ``python -m benchmarks minilm`` writes it: 2 entries, 3 heads, 300 tokens of 16."""
    path = tmp_path / "minilm.pt"
    torch.save(torch.randn(3, 2, 3, 300, 16).half(), path)
    return path


def test_minilm_is_tiled_cut_and_filled_up(file):
    qkv = torch.load(file).float()
    query, key, value = minilm.draw(case("minilm", B=3, H=2, Hk=2, N=256), file)
    assert query.shape == key.shape == value.shape == (3, 2, 256, 32)
    for entry, source in enumerate((0, 1, 0)):
        q, k, v = qkv[:, source, :2, :256]
        torch.testing.assert_close(value[entry, ..., :16], v)
        logits = query[entry] @ key[entry].mT / 32**0.5
        torch.testing.assert_close(logits, q @ k.mT / 16**0.5)
    assert not value[..., 16:].any()
    for changes in ({"H": 4}, {"N": 301}, {"D": 8}, {"Hk": 1}, {"M": 128}):
        with pytest.raises(Unsupported, match="H 3, N 300, D 16"):
            minilm.draw(case("minilm", **{"H": 2, "Hk": 2, "N": 256, "D": 16} | changes), file)


@pytest.mark.parametrize("inputs", ["correlated", "minilm"])
def test_run_shows_time_beside_error(inputs, file, tmp_path, capsys):
    path = tmp_path / "x.json"
    main([*SMALL, "--inputs", inputs, "--minilm-file", str(file), "--json", str(path)])
    text, printed = path.read_text(), capsys.readouterr().out
    assert str(tmp_path) not in text  # no path of either file
    (entry,) = json.loads(text)["cases"]
    assert entry["inputs"] == inputs and f", {inputs} inputs\n" in printed
    errors = {}
    for row in entry["rows"]:
        assert row["status"] == "ok" and 0 < row["overlap"] < 1
        errors[row["form"]] = row["approximation"]
        line = next(x for x in printed.splitlines() if x.split()[:2] == row["backend"].split()[:2])
        assert f"{row['approximation']:.3f} {row['overlap']:8.3f}" in line
    assert errors["none"] > errors["row + order 1"] > 0.001


def test_minilm_that_is_missing_is_a_reason(tmp_path, capsys, monkeypatch):
    import examples.minilm

    monkeypatch.setattr(examples.minilm, "have_minilm", lambda: ["a-package"])
    path = tmp_path / "x.json"
    main([*SMALL, "--inputs", "minilm", "--json", str(path)])
    (entry,) = json.loads(path.read_text())["cases"]
    assert len(entry["rows"]) == 2
    for row in entry["rows"]:
        assert row["status"] == "not supported" and "pip install a-package" in row["reason"]
    assert "not supported: MiniLM needs: pip install a-package" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a-package"):
        main(["minilm", str(tmp_path / "minilm.pt")])


def test_minilm_writes_what_it_reads(tmp_path):
    from examples.minilm import have_minilm

    if have_minilm():
        pytest.skip(f"real inputs need: pip install {' '.join(have_minilm())}")
    path = tmp_path / "minilm.pt"
    main(["minilm", str(path)])
    assert torch.load(path).shape == (3, 24, 12, 512, 32)
    case_f = case("minilm", B=25, H=12, Hk=12, N=512, D=64)
    for here, there in zip(minilm.draw(case_f), minilm.draw(case_f, path), strict=True):
        assert torch.equal(here, there) and torch.equal(here[0], here[24])
