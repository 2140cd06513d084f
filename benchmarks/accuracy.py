"""``python -m benchmarks accuracy``: error and time of every form and of other methods, on real q,
k, v. Error is ‖o - exact‖ / ‖exact‖ of a head, mean over heads, layers and windows, against exact
attention in float64 on the same inputs. For each density, every method may spend as many
multiply-adds as exact attention to that share of the keys; MRA's pooled part comes on top. "By
head" gives them out among heads and layers by what one half of the windows says, and errs on the
other.

Inputs are rounded to ``--dtype``, in which times are taken, of ``--batch`` entries at once: layers
and windows in turns. Errors are those of the method in float32 on the same rounded inputs.

``--inputs synthetic`` are sequences in which neighbours resemble each other: noise smoothed over
``--smooth`` positions; queries and keys share half of their variance, and are scaled so that
``--spread`` is about the standard deviation of the logits. ``minilm`` and ``whisper`` are real
encoders, reading text and listening to speech.
"""

import argparse
import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from benchmarks import candidates, frontier, minilm, report, whisper
from benchmarks.backends import SDPA
from benchmarks.by_head import NAME, ByHead, errors
from benchmarks.cases import (
    DTYPES,
    FORMS,
    PAPER_FORMS,
    ROW1,
    WEIGHTED_FORMS,
    Form,
    Unsupported,
    ratio,
    sides,
)  # fmt: skip
from benchmarks.environment import plain
from benchmarks.inputs import smooth
from benchmarks.options import add_common, begin, block_size, listed, shape, share
from benchmarks.peers import BLOCK_PEERS, PEERS, local, local_global
from benchmarks.timing import make_timer
from mra_attention import mra_attention

INPUTS = ("synthetic", "minilm", "whisper")
KINDS = ("mra", "by head", "oracle", "candidate", "block peer", "peer")
MRA_FORMS = (*PAPER_FORMS[1::-1], *FORMS, *WEIGHTED_FORMS)  # MRA-2-s and MRA-2 first
HEADS = ("block, global", "row + order 1", "row + order 1, sampled")  # whose errors by head stay
LAYERS = {"synthetic": 1, "minilm": 6, "whisper": 4}


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks accuracy", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add_inputs(add, ["synthetic"], [1, 4, 1024, 64])
    add("--density", type=listed(share), default=[1 / 16, 1 / 8, 1 / 4])
    add("--block-size", type=block_size, action="append", metavar="B or BQ,BK",
        help="32; may be given several times")  # fmt: skip
    add("--kind", type=listed(str, KINDS), default=list(KINDS), help=", ".join(KINDS))
    add("--causal", action="store_true", help="queries see keys up to their own; kind mra alone")
    add("--dtype", choices=DTYPES, help="bf16 on CUDA, fp32 on a CPU")
    add("--batch", type=int, help="entries that are timed at once; those that there are")
    add("--seconds", type=float, default=0.0, help="time for each row beyond the fewest runs")
    add("--no-time", dest="time", action="store_false", help="errors only")
    add("--picture", metavar="FILE", help="error against time and against a head's entropy")
    return parser


def add_inputs(add, inputs, synthetic_shape):
    """The options that ``load`` reads, with those inputs, and that shape of synthetic ones, unless
    others are given."""
    add("--inputs", type=listed(str, INPUTS), default=inputs)
    add("--windows", type=int, help="texts or recordings, at most; all that there are")
    add("--minilm-file", metavar="FILE", help="inputs of python -m benchmarks minilm FILE")
    add("--whisper-file", metavar="FILE", help="inputs of python -m benchmarks whisper FILE")
    add("--speech", metavar="FOLDER", help="of wav files, for Whisper where it is installed")
    add("--shape", type=shape, default=synthetic_shape, metavar="B,H,N,D", help="of synthetic")
    add("--smooth", type=int, default=16, help="positions that a neighbourhood reaches")
    add("--spread", type=float, default=2.0, help="standard deviation of the logits")


def _form(form):
    return functools.partial(mra_attention, coarse=form.coarse, order=form.order, pool=form.pool)


