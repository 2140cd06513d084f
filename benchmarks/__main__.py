"""Command line: ``python -m benchmarks [memory | accuracy | table] [options]``."""

import importlib
import sys


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv[:1] and argv[0] in ("memory", "accuracy", "table") else "speed"
    return importlib.import_module(f"benchmarks.{name}").main(argv)


if __name__ == "__main__":
    main()
