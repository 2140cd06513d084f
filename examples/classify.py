"""Training on real text: the same small encoder with exact and with MRA attention.

    python -m examples.classify [--quick] [--density 0.25] [--out classify.png]

The text is Python's own standard library, as installed: from which of its packages does a passage
of source come? Passages of 512 words are cut from files, and whole files are held out, so that
nothing in the test was read in training. Lines that import something, and most of what names a
package, are left out: they would give the answer away.

Two models start from the same weights and see the same batches. One is ``nn.TransformerEncoder`` as
it is, in the other ``replace_attention`` has put MRA attention. Printed: the loss as it falls, and
the share of held-out passages that each gets right; also what the exactly trained model gets when
MRA attention is put into it afterwards, without training. The words alone tell a good part of the
answer, so this shows that both train alike, not how far either can read.
"""

import argparse
import collections
import copy
import re
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mra_attention import MRAConfig, replace_attention

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
LENGTH, VOCABULARY, BATCH = 512, 4000, 8
PAD, UNKNOWN = 0, 1
START = time.perf_counter()


def say(text):
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def passages(package):
    """Two lists of passages of ``package``, each of at most LENGTH words: for training, and of
    every fourth file, for the test."""
    root = Path(sysconfig.get_path("stdlib")) / package
    files = sorted(f for f in root.rglob("*.py") if "test" not in f.relative_to(root).parts)
    parts = ([], [])
    for n, file in enumerate(files):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [s for s in lines if not re.match(r"\s*(from|import)\b", s) and package not in s]
        words = re.findall(r"[A-Za-z]+|\d+|[^\w\s]", "\n".join(lines))
        cuts = (words[i : i + LENGTH] for i in range(0, len(words), LENGTH))
        parts[n % 4 == 3].extend(cut for cut in cuts if len(cut) >= LENGTH // 8)
    return parts


def load(limit=None):
    """(train, test), each of ids (n, LENGTH) int64 and labels (n,), and the size of the vocabulary,
    which knows the words of the training passages alone. ``limit``: passages of each package."""
    parts = [passages(package) for package in PACKAGES]
    counts = collections.Counter(w for train, _ in parts for cut in train for w in cut)
    words = {w: n + 2 for n, (w, _) in enumerate(counts.most_common(VOCABULARY - 2))}
    sets = []
    for side in range(2):
        ids, labels = [], []
        for label, part in enumerate(parts):
            cuts = part[side]
            for cut in cuts[:: -(-len(cuts) // limit)] if limit else cuts:
                cut = [words.get(w, UNKNOWN) for w in cut]
                ids.append(cut + [PAD] * (LENGTH - len(cut)))
                labels.append(label)
        sets.append((torch.tensor(ids), torch.tensor(labels)))
    return *sets, len(words) + 2


class Classifier(nn.Module):
    """Word ids (B, N) to scores of the packages (B, classes)."""

    def __init__(self, vocabulary, width=64, heads=4, layers=2):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(LENGTH, width)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)  # small, so that few steps can move it
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # of attention weights: MRA has none, and alike means alike
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classes = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(PACKAGES)))

    def forward(self, ids):
        padding = ids == PAD
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = ~padding.unsqueeze(-1)
        return self.classes((x * kept).sum(1) / kept.sum(1))


@torch.no_grad()
def accuracy(model, ids, labels):
    """Share of the passages that the model gets right."""
    model.eval()
    found = torch.cat([model(part).argmax(-1) for part in ids.split(BATCH)])
    return (found == labels).double().mean().item()


def train(name, model, train_set, test_set, epochs):
    """Trains ``model``. Returns the loss of every batch, the test accuracy after every epoch and
    the seconds that the training took."""
    ids, labels = train_set
    torch.manual_seed(1)  # the same order and the same dropout for both
    batches = -(-len(ids) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * batches)
    losses, right, seconds = [], [], 0.0
    for epoch in range(epochs):
        model.train()
        start = time.perf_counter()
        for pick in torch.randperm(len(ids)).split(BATCH):
            loss = F.cross_entropy(model(ids[pick]), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds += time.perf_counter() - start
        right.append(accuracy(model, *test_set))
        mean = sum(losses[-batches:]) / batches
        say(f"{name:<5} epoch {epoch + 1:>2}/{epochs}: loss {mean:.3f}, test {right[-1]:.3f}")
    return losses, right, seconds


def draw(path, runs, majority):
    """The loss of every batch and the test accuracy of every epoch, for each of ``runs``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"color": "black"}, {"color": "#0072B2", "linestyle": "--"}  # one may hide the other
    for (name, (losses, accuracies, _)), style in zip(runs.items(), styles, strict=True):
        left.plot(losses, alpha=0.2, **style)
        window = max(1, len(losses) // 20)
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(-1)
        left.plot(range(window - 1, len(losses)), smooth, label=name, **style)
        right.plot(range(1, len(accuracies) + 1), accuracies, marker="o", label=name, **style)
    right.axhline(majority, color="#7f7f7f", linestyle=":", label="most frequent package")
    left.set(xlabel="batch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="held-out files: share right", ylim=(0, 1))
    right.set_xticks(range(1, max(len(accuracies) for _, accuracies, _ in runs.values()) + 1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m examples.classify", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--density", type=float, default=1 / 4)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--out", default="classify.png", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a small run that touches everything")
    args = parser.parse_args(argv)
    # In evaluation torch's layers have a path of their own, which on a CPU with padding is slower.
    torch.backends.mha.set_fastpath_enabled(False)
    epochs = args.epochs or (4 if args.quick else 5)
    config = MRAConfig(density=args.density, block_size=32)

    train_set, test_set, vocabulary = load(16 if args.quick else None)
    majority = torch.bincount(test_set[1]).max().item() / len(test_set[1])
    say(f"{len(train_set[1])} passages to train on, {len(test_set[1])} of other files to test, "
        f"of {', '.join(PACKAGES)}; the most frequent is {majority:.3f} of the test")  # fmt: skip
    torch.manual_seed(0)
    exact = Classifier(vocabulary)
    mra = copy.deepcopy(exact)
    replaced = replace_attention(mra, config)
    say(f"{replaced} attention modules replaced; {config}")
    models = {"exact": exact, "MRA": mra}
    runs = {name: train(name, model, train_set, test_set, epochs) for name, model in models.items()}
    later = copy.deepcopy(exact)
    replace_attention(later, config)
    print(f"\n{'trained with':<14} {'tested with':<14} {'test':>6} {'seconds':>9}")
    for name, (_, right, seconds) in runs.items():
        print(f"{name:<14} {name:<14} {right[-1]:6.3f} {seconds:9.1f}")
    print(f"{'exact':<14} {'MRA':<14} {accuracy(later, *test_set):6.3f} {'-':>9}\n")
    try:
        draw(args.out, runs, majority)
    except ImportError as error:
        say(f"no picture: {error}")
    else:
        say(f"picture saved to {args.out}")


if __name__ == "__main__":
    main()
