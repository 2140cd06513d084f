"""Real text that is on every machine with Python: pages of the language's own reference manual.

They come from the standard library (what ``help("EXECUTION")`` prints), so nothing is downloaded
and nothing is copied into this repository. The wording differs a little between Python versions.
"""

from pathlib import Path

__all__ = ["TOPICS", "load_documents"]

TOPICS = ("specialnames", "compound", "execmodel", "debugger", "string-methods", "naming")


def load_documents(paths=()):
    """{name: text} of the given text files, or of the chosen pages when none are given."""
    if paths:
        return {str(p): Path(p).read_text(encoding="utf-8") for p in paths}
    from pydoc_data.topics import topics

    return {name: topics[name] for name in TOPICS if name in topics}
