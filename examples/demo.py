"""The main job on real input: a sentence encoder reads documents with exact and with MRA attention.

    python -m examples.demo [--quick] [--device cpu] [--out demo.png] [text files ...]

1. Accuracy: MiniLM reads windows of 512 tokens. For every density and form, the error of the
   attention outputs on the encoder's own q, k, v (mean over windows, layers and heads of
   ``|o - exact| / |exact|``), and the cosine between the sentence embeddings of the encoder run
   with MRA in all of its layers and of the exact one, so that there errors add up over layers.
   The time is that of attention alone, all layers, one run.
2. Speed: MRA against ``F.scaled_dot_product_attention`` on random inputs of 1K to 16K tokens.
3. One picture of both, with one head's attention map and the plan chosen for it.
"""

import argparse
import functools
import importlib.util
import itertools
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from examples.documents import load_documents
from examples.minilm import exact_attention, have_minilm, load_minilm
from mra_attention import make_plan, mra_attention

FORMS = {
    "none": {"coarse": "none", "order": 0},
    "block (MRA-2)": {"coarse": "block", "order": 0},
    "block + order 1": {"coarse": "block", "order": 1},
    "row + order 1": {"coarse": "row", "order": 1, "pool": "even"},
}
DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
TEXT_BLOCK = 32  # 512 tokens are 16 blocks, so that 1/16 is one block for each query block
SPEED_BLOCK, SPEED_DENSITY = 64, 1 / 16
START = time.perf_counter()


def say(text):
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def clock(run, device, budget_s):
    """Median seconds of ``run()``: after one warm-up, as many runs as fit ``budget_s``, 1 to 20. A
    warm-up that takes over two seconds counts itself: what it warms up is nothing beside that."""
    warm_up = timed(run, device)[1]
    if warm_up > 2:
        return warm_up
    times = []
    while not times or (len(times) < 20 and sum(times) < budget_s):
        times.append(timed(run, device)[1])
    return statistics.median(times)


def timed(run, device):
    """The result of ``run()``, and its seconds."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def with_mra(**options):
    """An attention function for the encoder."""

    def attention(q, k, v, mask):
        return mra_attention(q, k, v, mask, mask, block_size=TEXT_BLOCK, **options)

    return attention


def relative_error(out, exact, mask):
    """|o - exact| / |exact| of each window and head, (B, H), over the valid rows."""
    rows = mask[:, None, :, None] if mask is not None else torch.ones((), device=out.device)
    diff, exact = (out - exact) * rows, exact * rows
    return diff.flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


@torch.no_grad()
def accuracy(model, ids, mask, densities, forms):
    """The table's rows, and for the picture the layers' (q, k, v) with the errors of every head."""
    windows = ids.shape[0]
    full = None if mask.all() else mask  # full windows go without a mask, in both
    layers = [(q, k, v) for q, k, v, _ in model.qkv(ids, mask)]

    def read(attention):
        """Outputs of every layer on the exact encoder's q, k, v; embeddings; milliseconds."""
        embedding = model.embed(ids, mask, lambda q, k, v, _: attention(q, k, v, full))
        outs, seconds = timed(lambda: [attention(*qkv, full) for qkv in layers], ids.device)
        return outs, embedding, 1e3 * seconds / windows

    exact, embedding, ms = read(exact_attention)
    heads = ("error", "cosine", "lowest")
    print(f"\n{'density':>8} {'form':<16}" + "".join(f"{h:>10}" for h in heads) + "  ms a window")
    print(f"{'exact':>8} {'':<16} {0:9.4f} {1:9.5f} {1:9.5f} {ms:12.2f}")
    rows, head_errors = [], {}
    for density, (form, options) in itertools.product(densities, forms.items()):
        outs, other, ms = read(with_mra(density=density, **options))
        errors = torch.stack(
            [relative_error(*pair, full) for pair in zip(outs, exact, strict=True)]
        )
        cosine = (other * embedding).sum(-1)
        error, mean, lowest = errors.mean().item(), cosine.mean().item(), cosine.min().item()
        rows.append({"density": density, "form": form, "error": error})
        head_errors[density, form] = errors
        label = f"1/{round(1 / density)}" if density < 1 else "1"
        cells = f"{error:9.4f} {mean:9.5f} {lowest:9.5f} {ms:12.2f}"
        print(f"{label:>8} {form:<16} {cells}", flush=True)
    print()
    return rows, layers, head_errors


