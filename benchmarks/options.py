"""Command-line options, and what every command starts with."""

import argparse

import torch

from benchmarks.backends import KINDS
from benchmarks.cases import DTYPES, INPUTS, PASSES
from benchmarks.environment import environment
from benchmarks.stages import STAGES
from mra_attention.config import COARSE, POOL, SELECTION

# Paths, and what stands elsewhere.
UNNAMED = ("--json", "--commit", "--minilm-file", "--whisper-file", "--speech", "--picture")
SCHEMA = 1  # of the JSON files; README.md describes it


def listed(kind=str, choices=None):
    """Argument type: a list with commas between."""

    def parse(text):
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
        wrong = [v for v in values if choices is not None and v not in choices]
        if wrong or not values:
            expected = ", ".join(map(str, choices)) if choices else "values with commas between"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected some of: {expected}")
        return values

    return parse


def shape(text):
    values = listed(int)(text)
    if len(values) != 4:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected B,H,N,D")
    return values


def block_size(text):
    values = listed(int, (16, 32, 64, 128))(text)
    if len(values) > 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one number or bq,bk")
    return (values[0], values[-1])


def levels(text):
    """block:cells pairs, the coarsest first, as ``levels`` of mra_attention."""
    pairs = [listed(int)(pair.replace(":", ",")) for pair in listed()(text)]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected block:cells,...")
    return tuple(map(tuple, pairs))


def share(text):
    """A density: 0.0625 or 1/16."""
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def backends(text):
    return [] if text == "none" else listed(str, KINDS)(text)


def stages(text):
    return list(STAGES) if text == "all" else listed(str, STAGES)(text)


def ordered_passes(text):
    return sorted(set(listed(str, PASSES)(text)), key=PASSES.index)


def add_common(parser):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    parser.add_argument("--commit", help="commit to name in the file where git cannot be asked")


def add_sizes(parser, heads, blocks_per_row=16):
    """Sizes of a command that measures against N, beside N."""
    add = parser.add_argument
    add("--heads", type=int, default=heads)
    add("--head-dim", type=int, default=64)
    add("--dtype", choices=DTYPES, help="bf16 on CUDA, fp32 on a CPU")
    add("--block-size", type=block_size, default=(64, 64))
    kind = int if isinstance(blocks_per_row, int) else listed(int)
    add("--blocks-per-row", type=kind, default=blocks_per_row)
    add("--pass", dest="passes", type=ordered_passes, default=list(PASSES))


def speed_parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed of MRA attention beside exact attention, FlexAttention on the same plan "
        "and equal pairs; every result is checked against float64 first. Other commands: host, "
        "memory, growth, levels, accuracy, embeddings, layout, minilm, whisper, table (each has "
        "--help).",
    )
    add = parser.add_argument
    add_common(parser)
    add("--case", type=listed(), help="names with commas between: A..F (CUDA), CPU1, CPU2")
    add("--shape", type=shape, action="append", metavar="B,H,N,D", help="a shape of your own")
    add("--kv-heads", type=int, help="Hk of the shapes")
    add("--kv-len", type=int, help="M of the shapes")
    add("--dtype", choices=DTYPES)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--density", type=share, help="0.0625 or 1/16")
    budget.add_argument("--blocks-per-row", type=int)
    add("--block-size", type=block_size, metavar="B or BQ,BK")
    add("--coarse", type=listed(str, COARSE), help="forms to run, with --order, "
        "--selection and --pool; without any of them those of the case")  # fmt: skip
    add("--order", type=listed(int, (0, 1)))
    add("--selection", type=listed(str, SELECTION))
    add("--pool", type=listed(str, POOL), help="of forms with row")
    add("--diagonal-blocks", type=int)
    add("--first-blocks", type=int)
    add("--causal", action="store_true")
    add("--picture", type=listed(int), metavar="[T,]H,W", help="the tokens are those of a picture "
        "or a video, and so MRA takes them: its layout")  # fmt: skip
    add("--pass", dest="passes", type=ordered_passes, default=list(PASSES),
        help="forward, backward (which is forward and backward)")  # fmt: skip
    kinds, names = ", ".join(KINDS), ", ".join(STAGES)
    add("--backend", type=backends, default=list(KINDS), help=f"none, or some of: {kinds}")
    add("--stage", type=stages, help=f"also the time of stages: all, or some of {names}")
    add("--kernels", action="store_true", help="also the CUDA kernels of each form (profiler)")
    add("--graph", action="store_true", help="also the time of a CUDA graph's replay")
    add("--inputs", choices=INPUTS, default="normal", help="inputs.py says what they are")
    add("--minilm-file", metavar="FILE", help="inputs of python -m benchmarks minilm FILE")
    add("--layout", choices=("bnhd", "bhnd"), default="bnhd", help="memory order of the inputs")
    add("--seconds", type=float, help="time for each row (CUDA: 0.3) or pass of a case (CPU: 20)")
    add("--repeat", type=int, help="fewest timed runs (CUDA: 10, CPU: 3)")
    add("--dry-run", action="store_true", help="list what would run with its operations and bytes")
    return parser


def command_line(argv):
    """The command as a result file names it: without files and the commit."""
    parts, skip = [], False
    for part in argv:
        if skip:
            skip = False
        elif part in UNNAMED:
            skip = True
        elif not part.startswith(tuple(f"{name}=" for name in UNNAMED)):
            parts.append(part)
    return " ".join(["python -m benchmarks", *parts])


def begin(kind, args, argv):
    """Sets threads up; returns the device and a new report (a dict for JSON)."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    hidden = {name.removeprefix("--").replace("-", "_") for name in (*UNNAMED, "--dry-run")}
    options = {name: value for name, value in vars(args).items() if name not in hidden}
    report = {"schema": SCHEMA, "kind": kind, **environment(device, args.commit)}
    return device, report | {"command": command_line(argv), "options": options}
