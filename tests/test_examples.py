"""The examples beside the demo, each run as its first lines say; what they print is looked at."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT))  # for the package examples


def run_example(name, *arguments):
    """What ``python -m examples.<name>`` prints."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_classify_trains_alike(tmp_path):
    """Both losses fall, and together; the picture is drawn where matplotlib is."""
    picture = tmp_path / "classify.png"
    printed = run_example("classify", "--quick", "--out", picture)
    assert "2 attention modules replaced" in printed
    lines = re.findall(r"(exact|MRA) +epoch +\d/4: loss ([\d.]+), test ([\d.]+)$", printed, re.M)
    losses, right = (
        {name: [float(line[i]) for line in lines if line[0] == name] for name in ("exact", "MRA")}
        for i in (1, 2)
    )
    for name, values in losses.items():
        assert len(values) == 4 and values[-1] < values[0] - 0.1, (name, printed)
        assert all(0 <= share <= 1 for share in right[name])
    assert losses["exact"] != losses["MRA"]  # two models: one of them is approximate
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 0.1, printed
    table = re.findall(r"^(exact|MRA) +(exact|MRA) +([\d.]+) +[\d.-]+$", printed, re.M)
    assert [row[:2] for row in table] == [("exact", "exact"), ("MRA", "MRA"), ("exact", "MRA")]
    assert [float(row[2]) for row in table[:2]] == [right[name][-1] for name in ("exact", "MRA")]
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000
    else:
        assert "no picture" in printed


def test_classify_holds_files_out(monkeypatch, tmp_path):
    """A file's words are on one side only, lines that name the package on neither."""
    from examples import classify

    folder = tmp_path / "things"
    folder.mkdir()
    for n in range(8):
        (folder / f"f{n}.py").write_text(f"import os\nthings = 1\n{f'word{chr(97 + n)} ' * 700}\n")
    monkeypatch.setattr(classify.sysconfig, "get_path", lambda _: str(tmp_path))
    train, test = ({word for cut in side for word in cut} for side in classify.passages("things"))
    assert test == {"wordd", "wordh"}
    assert train == {f"word{letter}" for letter in "abcefg"}


def test_classify_ignores_padding():
    """A passage gives the same alone and beside a longer one, with MRA as without."""
    from examples import classify
    from mra_attention import MRAConfig, replace_attention

    model = classify.Classifier(50).double().eval()
    long, short = torch.randint(2, 50, (2, 200))
    short[120:] = classify.PAD
    for replaced in (False, True):
        if replaced:
            assert replace_attention(model, MRAConfig(density=1 / 4, block_size=32)) == 2
        both = model(torch.stack([long, short]))
        alone = model(short[None])
        torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-12)


def test_bert():
    pytest.importorskip("transformers", reason="the example needs transformers")
    printed = run_example("bert", "--tokens", 200, "--density", 0.25, 1.0)
    assert "4 of 4 attention modules served" in printed
    found = dict(re.findall(r"^([\d.]+) +(\S+) +\{'mra': 4\}$", printed, re.M))
    assert found.keys() == {"0.25", "1"}, printed
    assert float(found["1"]) < 1e-6 < 1e-3 < float(found["0.25"]) < 0.1


def test_mra_checkpoint():
    pytest.importorskip("transformers", reason="the example needs transformers")
    printed = run_example("mra_checkpoint")
    before, after = printed.split("\npatched\n")
    assert "patch_mra_model() serves it" in before and "2 of 2 attention modules served" in after
    norms = [
        [float(x) for x in re.search(r"attention: ([\d. ]+)", part)[1].split()]
        for part in (before, after)
    ]
    if not torch.cuda.is_available():  # there transformers may have found its own kernel
        assert norms[0] == [0, 0]
    assert len(norms[1]) == 2 and min(norms[1]) > 0.1
    gradients = re.search(r"queries' weights: (\S+) (\S+)", after)
    assert min(float(g) for g in gradients.groups()) > 0
    assert "in bfloat16: finite" in after