@torch.no_grad()
def one_head(layers, errors, density, form):
    """The head whose error is the median of all: its true map, its plan, and the map that MRA
    applies in its place, each (N, N); the last is read off with unit vectors as values."""
    flat = errors.flatten()
    at = flat.argsort()[len(flat) // 2].item()
    layer, window, head = torch.unravel_index(torch.tensor(at), errors.shape)
    q, k, _ = (t[window : window + 1, head : head + 1] for t in layers[layer])
    N, D = q.shape[2:]
    options = {"density": density, "block_size": TEXT_BLOCK}
    plan = make_plan(q, k, **options, **form).to_dense()[0, 0]
    plan = plan.repeat_interleave(TEXT_BLOCK, 0).repeat_interleave(TEXT_BLOCK, 1)[:N, :N]
    count = -(-N // D)
    units = F.pad(torch.eye(N, device=q.device, dtype=q.dtype), (0, count * D - N))
    units = units.view(N, count, D).transpose(0, 1).unsqueeze(1)  # (count, 1, N, D)
    many = [t.expand(count, 1, N, D) for t in (q, k)]
    seen = mra_attention(*many, units, **options, **form)
    seen = seen.squeeze(1).transpose(0, 1).reshape(N, -1)[:, :N]
    true = (q @ k.mT * D**-0.5).softmax(-1)[0, 0]
    at = {"layer": int(layer), "head": int(head), "error": flat[at].item(), "density": density}
    return at | {"true": true.cpu(), "plan": plan.cpu(), "seen": seen.cpu()}


def forward(attention, q, k, v, grad):
    with torch.no_grad():
        attention(q, k, v)


def forward_backward(attention, q, k, v, grad):
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.autograd.grad(attention(*inputs), inputs, grad)


def speed(device, sizes, budget_s, patience_s):
    """Seconds of exact attention and MRA at each N. What would take more than ``patience_s`` by the
    growth with N² of the last measured size is left out and printed as such."""
    cuda = device.type == "cuda"
    H, D, dtype = (16, 64, torch.bfloat16) if cuda else (8, 64, torch.float32)
    options = FORMS["row + order 1"] | {"density": SPEED_DENSITY, "block_size": SPEED_BLOCK}
    mra = functools.partial(mra_attention, **options)
    exact = F.scaled_dot_product_attention
    runs = {
        "exact": (forward, exact),
        "mra": (forward, mra),
        "exact f+b": (forward_backward, exact),
        "mra f+b": (forward_backward, mra),
    }
    rows, last = [], {}
    print(f"B 1, H {H}, D {D}, {str(dtype)[6:]}, density 1/16, blocks of 64, row + order 1; ms")
    heads = ("exact", "MRA", "faster", "exact f+b", "MRA f+b", "faster")
    print(f"{'N':>7}" + "".join(f"{h:>11}" for h in heads))
    for N in sizes:
        inputs = torch.randn(4, 1, H, N, D, device=device, dtype=dtype).unbind()
        row = {"N": N}
        for name, (run, attention) in runs.items():
            n, seconds = last.get(name, (N, 0))
            row[name] = None
            if seconds * (N / n) ** 2 <= patience_s:
                row[name] = clock(functools.partial(run, attention, *inputs), device, budget_s)
                last[name] = N, row[name]
        rows.append(row)
        line = f"{N:>7}"
        for pair in (("exact", "mra"), ("exact f+b", "mra f+b")):
            a, b = (row[name] for name in pair)
            line += "".join(f"{'-' if t is None else f'{1e3 * t:.3f}':>11}" for t in (a, b))
            line += f"{f'{a / b:.2f}x' if a and b else '-':>11}"
        print(line, flush=True)
    if any(t is None for row in rows for t in row.values()):
        print(f"- : left out, one run would take over {patience_s:.0f} s by its growth with N²")
    print()
    return {"rows": rows, "H": H, "D": D, "dtype": str(dtype)[6:]}


def device_name(device):
    """Name of the GPU, or of the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(
                line.split(":", 1)[1].strip() for line in f if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def missing_packages():
    """The packages that the demo misses here, as pip names them."""
    return have_minilm() + ["matplotlib"] * (importlib.util.find_spec("matplotlib") is None)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "files", nargs="*", help="text files to read instead of Python's own manual"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="demo.png", help="where the picture goes")
    parser.add_argument(
        "--windows", type=int, default=2, help="windows of 512 tokens of each document"
    )
    parser.add_argument("--quick", action="store_true", help="a small run that touches everything")
    args = parser.parse_args(argv)
    missing = missing_packages()
    if missing:
        sys.exit(f"The demo needs packages that are not installed: pip install {' '.join(missing)}")
    from examples.picture import draw

    torch.manual_seed(0)
    device = torch.device(args.device)
    name = device_name(device)
    say(f"torch {torch.__version__} on {name}")
    model = load_minilm(device)
    documents = load_documents(args.files)
    texts = list(documents.values())[: 1 if args.quick else None]
    ids, mask = model.windows(texts, limit=args.windows)
    say(f"MiniLM reads {', '.join(list(documents)[: len(texts)])}: {int(mask.sum())} tokens in "
        f"{len(ids)} windows")  # fmt: skip
    densities, sizes = DENSITIES, [1024 * 2**n for n in range(5)]
    if args.quick:
        densities, sizes = (1 / 8, 1.0), [512, 1024]
    rows, layers, errors = accuracy(model, ids, mask, densities, FORMS)
    say("one head's map")
    best = "row + order 1"
    head = one_head(layers, errors[1 / 8, best], 1 / 8, FORMS[best])
    say("speed, random inputs; forward, then forward and backward (f+b)")
    timing = speed(device, sizes, budget_s=0.5, patience_s=15.0)
    draw(args.out, rows, timing, head, name)
    say(f"picture saved to {args.out}")


if __name__ == "__main__":
    main()
