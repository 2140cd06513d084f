"""The benchmark command: formulas against hand-made numbers, a small run, tables from its file."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import formulas, stages, timing  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.backends import Context, Prepared, prepare_mra  # noqa: E402
from benchmarks.cases import CASES, DEFAULT, FORMS, Case, Form  # noqa: E402
from benchmarks.check import check  # noqa: E402
from benchmarks.environment import plain  # noqa: E402
from benchmarks.memory import exponent  # noqa: E402
from benchmarks.speed import ROW  # noqa: E402
from benchmarks.table import markdown, replaced  # noqa: E402
from benchmarks.timing import Times  # noqa: E402

# 4 query blocks and 8 key blocks of 16, of which each row takes 2.
TINY = Case("tiny", 2, 4, 64, 8, Hk=2, M=128, block_size=(16, 16), density=1 / 4)
SMALL = ["--device", "cpu", "--shape", "1,2,200,16", "--block-size", "32", "--density", "1/4",
         "--seconds", "0.05"]  # fmt: skip


def test_dry_run_lists_every_case(capsys, tmp_path):
    file = tmp_path / "dry.json"
    main(["--dry-run", "--device", "cuda", "--json", str(file)])
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    assert [case["name"] for case in report["cases"]] == list("ABCDEF")
    for name in "ABCDEF":
        assert f"\n{name}: {CASES[name].describe()}\n" in "\n" + printed
    for case in report["cases"]:
        names = {row["backend"] for row in case["rows"]}
        assert {"exact cudnn", "flex", "flex 128", "equal pairs"} <= names
        assert {f"mra {form.name}" for form in CASES[case["name"]].forms} <= names
        assert all(row["flops"] > 0 and row["bytes"] > 0 for row in case["rows"])
    main(["--dry-run", "--device", "cpu"])
    assert "CPU1: " in capsys.readouterr().out


def test_dry_run_of_case_a_by_hand():
    # Exact: 4 * 16 heads * 16384^2 * 64. The plan: 256 blocks, 16 a row, so 1024 keys a query.
    a = CASES["A"]
    assert formulas.exact_work(a, "forward").flops == 1_099_511_627_776
    assert formulas.exact_work(a, "backward").flops == 3_848_290_697_216
    assert formulas.equal_keys(a) == 1024
    assert formulas.exact_pairs(a) == 16384 * 1024
    # q, k, v and out are 33 554 432 bytes each, lse 1 048 576.
    assert formulas.exact_work(a, "forward").bytes == 135_266_304
    assert formulas.exact_work(a, "backward").bytes == 404_750_336
    assert formulas.output_bytes(a, "backward") == 4 * 33_554_432


@pytest.mark.parametrize(
    "form, which, expected",
    [
        # 8 heads, 4 key heads, N 64, M 128, D 8; 64 * 2 * 16 = 2048 exact pairs of a head.
        ("none", "forward", {"pool": 4 * 2 * 8 * 128 + 8 * 8 * 64, "plan": 8 * 2 * 8 * 32,
                             "coarse": 0, "fine": 8 * 4 * 8 * 2048, "order1": 0}),
        # 64 queries see 6 unselected blocks each.
        ("row + order 1", "forward",
         {"pool": 12288, "plan": 4096, "coarse": 8 * 4 * 8 * 384, "fine": 524288,
          "order1": 64 * (8 * 4 * 64 + 4 * 4 * 128)}),
        # 4 query blocks see 6 each.
        ("block", "forward", {"pool": 12288, "plan": 4096, "coarse": 8 * 2 * 8 * 24,
                              "fine": 524288, "order1": 0}),
        ("block + order 1", "backward",
         {"pool": 8192, "plan": 0, "coarse": 8 * (10 * 8 * 24 + 2 * 8 * 64),
          "fine": 8 * 10 * 8 * 2048, "order1": 64 * (8 * 8 * 64 + 4 * 6 * 128)}),
        ("row", "backward", {"pool": 8192, "plan": 0, "coarse": 8 * 10 * 8 * 384,
                             "fine": 1310720, "order1": 0}),
    ],
)  # fmt: skip
def test_formulas_by_hand(form, which, expected):
    form = {f.name: f for f in FORMS}[form]
    assert formulas.mra_stages(TINY, form, which) == expected


def test_budgets_of_a_causal_case_with_a_short_last_block():
    case = Case("c", 1, 1, 80, 8, block_size=(32, 16), density=1 / 4, is_causal=True)
    # Rows see 2, 4 and 5 key blocks, may take 1, 1 and 2; the diagonal crosses 2, 2 and 1.
    assert case.budgets() == [(32, 2, 2), (32, 2, 4), (16, 2, 5)]
    assert formulas.exact_pairs(case) == 80 * 32


def test_floor_is_known_for_the_h200_alone():
    work = formulas.Work(805 * 10**9, 1)
    assert work.floor_ms("NVIDIA H200") == pytest.approx(1.0)
    assert formulas.Work(1, 4_270_000_000).floor_ms("NVIDIA H200") == pytest.approx(1.0)
    assert work.floor_ms("another") is None


def test_small_run(capsys, tmp_path):
    file = tmp_path / "cpu.json"
    main([*SMALL, "--json", str(file), "--commit", "abc1234", "--stage", "all"])
    text = file.read_text()
    report = json.loads(text)
    assert str(tmp_path) not in text and str(ROOT) not in text
    top = {"schema", "kind", "device", "device_type", "torch", "python", "date", "commit",
           "threads", "command", "options", "cases"}  # fmt: skip
    assert set(report) == top
    assert report["kind"] == "speed" and report["commit"] == "abc1234"
    assert report["command"] == " ".join(["python -m benchmarks", *SMALL, "--stage", "all"])
    (case,) = report["cases"]
    assert (case["N"], case["block_size"], case["density"]) == (200, [32, 32], 0.25)
    backends = ["exact torch", "equal pairs", *(f"mra {form.name}" for form in (*FORMS, DEFAULT))]
    assert [(row["backend"], row["pass"]) for row in case["rows"]] == [
        (name, which) for name in backends for which in ("forward", "backward")
    ]
    for row in case["rows"]:
        assert set(row) == set(ROW)
        assert row["status"] == "ok", row
        ms = row["ms"]
        assert 0 < ms["p10"] <= ms["median"] <= ms["p90"] and ms["count"] >= 3
        assert row["tflops"] == pytest.approx(row["flops"] / ms["median"] / 1e9)
        if row["kind"] != "equal pairs":
            assert 0 < row["error"] < 1e-5
            names = {"out"} if row["pass"] == "forward" else {"out", "dq", "dk", "dv"}
            assert set(row["errors"]) == names
        if row["kind"] == "mra":
            assert row["plan_agreement"] > 0.99 and row["peak_bytes"] > 0
            exact = [r for r in case["rows"] if r["kind"] == "exact" and r["pass"] == row["pass"]]
            assert row["faster_than_exact"] == exact[0]["ms"]["median"] / ms["median"]
    wanted = {"pool", "plan", "coarse", "fine", "order1", "whole"}
    line = next(s for s in case["stages"] if s["form"] == "row + order 1")
    assert line["pass"] == "forward" and set(line["ms"]) == wanted
    printed = capsys.readouterr().out
    assert "exact torch" in printed and "failed" not in printed
    # The table of what was measured: every form with its two medians.
    table = markdown(report)
    assert report["command"] in table and "abc1234" in table
    for form in (*FORMS, DEFAULT):
        assert len(re.findall(rf"\| {re.escape(form.name)} \| [\d.]+ / [\d.]+ \|", table)) == 1


@pytest.mark.parametrize(
    "options",
    [["--causal"], ["--kv-heads", "1", "--kv-len", "70"], ["--picture", "8,25"],
     ["--picture", "2,10,10"]],
)  # fmt: skip
def test_small_run_of_other_shapes(options, tmp_path):
    file = tmp_path / "x.json"
    main([*SMALL, *options, "--coarse", "block,none", "--order", "0,1", "--json", str(file)])
    (case,) = json.loads(file.read_text())["cases"]
    assert {row["form"] for row in case["rows"]} == {None, "none", "block", "block + order 1"}
    assert all(row["status"] == "ok" for row in case["rows"]), case["rows"]


def test_weighted_means(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    forms = ["--coarse", "block,row", "--pool", "even,centred,sampled"]
    main([*SMALL, *forms, "--backend", "mra", "--json", str(file)])
    (case,) = json.loads(file.read_text())["cases"]
    names = ["block + order 1", *("row + order 1" + p for p in ("", ", centred", ", sampled"))]
    assert [row["form"] for row in case["rows"]] == [n for n in names for _ in range(2)]
    assert all(row["status"] == "ok" for row in case["rows"]), case["rows"]
    # The check knows them: with even means in their place it fails.
    form = Form("row", 1, pool="centred")
    case = Case("c", 1, 2, 96, 16, dtype="fp32", block_size=(32, 32), blocks_per_row=1)
    context = Context(case, torch.device("cpu"), seed=1)
    good, other = prepare_mra(form, context), prepare_mra(Form("row", 1), context)
    wrong = dataclasses.replace(good, attend=other.attend)
    for whole in (96, 64):  # all of the head, and a prefix
        monkeypatch.setattr("benchmarks.check.WHOLE", whole)
        assert check(context, good, "backward").problem(strict=True) is None
        assert "error of out" in check(context, wrong, "forward").problem(strict=True)


def test_check_of_a_picture_compares_with_tokens_in_blocks():
    form = Form("row", 1)
    case = Case("c", 1, 2, 96, 16, dtype="fp32", block_size=(32, 32), blocks_per_row=1,
                picture=(8, 12))  # fmt: skip
    context = Context(case, torch.device("cpu"), seed=1)
    good = prepare_mra(form, context)
    found = check(context, good, "backward")
    assert found.problem(strict=True) is None and found.difference < 1e-6
    turned = dataclasses.replace(good, attend=lambda *x: good.attend(*x).roll(1, 2))
    assert "differs" in check(context, turned, "forward").problem(strict=True)
    with pytest.raises(SystemExit, match="--picture: got"):
        main([*SMALL, "--picture", "8,24"])


def test_check_notices_a_wrong_result():
    form = Form("row", 1)
    case = Case("c", 1, 2, 96, 16, dtype="fp32", block_size=(32, 32), blocks_per_row=1)
    context = Context(case, torch.device("cpu"), seed=1)
    good = prepare_mra(form, context)
    assert check(context, good, "backward").problem(strict=True) is None

    def attend(query, key, value):
        return good.attend(query, key, value) * 1.001

    wrong = Prepared(attend, context.inputs, context.grad_out, form)
    assert "error of out" in check(context, wrong, "forward").problem(strict=True)
    # A given plan: what the rows of FlexAttention go through.
    plan = context.plan(form)
    given = Prepared(attend, context.inputs, context.grad_out, form, plan)
    assert "differs from MRA" in check(context, given, "forward").problem(strict=False)


def test_failing_backend_is_a_row(tmp_path, monkeypatch):
    import benchmarks.backends

    def broken(form, context):
        if form.coarse == "block":
            raise RuntimeError("no luck in /some/where/else.py\nmore")
        return prepare_mra(form, context)

    monkeypatch.setattr(benchmarks.backends, "prepare_mra", broken)
    file = tmp_path / "x.json"
    main([*SMALL, "--pass", "forward", "--coarse", "block,row", "--json", str(file)])
    rows = {row["form"]: row for row in json.loads(file.read_text())["cases"][0]["rows"]}
    assert rows["block + order 1"]["status"] == "failed"
    assert rows["block + order 1"]["reason"] == "no luck in ..."
    assert rows["row + order 1"]["status"] == "ok"


def test_plain_has_no_path():
    assert plain(ValueError("a 1/2 of x")) == "a 1/2 of x"
    assert plain(OSError("open /a/b-c/d.so: gone")) == "open ...: gone"
    assert plain(KeyError()) == "KeyError"


def test_unknown_names_are_refused(capsys):
    for wrong in (["--case", "Z"], ["--pass", "sideways"], ["--backend", "x"], ["--stage", "y"]):
        with pytest.raises(SystemExit):
            main(["--dry-run", "--device", "cpu", *wrong])
    capsys.readouterr()


def test_changed_case_loses_its_goal(tmp_path):
    file = tmp_path / "dry.json"
    main(["--dry-run", "--device", "cuda", "--case", "A", "--density", "1/8", "--json", str(file)])
    (case,) = json.loads(file.read_text())["cases"]
    assert case["name"] == "A*" and case["density"] == 1 / 8


def test_times():
    times = Times.of([3.0, 1.0, 2.0])
    assert (times.median, times.count) == (2.0, 3)
    assert times.p10 == pytest.approx(1.2) and times.p90 == pytest.approx(2.8)
    assert Times.of([5.0]) == Times(5.0, 5.0, 5.0, 1)


def test_cpu_peak_counts_what_lives_at_once():
    def run():
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        c = torch.empty(400, dtype=torch.uint8)
        del b, c

    assert timing.CpuTimer.peak(run) == 1500


def test_stage_of_kernel():
    name = "void mra::cuda::(anonymous namespace)::{}<64>(mra::cuda::{})"
    expected = {
        ("pool_kernel", "PoolGrid"): "pool", ("plan_transpose_kernel", "TransposeParams"): "plan",
        ("forward_kernel", "ForwardParams"): "fine", ("forward_kernel", "Order1Rows"): "order1",
        ("block_rows_kernel", "BlockRowsParams"): "coarse",
        ("backward_pooled_kernel", "BackwardPooledMaps"): "coarse",
        ("backward_rows_short_kernel", "BackwardRowsMaps"): "fine",
    }  # fmt: skip
    for kernel, stage in expected.items():
        assert stages.stage_of_kernel(name.format(*kernel)) == stage
    assert stages.stage_of_kernel("cutlass_gemm") == "other (ATen)"


def test_every_kernel_has_a_stage():
    found = 0
    for file in (ROOT / "csrc/cuda").rglob("*.cu*"):
        for match in re.finditer(r"__global__[^{;]*?(\w+_kernel)\(([^{]*?)\) *{", file.read_text()):
            name = f"void mra::cuda::{match[1]}<64>({match[2]})"
            assert stages.stage_of_kernel(name) in stages.STAGES, name
            found += 1
    assert found > 20


def test_memory_is_linear(tmp_path):
    file = tmp_path / "memory.json"
    main(["memory", "--device", "cpu", "--length", "1024,2048,4096", "--blocks-per-row", "4",
          "--block-size", "32", "--head-dim", "32", "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    assert report["linear"] == {"forward": True, "backward": True}
    assert len(report["rows"]) == 6 and all(row["peak_bytes"] > 0 for row in report["rows"])
    assert exponent((10, 7), (20, 28)) == pytest.approx(2)
    assert "| 4096 | backward | " in markdown(report)


def test_host_needs_a_gpu():
    with pytest.raises(SystemExit, match="--device: got cpu, expected cuda"):
        main(["host", "--device", "cpu"])


@pytest.mark.gpu
def test_host(tmp_path):
    file = tmp_path / "host.json"
    main(["host", "--length", "256,1024", "--rounds", "3", "--json", str(file)])
    report = json.loads(file.read_text())
    assert len(report["rows"]) == 10
    assert all(0 < row["forward"] < row["backward"] for row in report["rows"])
    assert "| 1024 | mra block | " in markdown(report)


def test_layout(tmp_path, monkeypatch):
    from benchmarks import layout

    monkeypatch.setitem(layout.INPUTS, "field 20x24 + 1", (20, 24))
    monkeypatch.setattr(layout, "POINTS", 300)
    file = tmp_path / "layout.json"
    main(["layout", "--device", "cpu", "--input", "field 20x24 + 1,points 2-D", "--heads", "2",
          "--density", "1/4", "--block-size", "32", "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    orders = [("as it comes", None), ("patches", [20, 24]), ("as it comes", None), ("curve", None)]
    assert [(row["order"], row["layout"]) for row in report["rows"]] == orders
    assert [row["blocks"] for row in report["rows"]] == [16, 16, 10, 10]  # 15 tiles, one in front
    for first, local in (report["rows"][:2], report["rows"][2:]):
        assert local["errors"]["row"] < 0.8 * first["errors"]["row"]
        assert all(0.2 < row["exact_pairs"] < 0.32 for row in (first, local))
    assert "| field 20x24 + 1 | 481 | 1/4 | " in markdown(report)


def test_layout_inputs():
    from benchmarks import layout

    generator = torch.Generator().manual_seed(1)
    x = layout.field((2, 3), (9, 14), 2.0, generator).view(2, 3, 9, 14)
    assert x.std().item() == pytest.approx(1, abs=1e-5)
    assert (x[..., 1:] - x[..., :-1]).std() < 0.5 and (x[..., 0] - x[..., -1]).std() > 0.8
    qk = layout.scaled(torch.randn(2, 1, 2, 50, 8, generator=generator), 2.0)
    logits = qk[0] @ qk[1].mT / 8**0.5
    torch.testing.assert_close(logits.std((-2, -1)), torch.full((1, 2), 2.0))
    points = torch.rand(1, 40, 3, generator=generator)
    q, k, _ = layout.nearby(points, 1, 16, generator)
    exact = (-torch.cdist(points, points).square() / (2 * layout.WIDTHS[0] ** 2)).softmax(-1)
    torch.testing.assert_close((q @ k.mT / 4).softmax(-1)[0], exact, rtol=1e-3, atol=1e-4)


def cuda_report():
    """A hand-made file of one case with two exact kernels, one of which refuses the backward."""

    def row(backend, kind, which, ms, form=None, **more):
        empty = dict.fromkeys(ROW) | {"backend": backend, "kind": kind, "pass": which}
        empty |= {"form": form, "status": "ok" if ms else "failed", "reason": None if ms else "why"}
        return empty | {"ms": {"median": ms} if ms else None} | more

    rows = [
        row("exact cudnn", "exact", "forward", 2.0), row("exact cudnn", "exact", "backward", 8.0),
        row("exact flash", "exact", "forward", 1.5), row("exact flash", "exact", "backward", None),
        row("flex", "flex", "forward", 0.25), row("flex", "flex", "backward", None),
        row("equal pairs", "equal pairs", "forward", 0.1),
        row("mra row", "mra", "forward", 0.5, "row", faster_than_exact=3.0, peak_bytes=2**20,
            goal={"ms": 0.4, "exact": 1.0, "paper": None}),
        row("mra row", "mra", "backward", 100.0, "row", faster_than_exact=0.08),
    ]  # fmt: skip
    case = {"name": "A", "description": "B1", "rows": rows}
    return {"kind": "speed", "device": "GPU", "device_type": "cuda", "driver": "1", "cuda": "13.0",
            "torch": "2.11", "date": "2026-01-01", "commit": None, "threads": 1,
            "command": "python -m benchmarks", "cases": [case]}  # fmt: skip


def test_table_by_hand():
    lines = markdown(cuda_report()).splitlines()
    assert lines[0] == "GPU, driver 1, CUDA 13.0, torch 2.11, 2026-01-01: `python -m benchmarks`"
    assert lines[4] == (
        "| A: B1 | 1.50 / 8.00 (flash, cudnn) | 0.250 / – | 0.100 / – | row | 0.500 / 100 "
        "| 3.00 / 0.08 | 1.0 / – | 0.4 / – |"
    )


def test_table_goes_between_its_markers(tmp_path, capsys):
    readme = "a\n<!-- results:x -->\nold\n<!-- /results:x -->\n<!-- results:y -->\n"
    assert replaced(readme, "x", "new\n") == readme.replace("old", "new")
    with pytest.raises(SystemExit):
        replaced(readme, "z", "new\n")
    file, page = tmp_path / "x.json", tmp_path / "page.md"
    file.write_text(json.dumps(cuda_report()))
    page.write_text(readme)
    main(["table", "--write", str(page), str(file), str(tmp_path / "y.json")])
    assert "y.json: no such file" in capsys.readouterr().out
    assert page.read_text() == replaced(readme, "x", markdown(cuda_report()))


def test_readmes_have_the_tables_of_the_result_files():
    pages = [ROOT / name for name in ("README.md", "benchmarks/README.md", "docs/accuracy.md")]
    pages = "".join(page.read_text(encoding="utf-8") for page in pages)
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        text = markdown(json.loads(file.read_text(encoding="utf-8")))
        table = f"<!-- results:{file.stem} -->\n{text}<!-- /results:{file.stem} -->\n"
        assert pages.count(table) == 1, f"python -m benchmarks table {file.name}"
