"""BERT with attn_implementation="mra": what is served, what was called, how far from exact.

    python -m examples.bert [--density 0.125 0.25 1] [--tokens 512]

The model is built from a config with random weights (nothing is downloaded), its queries and keys
wide enough for an attention that is not uniform. It reads bytes of real text, three passages of
different lengths padded to one batch. For a checkpoint, ``from_pretrained(...,
attn_implementation="mra")`` does the same. Needs ``transformers``.
"""

import argparse
import sys

import torch

import mra_attention as mra
from examples.documents import load_documents


def build(tokens):
    """A small BERT whose attention tells tokens apart: as initialised, all scores are near 0."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=tokens, attn_implementation="mra",
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    for name, p in model.named_parameters():
        if name.endswith(("query.weight", "key.weight")):
            torch.nn.init.normal_(p, std=0.12)
    return model


def read(tokens):
    """Bytes of three documents as ids (3, tokens), and the mask (3, tokens): 1 = a byte."""
    lengths = torch.tensor([tokens, tokens * 3 // 4, tokens // 3])
    mask = torch.arange(tokens) < lengths[:, None]
    texts = list(load_documents().values())[:3]
    ids = torch.stack([torch.tensor(list(text.encode()[:tokens])) for text in texts])
    return ids * mask, mask.long()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m examples.bert", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--density", type=float, nargs="+", default=[1 / 8, 1 / 4, 1 / 2, 1.0])
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args(argv)
    try:
        mra.transformers.register("mra")
    except ImportError as error:
        sys.exit(str(error))

    model, (ids, mask) = build(args.tokens), read(args.tokens)
    print(mra.transformers.coverage(model), "\n")

    model.set_attn_implementation("sdpa")
    exact = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    model.set_attn_implementation("mra")
    print("density  |state - exact| / |exact|  calls")
    for density in args.density:
        # The name stays, its config is a new one.
        mra.transformers.register("mra", mra.MRAConfig(density=density, block_size=32))
        mra.transformers.stats(reset=True)
        states = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        error = ((states - exact).norm() / exact.norm()).item()
        print(f"{density:<7.4g}  {error:<25.2e}  {mra.transformers.stats()}")


if __name__ == "__main__":
    main()
