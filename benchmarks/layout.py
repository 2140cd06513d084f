"""``python -m benchmarks layout``: approximation error of pictures, videos and points by the order
of their tokens, at equal density.

Each input is attended to twice: in the order it comes in, and with blocks that are patches
(``layout=``) or runs along a Hilbert curve (``order_points``).

``field``   a smooth random picture: white noise under a Gaussian of ``--smooth`` tokens
``+ 1``     the same behind one token more, as a class token, which has nothing to do with it
``video``   the same in three dimensions
``china``, ``flower``  the two photographs of scikit-learn (427 x 640): pixels of patches of 8 x 8,
            standardised and projected at random. Real pictures, but no trained network
``vit ...`` the same and three of scikit-image's, seen by a trained vision transformer: q, k, v of
            its 12 layers of 6 heads of 64, and a class token in front (vit.py)
``points``  uniform in a square or a cube, in no order; weights fall with the distance as a Gaussian
            of 0.03 to 0.24, one width a head; values are waves across the square

Queries and keys of all but the last two share half of their variance and are scaled so that
``--spread`` is the standard deviation of the logits.
"""

import argparse
import dataclasses
import math

import torch
import torch.nn.functional as F

from benchmarks import report, vit
from benchmarks.approximation import overlap
from benchmarks.cases import FORMS, WEIGHTED_FORMS, Unsupported, ratio
from benchmarks.options import add_common, begin, block_size, listed, share
from mra_attention import make_plan, mra_attention, order_points
from mra_attention.layout import Tiles

INPUTS = {
    "field 64x64": (64, 64), "field 37x37 + 1": (37, 37), "video 8x24x24": (8, 24, 24),
    "china 53x80": (53, 80), "flower 53x80": (53, 80), "points 2-D": 2, "points 3-D": 3,
} | {f"vit {name} {H}x{W}": (H, W) for name, (*_, (H, W)) in vit.PHOTOGRAPHS.items()}  # fmt: skip
SHOWN = (*FORMS, *WEIGHTED_FORMS)
POINTS = 4096
PATCH = 8  # pixels a side
WIDTHS = (0.03, 0.06, 0.12, 0.24)


def parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks layout", description=__doc__)
    add = parser.add_argument
    add_common(parser)
    add("--input", type=listed(str, INPUTS), default=list(INPUTS))
    add("--heads", type=int, default=4)
    add("--head-dim", type=int, default=32)
    add("--density", type=listed(share), default=[1 / 16, 1 / 8])
    add("--block-size", type=block_size, default=(64, 64))
    add("--smooth", type=float, default=3.0, help="tokens that a neighbourhood reaches")
    add("--spread", type=float, default=2.0, help="standard deviation of the logits")
    return parser


def main(argv):
    args = parser().parse_args(argv[1:])
    device, result = begin("layout", args, argv)
    result["rows"] = []
    report.print_environment(result)
    report.say(
        "|o - exact| / |exact|, mean over heads: as it comes -> in patches or along the curve"
    )
    report.say(f"{'input':<22}{'density':>8}" + "".join(f"{form.name:>24}" for form in SHOWN))
    for name in args.input:
        generator = torch.Generator().manual_seed(args.seed)
        try:
            q, k, v, orders = inputs(name, args, generator, device)
        except Unsupported as error:
            result["rows"].append({"input": name, "status": "not supported", "reason": str(error)})
            report.say(f"{name:<22}not supported: {error}")
            continue
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        for density in args.density:
            for row in _rows(name, args, density, q, k, v, orders, exact):
                result["rows"].append(row)
            cells = _cells(result["rows"][-len(orders) :])
            report.say(f"{name:<22}{ratio(density):>8}" + "".join(f"{cell:>24}" for cell in cells))
    report.write_json(args.json, result)
    return result


def _rows(name, args, density, q, k, v, orders, exact):
    """A row for each order of an input's tokens."""
    for order, index, layout in orders:
        options = dict(density=density, block_size=args.block_size, layout=layout)
        x = [t if index is None else t.take_along_dim(index, 2) for t in (q, k, v)]
        wanted = exact if index is None else exact.take_along_dim(index, 2)
        plan = make_plan(*x[:2], **options, pool="even")
        row = {"input": name, "status": "ok", "reason": None, "N": q.shape[2], "order": order}
        row |= {"layout": layout, "density": density, "blocks": plan.nk}
        row |= {"exact_pairs": exact_pairs(plan), "overlap": overlap(plan.to_dense()), "errors": {}}
        for form in SHOWN:
            out = mra_attention(*x, **dataclasses.asdict(form), **options)
            error = (out - wanted).flatten(2).norm(dim=-1) / wanted.flatten(2).norm(dim=-1)
            row["errors"][form.name] = error.mean().item()
        yield row


