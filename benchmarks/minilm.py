"""``python -m benchmarks minilm FILE``: real inputs, q, k, v of MiniLM reading Python's manual.

``--inputs minilm`` takes them from the encoder where its package is installed. The file, 28 MB,
feeds machines that lack it: ``--inputs minilm --minilm-file FILE``.
"""

import argparse

import torch
from torch.nn.functional import pad

from benchmarks.cases import Unsupported
from benchmarks.report import say

WINDOWS = 4  # texts of 512 tokens


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks minilm", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    args = parser.parse_args(argv[1:])
    try:
        qkv = encode()
    except Unsupported as error:
        raise SystemExit(str(error)) from None
    torch.save(qkv, args.file)
    say(f"q, k, v of {qkv.shape[1]} layers and windows, (H, N, D) = {tuple(qkv.shape[2:])}")


@torch.no_grad()
def encode():
    """q, k, v of every window and layer: float16 (3, windows * layers, 12, 512, 32)."""
    from examples.documents import load_documents
    from examples.minilm import have_minilm, load_minilm

    missing = have_minilm()
    if missing:
        raise Unsupported(f"MiniLM needs: pip install {' '.join(missing)}, or --minilm-file FILE")
    model = load_minilm()
    ids, mask = model.windows(load_documents().values(), limit=1)
    layers = model.qkv(ids[:WINDOWS], mask[:WINDOWS])
    return torch.stack([torch.stack(qkv) for *qkv, _ in layers], 2).flatten(1, 2).half()


def draw(case, file=None):
    """query, key, value (B, H, N, D) float32 of a case, from ``file`` or the encoder.

    Each batch entry is one layer of one window, in turns. Of those the case takes the first H heads
    and N tokens; a larger D is filled up with zeros, the logits stay those of the encoder."""
    qkv = encode() if file is None else torch.load(file, weights_only=True)
    H, N, D = qkv.shape[2:]
    if case.H > H or case.N > N or case.D < D or (case.Hk, case.M) != (case.H, case.N):
        raise Unsupported(f"MiniLM has H {H}, N {N}, D {D}, at most that many heads and tokens fit")
    entries = torch.arange(case.B) % qkv.shape[1]
    query, key, value = pad(qkv[:, entries, : case.H, : case.N].float(), (0, case.D - D))
    return (case.D / D) ** 0.5 * query, key, value
