"""A checkpoint of transformers' own MraModel, on a CPU: zeros as it comes, attention when patched.

    python -m examples.mra_checkpoint [folder]

``folder`` holds a checkpoint that ``from_pretrained`` can load. Without one a small model is built
from a config, saved and loaded again, so that nothing is downloaded. Needs ``transformers``.
"""

import argparse
import sys
import tempfile

import torch

import mra_attention as mra


def save(folder):
    """A small MraForMaskedLM with random weights, saved in ``folder``."""
    from transformers import MraConfig, MraForMaskedLM

    torch.manual_seed(0)
    config = MraConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=512, block_per_row=4,
    )  # fmt: skip
    MraForMaskedLM(config).save_pretrained(folder)


def attention_norms(model, ids, mask):
    """The norm of what each attention layer gives out."""
    norms, layers = [], model.mra.encoder.layer
    hooks = [
        layer.attention.self.register_forward_hook(lambda *a: norms.append(a[-1][0].norm().item()))
        for layer in layers
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return norms


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m examples.mra_checkpoint", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", nargs="?", help="a checkpoint; without one, one is made")
    args = parser.parse_args(argv)
    try:
        from transformers import MraForMaskedLM
    except ImportError:
        sys.exit("This example needs Hugging Face transformers: pip install transformers")

    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            save(made)
        model = MraForMaskedLM.from_pretrained(args.folder or made).eval()

    torch.manual_seed(0)
    # 100 tokens, no multiple of 32, in a batch with a shorter text.
    ids = torch.randint(5, model.config.vocab_size, (2, 100))
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0

    def show(title):
        print(title)
        print(mra.transformers.coverage(model))
        norms = attention_norms(model, ids, mask)
        print("norm of each layer's attention:", *(f"{norm:.4f}" for norm in norms), "\n")

    show("as it comes")
    mra.transformers.patch_mra_model()
    show("patched")

    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    half = model.to(torch.bfloat16)
    with torch.no_grad():
        finite = half(ids, attention_mask=mask).logits.isfinite().all().item()
    grads = [layer.attention.self.query.weight.grad for layer in model.mra.encoder.layer]
    print(f"loss {loss.item():.4f}; gradients of the queries' weights:",
          *(f"{grad.norm().item():.2e}" for grad in grads))  # fmt: skip
    print(f"in bfloat16: {'finite' if finite else 'not finite'}")


if __name__ == "__main__":
    main()