def exact_pairs(plan):
    """Share of the pairs of tokens that are exact, mean over heads. Not quite the plan's density,
    which counts a block with few tokens as one."""
    tokens = torch.ones(plan.N, device=plan.device)
    if plan.layout is not None:
        (tokens,) = Tiles.of(plan.layout, plan.N, plan.block_size).to_blocks(tokens[None])
        tokens = tokens[0]
    queries, keys = (
        F.pad(tokens, (0, -len(tokens) % b)).unflatten(0, (-1, b)).sum(-1) for b in plan.block_size
    )
    pairs = (plan.to_dense() * queries[:, None] * keys).sum((-2, -1))
    return (pairs / (plan.N * plan.M)).mean().item()


def _cells(rows):
    return [" -> ".join(f"{row['errors'][form.name]:.3f}" for row in rows) for form in SHOWN]


def inputs(name, args, generator, device):
    """query, key, value (B, H, N, D) float32 and the orders to compare: [(name, index or None,
    layout or None)]."""
    H, D, sides = args.heads, args.head_dim, INPUTS[name]
    if name.startswith("vit"):
        qkv, _ = vit.encode(name.split()[1])
        orders = [("as it comes", None, None), ("patches", None, sides)]
    elif name.startswith("points"):
        points = torch.rand(1, POINTS, sides, generator=generator)
        qkv = nearby(points, H, D, generator)
        index = order_points(points)[:, None, :, None]
        orders = [("as it comes", None, None), ("curve", index.to(device), None)]
    else:
        if name.startswith(("field", "video")):
            x = field((4, H, D), sides, args.smooth, generator)
            if name.endswith("+ 1"):
                x = torch.cat([torch.randn(4, H, D, 1, generator=generator), x], -1)
            x = x.mT.unsqueeze(1)
        else:
            x = photograph(name.split()[0], sides) @ torch.randn(
                4, 1, H, 3 * PATCH**2, D, generator=generator
            )
        qkv = (*scaled(x[:2] + x[2], args.spread), x[3])
        orders = [("as it comes", None, None), ("patches", None, sides)]
    return *(x.float().contiguous().to(device) for x in qkv), orders


def field(sizes, sides, smooth, generator):
    """Gaussian fields of variance 1 over ``sides``: (*sizes, N). Larger than shown, so that no side
    continues on the opposite one."""
    full = [n + math.ceil(6 * smooth) for n in sides]
    dims = tuple(range(-len(full), 0))
    spectrum = torch.fft.fftn(torch.randn(*sizes, *full, generator=generator), dim=dims)
    for dim, n in zip(dims, full, strict=True):
        fall = (-2 * (math.pi * smooth * torch.fft.fftfreq(n)) ** 2).exp()
        spectrum = spectrum * fall.view(-1, *[1] * (-dim - 1))
    x = torch.fft.ifftn(spectrum, dim=dims).real
    x = x[(..., *(slice(n) for n in sides))].flatten(-len(full))
    return x / x.std()


def photograph(name, sides):
    """Patches of one of scikit-learn's photographs, in raster order: (N, 3 * PATCH**2)."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise Unsupported("photographs need: pip install scikit-learn pillow") from None
    image = torch.tensor(load_sample_image(f"{name}.jpg")).float()
    H, W = sides
    image = image[: H * PATCH, : W * PATCH].unflatten(1, (W, PATCH)).unflatten(0, (H, PATCH))
    patches = image.transpose(1, 2).reshape(H * W, -1)
    return (patches - patches.mean(0)) / patches.std(0)


def scaled(query_key, spread):
    """Query and key (2, B, H, N, D), each head scaled to logits of that standard deviation."""
    query, key = query_key
    logits = query @ key.mT / query.shape[-1] ** 0.5
    return query_key * (spread / logits.std((-2, -1), keepdim=True)).sqrt()


def nearby(points, heads, head_dim, generator):
    """q, k, v of points (1, N, d) with s q.k = -|p - p'|^2 / 2 w^2 up to a term of the query alone,
    which changes no weight; widths w by head."""
    centred, d = points - 0.5, points.shape[-1]
    width = torch.tensor([WIDTHS[h % len(WIDTHS)] for h in range(heads)]).view(1, heads, 1, 1)
    centred = centred.unsqueeze(1) / width * head_dim**0.25
    square = centred.square().sum(-1, keepdim=True)
    fill = (0, head_dim - d - 1)
    q = F.pad(torch.cat([centred, torch.ones_like(square)], -1), fill)
    k = F.pad(torch.cat([centred, -square / 2], -1), fill)
    waves = 12 * torch.randn(heads, d, head_dim, generator=generator)
    return q, k, (points.unsqueeze(1) @ waves).sin()
