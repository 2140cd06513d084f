"""Command line: ``python -m benchmarks [COMMAND] [options]``; without a command, speed."""

import importlib
import sys

COMMANDS = ("host", "memory", "growth", "levels", "accuracy", "budgets", "embeddings", "layout",
            "minilm", "whisper", "table")  # fmt: skip


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv[:1] and argv[0] in COMMANDS else "speed"
    return importlib.import_module(f"benchmarks.{name}").main(argv)


if __name__ == "__main__":
    main()
