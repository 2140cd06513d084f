"""Training on real text: the same small encoder with exact and with MRA attention.

    python -m examples.classify [--quick] [--density 0.25] [--out classify.png]

The text is Python's own standard library, as installed. Of every word of a passage: is it prose,
in a comment or docstring, or code? The passages are words in lower case without punctuation, so
that no quote and no # tells, and many words ("return", "message", "not") are at home in both: what
is around them decides. Whole files are held out for the test.

Two models start from the same weights and see the same batches. One is ``nn.TransformerEncoder`` as
it is, in the other ``replace_attention`` has put MRA attention. A third, without any attention,
shows what the words give away by themselves. Printed: the loss as it falls, and the share of words
of held-out files that each gets right; also what the exactly trained model gets when MRA attention
is put into it afterwards, without training.
"""

import argparse
import collections
import copy
import io
import re
import sysconfig
import time
import tokenize
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


def words_of(source):
    """The words of a Python file in order, each with 1 if it is prose and 0 if it is code."""
    found, fresh = [], True  # fresh: a string here starts a statement, so it is a docstring
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        prose = token.type == tokenize.COMMENT or (token.type == tokenize.STRING and fresh)
        found += [(word.lower(), int(prose)) for word in re.findall(r"[A-Za-z]+", token.string)]
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            fresh = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            fresh = False
    return found


def passages(package):
    """Two lists of passages of ``package``, each of at most LENGTH words as ``words_of`` gives
    them: for training, and of every fourth file, for the test."""
    root = Path(sysconfig.get_path("stdlib")) / package
    files = sorted(f for f in root.rglob("*.py") if "test" not in f.relative_to(root).parts)
    parts = ([], [])
    for n, file in enumerate(files):
        words = words_of(file.read_text(encoding="utf-8"))
        cuts = (words[i : i + LENGTH] for i in range(0, len(words), LENGTH))
        parts[n % 4 == 3].extend(cut for cut in cuts if len(cut) >= LENGTH // 8)
    return parts


def load(limit=None):
    """(train, test), each of ids and labels (n, LENGTH) int64, and the size of the vocabulary,
    which knows the words of the training passages alone. ``limit``: passages of each package."""
    parts = [passages(package) for package in PACKAGES]
    counts = collections.Counter(w for train, _ in parts for cut in train for w, _ in cut)
    numbers = {w: n + 2 for n, (w, _) in enumerate(counts.most_common(VOCABULARY - 2))}
    sets = []
    for side in range(2):
        ids, labels = [], []
        for part in parts:
            cuts = part[side]
            for cut in cuts[:: -(-len(cuts) // limit)] if limit else cuts:
                rest = [PAD] * (LENGTH - len(cut))
                ids.append([numbers.get(word, UNKNOWN) for word, _ in cut] + rest)
                labels.append([prose for _, prose in cut] + rest)
        sets.append((torch.tensor(ids), torch.tensor(labels)))
    return *sets, len(numbers) + 2


class Classifier(nn.Module):
    """Word ids (B, N) to the logits (B, N) that each is prose."""

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
        self.prose = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, ids):
        padding = ids == PAD
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.prose(x).squeeze(-1)


class NoAttention(nn.MultiheadAttention):
    """Stands where attention was and adds nothing."""

    def forward(self, query, *args, **kwargs):
        return torch.zeros_like(query), None


@torch.no_grad()
def accuracy(model, ids, labels):
    """Share of the words that the model gets right."""
    model.eval()
    found = torch.cat([model(part) > 0 for part in ids.split(BATCH)])
    return (found == labels)[ids != PAD].double().mean().item()


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
            kept = ids[pick] != PAD
            logits, prose = model(ids[pick])[kept], labels[pick][kept]
            loss = F.binary_cross_entropy_with_logits(logits, prose.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds += time.perf_counter() - start
        right.append(accuracy(model, *test_set))
        mean = sum(losses[-batches:]) / batches
        say(f"{name:<12} epoch {epoch + 1:>2}/{epochs}: loss {mean:.3f}, test {right[-1]:.3f}")
    return losses, right, seconds


def draw(path, runs, majority):
    """The loss of every batch and the test accuracy of every epoch, for each of ``runs``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = (
        {"color": "black"},
        {"color": "#0072B2", "linestyle": "--"},  # one may hide the other
        {"color": "#E69F00"},
    )
    for (name, (losses, accuracies, _)), style in zip(runs.items(), styles, strict=True):
        left.plot(losses, alpha=0.2, **style)
        window = max(1, len(losses) // 20)
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(-1)
        left.plot(range(window - 1, len(losses)), smooth, label=name, **style)
        right.plot(range(1, len(accuracies) + 1), accuracies, marker="o", label=name, **style)
    right.axhline(majority, color="#7f7f7f", linestyle=":", label="all of one kind")
    left.set(xlabel="batch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="held-out files: words right", ylim=(0.5, 1))
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
    (ids, labels), kept = test_set, test_set[0] != PAD
    majority = labels[kept].double().mean().item()
    majority = max(majority, 1 - majority)
    say(f"{len(train_set[0])} passages to train on, {len(ids)} of other files to test; "
        f"{majority:.3f} of the test's words are of one kind")  # fmt: skip
    torch.manual_seed(0)
    exact = Classifier(vocabulary)
    mra, without = copy.deepcopy(exact), copy.deepcopy(exact)
    say(f"{replace_attention(mra, config)} attention modules replaced; {config}")
    for layer in without.encoder.layers:
        layer.self_attn = NoAttention(exact.places.embedding_dim, 1)
    models = {"exact": exact, "MRA": mra, "no attention": without}
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
