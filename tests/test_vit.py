"""The vision transformer of ``python -m benchmarks layout``: its weight file, its encoder, and that
its photographs need no layout where everything is exact."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import layout, vit  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import Unsupported  # noqa: E402

WIDTH, LAYERS = 48, 2


def varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number, value):
    """Of a protobuf message: an integer, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_model(path, weights, packed):
    """An ONNX file of these initializers, and a few fields that a reader has to pass over."""
    tensors = []
    for name, t in weights.items():
        sizes = [field(1, size) for size in t.shape]
        if packed:
            sizes = [field(1, b"".join(map(varint, t.shape)))]
        kind = {torch.float32: 1, torch.int64: 7}[t.dtype]
        data = bytes(t.flatten().contiguous().view(torch.uint8).tolist())
        parts = [*sizes, field(2, kind), field(8, name.encode()), field(9, data)]
        tensors.append(field(5, b"".join(parts)))
    fixed = varint(3 << 3 | 5) + struct.pack("<f", 1.0) + varint(4 << 3 | 1) + struct.pack("<d", 2)
    graph = field(2, b"main") + b"".join(tensors)
    path.write_bytes(field(1, 300) + fixed + field(7, graph) + field(2, b"exporter"))


def model_weights(side=5):
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(name, *sizes):
        weights[name] = 0.2 * torch.randn(*sizes, generator=generator)

    add("backbone.embeddings.cls_token", 1, 1, WIDTH)
    add("backbone.embeddings.patch_embeddings.projection.weight", WIDTH, 3, 14, 14)
    add("backbone.embeddings.patch_embeddings.projection.bias", WIDTH)
    for n in range(LAYERS):
        at = f"backbone.encoder.layer.{n}."
        names = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc2.bias",
                 "layer_scale1.lambda1", "layer_scale2.lambda1",
                 "attention.output.dense.bias"]  # fmt: skip
        names += [f"attention.attention.{name}.bias" for name in ("query", "key", "value")]
        for name in names:
            add(at + name, WIDTH)
        add(at + "mlp.fc1.bias", 4 * WIDTH)
    add("backbone.layernorm.weight", WIDTH)
    add("backbone.layernorm.bias", WIDTH)
    add("decoder.weight", 3)
    add("onnx::Concat_1", 1, 1, WIDTH)
    add("onnx::Reshape_2", 1, side**2, WIDTH)
    for n in range(LAYERS):
        for at, sizes in enumerate(4 * [(WIDTH, WIDTH)] + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]):
            add(f"onnx::MatMul_{10 * n + at + 3}", *sizes)
    return weights


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_read(tmp_path, packed):
    weights = model_weights() | {"count": torch.arange(3)}
    write_model(tmp_path / "model.onnx", weights, packed)
    found = vit.read_weights(tmp_path / "model.onnx")
    assert list(found) == [name for name in weights if name != "count"]  # floats alone
    for name, t in found.items():
        assert torch.equal(t, weights[name])


def test_encoder():
    model = vit.Model(model_weights())
    assert model.layers == LAYERS
    picture = torch.randn(1, 3, 14 * 5, 14 * 5)
    qkv = model.qkv(picture)
    assert len(qkv) == LAYERS and all(t.shape == (1, 6, 26, 8) for layer in qkv for t in layer)
    # By hand: the first layer's queries.
    w = model.weights
    patches = torch.nn.functional.unfold(picture, 14, stride=14).mT
    x = patches @ w["embeddings.patch_embeddings.projection.weight"].flatten(1).T
    x = x + w["embeddings.patch_embeddings.projection.bias"] + w["onnx::Reshape_2"]
    x = torch.cat([w["embeddings.cls_token"] + w["onnx::Concat_1"], x], 1)
    at = "encoder.layer.0."
    h = torch.nn.functional.layer_norm(
        x, (WIDTH,), w[at + "norm1.weight"], w[at + "norm1.bias"], 1e-6
    )
    for t, matrix, name in zip(qkv[0], (5, 3, 4), ("query", "key", "value"), strict=True):
        wanted = h @ w[f"onnx::MatMul_{matrix}"] + w[f"{at}attention.attention.{name}.bias"]
        torch.testing.assert_close(t.transpose(1, 2).flatten(2), wanted, rtol=1e-4, atol=1e-4)
    assert model.hidden(torch.randn(1, 3, 14 * 3, 14 * 7)).shape == (1, 22, WIDTH)  # other sides


def test_errors_of_a_photograph(tmp_path, monkeypatch):
    """As vit.py gives it, odd sides and a class token: none at density 1, with and without a
    layout, and a layout errs less where neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    x = layout.field((4, 2, 3, 16), (21, 33), 3.0, generator)
    x = torch.cat([torch.randn(4, 2, 3, 16, 1, generator=generator), x], -1).mT
    qkv = torch.stack([2 * (x[0] + x[2]), 2 * (x[1] + x[2]), x[3]]).float()
    monkeypatch.setattr(vit, "encode", lambda name: (qkv, (21, 33)))
    monkeypatch.setitem(layout.INPUTS, "vit china 37x55", (21, 33))
    file = tmp_path / "layout.json"
    main(["layout", "--device", "cpu", "--input", "vit china 37x55", "--density", "1/4,1",
          "--block-size", "32", "--json", str(file)])  # fmt: skip
    plain, tiled, *whole = json.loads(file.read_text())["rows"]
    assert (plain["N"], plain["layout"], tiled["layout"]) == (694, None, [21, 33])
    assert all(error < 1e-5 for row in whole for error in row["errors"].values())
    assert set(plain["errors"]) == {form.name for form in layout.SHOWN}
    for form in ("block", "row", "row + order 1", "row + order 1, centred"):
        assert tiled["errors"][form] < 0.8 * plain["errors"][form]


def test_what_is_missing_is_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(vit.PHOTOGRAPHS, "china", ("no_such_package", "x.jpg", (37, 55)))
    monkeypatch.setitem(vit.PIP, "no_such_package", "no-such-package")
    with pytest.raises(Unsupported, match="pip install --no-deps no-such-package"):
        vit.encode("china")
    main(["layout", "--device", "cpu", "--input", "vit china 37x55"])
    assert "not supported: needs: pip install" in capsys.readouterr().out


def test_real_photographs():
    for name in vit.PHOTOGRAPHS:
        try:
            qkv, (H, W) = vit.encode(name)
        except Unsupported as missing:
            pytest.skip(f"{name} {missing}")
        assert qkv.shape == (3, 12, 6, 1 + H * W, 64) and H % 2 and W % 2
        assert 1 < ((qkv[0] @ qkv[1].mT) / 8).std((-2, -1)).mean() < 10
