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
    """Both losses fall, and together, to what says more than the share of the larger kind; the
    picture is drawn where matplotlib is."""
    picture = tmp_path / "classify.png"
    printed = run_example("classify", "--quick", "--out", picture)
    assert "2 attention modules replaced" in printed
    names = ("exact", "MRA", "no attention")
    epoch = rf"({'|'.join(names)}) +epoch +\d/4: loss ([\d.]+), test ([\d.]+)$"
    lines = re.findall(epoch, printed, re.M)
    losses, right = (
        {name: [float(line[i]) for line in lines if line[0] == name] for name in names}
        for i in (1, 2)
    )
    majority = float(re.search(r"([\d.]+) of the test's words are of one kind", printed)[1])
    for name in ("exact", "MRA"):
        assert len(losses[name]) == 4 and losses[name][-1] < losses[name][0] - 0.1, printed
        assert right[name][-1] > majority + 0.05, printed
    assert losses["exact"] != losses["MRA"]  # two models: one of them is approximate
    assert abs(losses["exact"][-1] - losses["MRA"][-1]) < 0.05, printed
    cells = re.findall(r"^(\S.*?) {2,}(\S.*?) {2,}([\d.]+) +[\d.-]+$", printed, re.M)
    table = {row[:2]: float(row[2]) for row in cells}
    assert {pair: table.pop(pair) for pair in zip(names, names, strict=True)} == {
        (name, name): right[name][-1] for name in names
    }
    assert table.keys() == {("exact", "MRA")}
    assert abs(table["exact", "MRA"] - right["exact"][-1]) < 0.05, printed
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000
    else:
        assert "no picture" in printed


def test_classify_labels():
    """Comments and docstrings are prose; other strings are code."""
    from examples.classify import words_of

    source = (
        '"""About it."""\n'
        "import Os  # for names\n"
        "class C:\n"
        "    'Inner'\n"
        "    # lone\n"
        "    x = 'text'\n"
        "    def f(self):\n"
        "        return 'more'\n"
    )
    expected = "about:1 it:1 import:0 os:0 for:1 names:1 class:0 c:0 inner:1 lone:1 x:0 text:0 "
    expected += "def:0 f:0 self:0 return:0 more:0"
    assert " ".join(f"{word}:{prose}" for word, prose in words_of(source)) == expected


def test_classify_holds_files_out(monkeypatch, tmp_path):
    """What a file says is on one side only."""
    from examples import classify

    folder = tmp_path / "things"
    (folder / "test").mkdir(parents=True)
    for n, letter in enumerate("abcdefgh"):
        (folder / f"f{n}.py").write_text(f"{letter} = [\n" + f"word{letter},\n" * 700 + "]\n")
    (folder / "test" / "f9.py").write_text("left = out\n" * 700)
    monkeypatch.setattr(classify.sysconfig, "get_path", lambda _: str(tmp_path))
    train, test = classify.passages("things")
    assert {word for cut in test for word, _ in cut} == {"d", "wordd", "h", "wordh"}
    left = {word for letter in "abcefg" for word in (letter, f"word{letter}")}
    assert {word for cut in train for word, _ in cut} == left
    assert sorted(len(cut) for cut in test) == [189, 189, 512, 512]


def test_classify_ignores_padding():
    """A passage gives the same whatever stands in its padding, with MRA as without."""
    from examples import classify
    from mra_attention import MRAConfig, replace_attention

    model = classify.Classifier(50).double().eval()
    long, short = torch.randint(2, 50, (2, 200))
    short[120:] = classify.PAD
    for replaced in (False, True):
        if replaced:
            assert replace_attention(model, MRAConfig(density=1 / 4, block_size=32)) == 2
        both = model(torch.stack([long, short]))[1:, :120]
        with torch.no_grad():
            model.words.weight[classify.PAD] += 1
        other = model(torch.stack([long, short]))[1:, :120]
        torch.testing.assert_close(both, other, rtol=0, atol=1e-12)
        assert (model(long[None])[0, :120] - both[0]).abs().max() > 1e-3


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
