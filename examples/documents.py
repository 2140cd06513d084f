"""Real text that is on every machine with Python: pages of the language's own reference manual.

They come from the standard library (what ``help("EXECUTION")`` prints), so nothing is downloaded
and nothing is copied into this repository. The wording differs a little between Python versions.
"""

import ast
import functools
import sysconfig
from pathlib import Path

__all__ = ["TOPICS", "load_documents", "load_library"]

TOPICS = ("specialnames", "compound", "execmodel", "debugger", "string-methods", "naming")


def load_documents(paths=()):
    """{name: text} of the given text files, or of the chosen pages when none are given."""
    if paths:
        return {str(p): Path(p).read_text(encoding="utf-8") for p in paths}
    from pydoc_data.topics import topics

    return {name: topics[name] for name in TOPICS if name in topics}


@functools.cache
def load_library(least=2500):
    """{name: text} of every page of the manual and of every module of the standard library (its
    docstrings, one after the other) with at least that many characters: some 180 documents."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py")) + sorted(root.glob("*/*.py"))
    texts = dict(topics)
    for file in files:
        if not {"site-packages", "test", "idlelib"} & set(file.parts):
            texts[file.relative_to(root).as_posix()] = _docstrings(file)
    return {name: text for name, text in texts.items() if len(text) >= least}


def _docstrings(file):
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, found))