# Those that plan by a score of their own: dense, not timed. Kind, name, score, attention.
DENSE = (
    ("oracle", "none, oracle", candidates.true_mass, _form(Form("none"))),
    ("oracle", "row + order 1, oracle", candidates.true_mass, _form(ROW1)),
    ("oracle", "centred, oracle", candidates.true_mass, candidates.centred),
    ("oracle", "centred, true column weights", candidates.centred_score, candidates.columns),
    ("candidate", "row + order 1, mean-query score", candidates.mean_query_score, _form(ROW1)),
    ("candidate", "centred, plain score", candidates.mean_score, candidates.centred),
    ("candidate", "centred, curved", candidates.centred_score, candidates.curved),
    ("candidate", "centred, sampled, plain score", candidates.mean_score, candidates.sampled),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """``run(query, key, value)``. A dense one needs memory N * M and is not timed. ``fast(query,
    key, value)`` makes another function for the same work; on CUDA the faster one's time counts.
    ``unseen(query, key, value)``: what errors are those of, if not of ``run``."""

    kind: str
    name: str
    run: object
    dense: bool = False
    fast: object = None
    unseen: object = None


def methods(kinds, block_size, density, causal=False):
    """What is measured at one block size and density. Peers know no blocks, so they are measured
    at the first block size only; their windows belong to 32 queries. Of causal calls the forms that
    take them."""
    options = {"block_size": block_size, "density": density}
    attend = functools.partial(mra_attention, **options, is_causal=causal)
    found = [
        Method("mra", f.name, functools.partial(attend, **dataclasses.asdict(f)))
        for f in MRA_FORMS
        if not (causal and f.pool == "sampled")
    ]
    if causal:
        return [method for method in found if method.kind in kinds]
    for kind, name, score, attention in DENSE:
        run = functools.partial(candidates.planned, score, attention, block_size, density)
        found.append(Method(kind, name, run, dense=True))
    for name, peer in BLOCK_PEERS.items():
        fast = FAST.get(name) and functools.partial(FAST[name], **options)
        found.append(Method("block peer", name, functools.partial(peer, **options), fast=fast))
    for name, peer in PEERS.items():
        fast = FAST.get(name) and functools.partial(FAST[name], density=density)
        found.append(Method("peer", name, functools.partial(peer, density=density), fast=fast))
    return [method for method in found if method.kind in kinds]


def methods_by_head(inputs, exact, layers, block_size, densities):
    """One for each density. Without two windows each is a row that says so."""
    try:
        numbers = ByHead(inputs.qkv, exact, layers, block_size, densities)
        runs = map(numbers.runs, densities)
    except Unsupported as problem:

        def run(*qkv, problem=problem):
            raise problem

        runs = [(run, run)] * len(densities)
    return [Method("by head", NAME, run, unseen=unseen) for run, unseen in runs]


def _flex(*qkv, density, first_tokens):
    from benchmarks.flex import flex_windows

    run, plain = flex_windows(*qkv, density, first_tokens), local_global if first_tokens else local
    wanted = plain(*(t[:1] for t in qkv), density).float()
    difference = (run(*qkv)[:1] - wanted).norm() / wanted.norm()
    if difference > 0.02:
        raise RuntimeError(f"FlexAttention differs from the window by {difference:.2g}")
    return run


# PISA's products are those of row + order 1, so that form's kernels serve it.
FAST = {
    "local window": functools.partial(_flex, first_tokens=False),
    "local + first tokens": functools.partial(_flex, first_tokens=True),
    "PISA": lambda query, key, value, **options: functools.partial(
        mra_attention, **options, **dataclasses.asdict(ROW1)
    ),
}


def synthetic(sizes, length, spread, seed):
    """query, key, value (B, H, N, D), float32."""
    return torch.stack(smooth(sizes, (length,), spread, torch.Generator().manual_seed(seed)))


def load(name, args):
    """q, k, v of an input, (3, windows * layers, H, N, D), as the files have them."""
    if name == "synthetic":
        return synthetic(args.shape, args.smooth, args.spread, args.seed)
    if name == "minilm":
        file = args.minilm_file
        qkv = minilm.encode() if file is None else torch.load(file, weights_only=True)
    else:
        file = args.whisper_file
        if file is None:
            qkv = whisper.encode(args.speech, args.windows or whisper.WINDOWS)
        else:
            qkv = torch.load(file, weights_only=True)
    return qkv[:, : args.windows * LAYERS[name]] if args.windows else qkv


def exact_attention(query, key, value, causal=False):
    """In float64, one entry of the batch at a time: out, and the entropy of each head's rows in
    nats, mean over its rows (B, H)."""
    outs, entropies = [], []
    for q, k, v in zip(query.double(), key.double(), value.double(), strict=True):
        logits = q.shape[-1] ** -0.5 * q @ k.mT
        if causal:
            future = torch.ones_like(logits, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        p = logits.softmax(-1)
        outs.append(p @ v)
        entropies.append(torch.special.entr(p).sum(-1).mean(-1))
    return torch.stack(outs), torch.stack(entropies)


def by_head(x, layers):
    """Mean over windows of (windows * layers, H), as a flat list of layers and heads."""
    return [round(value, 4) for value in x.unflatten(0, (-1, layers)).mean(0).flatten().tolist()]


@dataclasses.dataclass
class Inputs:
    """query, key, value of the errors, float32 or wider, and of the times, both (B, H, N, D); the
    second are a batch of entries of the first, in turns, in the dtype of the times."""

    qkv: tuple
    timed: tuple

    @classmethod
    def of(cls, qkv, device, dtype, batch):
        qkv = qkv.to(device, dtype)
        at = torch.arange(batch or qkv.shape[1], device=device) % qkv.shape[1]
        exact = qkv if dtype == torch.float64 else qkv.float()
        return cls(exact.unbind(0), qkv[:, at].unbind(0))


def measure(method, inputs, exact, layers, timer):
    """One row: its errors and, with a timer, the median milliseconds of a call on the batch."""
    row = {"kind": method.kind, "method": method.name}
    try:
        if method.dense:
            entries = zip(*(t.split(1) for t in inputs.qkv), strict=True)
            out = torch.cat([method.run(*entry) for entry in entries])
        else:
            out = (method.unseen or method.run)(*inputs.qkv)
        error, ms = errors(out, exact), None
        if timer and not method.dense:
            ms, row["reason"] = fastest(method, inputs.timed, timer)
    except Exception as problem:  # one method that can't run is a row that says why
        return row | {"status": "not supported", "reason": plain(problem)}
    row |= {"status": "ok", "error": error.mean().item(), "worst": error.max().item(), "ms": ms}
    if method.name in HEADS:
        row["heads"] = by_head(error, layers)
    return row


def fastest(method, qkv, timer):
    """Milliseconds of a method, and why ``fast`` has no part in them, where that is so."""
    ms, reason = timer.measure(functools.partial(method.run, *qkv)).median, None
    if method.fast and qkv[0].device.type == "cuda":
        try:
            ms = min(ms, timer.measure(functools.partial(method.fast(*qkv), *qkv)).median)
        except Exception as problem:
            reason = f"timed in plain PyTorch: {plain(problem)}"
    return ms, reason


def measure_exact(inputs, exact, layers, timer, causal=False):
    """The row of exact attention: the rounding and the time of the fastest of torch's kernels."""
    count = min(len(exact), len(inputs.timed[0]))
    qkv, exact = Inputs(tuple(t[:count] for t in inputs.timed), inputs.timed), exact[:count]
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
    if inputs.timed[0].device.type != "cuda":
        return measure(Method("exact", "exact", attend), qkv, exact, layers, timer)
    rows = []
    for name in ("cudnn", "flash", "efficient"):
        with sdpa_kernel(SDPA[name]):
            method = Method("exact", f"exact {name}", attend)
            rows.append(measure(method, qkv, exact, layers, timer))
    return min(rows, key=lambda row: row.get("ms") or math.inf)


@torch.no_grad()
def measure_inputs(name, args, device, result):
    """One entry of the report, growing while it is measured."""
    layers, dtype = LAYERS[name], args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    entry = {"inputs": name, "dtype": dtype, "rows": []}
    result["inputs"].append(entry)
    try:
        qkv = load(name, args)
    except Unsupported as problem:
        entry |= {"status": "not supported", "reason": str(problem)}
        report.say(f"{name}: not supported: {problem}")
        return
    inputs = Inputs.of(qkv, device, DTYPES[dtype], args.batch)
    layers = layers if qkv.shape[1] % layers == 0 else 1
    exact, entropy = exact_attention(*inputs.qkv, args.causal)
    timer = make_timer(device, args.seconds) if args.time else None
    whole = measure_exact(inputs, exact, layers, timer, args.causal)
    entry |= {"status": "ok", "shape": list(qkv.shape[1:]), "batch": len(inputs.timed[0])}
    entry |= {"layers": layers, "entropy": by_head(entropy, layers), "exact": whole}
    cell = functools.partial(_cell, unit=report.time_unit(device.type))
    report.say(f"{name}, B, H, N, D = {tuple(qkv.shape[1:])}, {dtype}, timed as {entry['batch']} "
               f"entries; {whole['method']}: {cell(whole)}")  # fmt: skip
    sizes = args.block_size or [(32, 32)]
    for size in sizes:
        kinds = [kind for kind in args.kind if kind != "peer" or size == sizes[0]]
        report.say(f"blocks of {sides(size)}: error" + " and time" * args.time)
        report.say(f"  {'':<34}" + "".join(f"{ratio(d):>20}" for d in args.density))
        lists = [methods(kinds, size, density, args.causal) for density in args.density]
        if "by head" in kinds and not args.causal:
            for found, method in zip(
                lists, methods_by_head(inputs, exact, layers, size, args.density), strict=True
            ):
                found.insert(sum(other.kind == "mra" for other in found), method)
        for group in zip(*lists, strict=True):
            rows = []
            for density, method in zip(args.density, group, strict=True):
                row = measure(method, inputs, exact, layers, timer)
                rows.append({"block_size": list(size), "density": density} | row)
            entry["rows"] += rows
            report.write_json(args.json, result)
            report.say(f"  {group[0].name:<34}" + "".join(f"{cell(row):>20}" for row in rows))
    if whole["ms"]:
        entry["comparison"] = frontier.compare(entry["rows"], whole["ms"])
        frontier.print_comparison(entry["comparison"], report.time_unit(device.type))


def _cell(row, unit):
    if row["status"] != "ok":
        return row["reason"][:18]
    return f"{row['error']:.4f}" + (f" {unit(row['ms']):>11}" if row["ms"] else " " * 12)


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("accuracy", args, argv)
    result["inputs"] = []
    report.print_environment(result)
    for name in args.inputs:
        measure_inputs(name, args, device, result)
    report.write_json(args.json, result)
    if args.picture:
        from benchmarks.accuracy_picture import draw  # needs matplotlib

        draw(args.picture, result)
    return result
