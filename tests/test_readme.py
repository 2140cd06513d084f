"""Every Python block of the README runs as it stands, on the CPU, each in a fresh namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(match[1], line, id=f"line{line}")
    for match in re.finditer(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    for line in [TEXT[: match.start()].count("\n") + 2]
]


def test_readme_has_examples():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("code, line", BLOCKS)
def test_readme_block(code, line):
    if "transformers" in code:
        pytest.importorskip("transformers", reason="the README's block needs transformers")
    # Blank lines in front, so that an error names the README's own line.
    exec(compile("\n" * (line - 1) + code, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_readme_link(link):
    assert (README.parent / link).exists()
