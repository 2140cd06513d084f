"""Whisper's inputs of the benchmarks: the weight file, sound, the encoder."""

import json
import math
import struct
import sys
import wave
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import whisper  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import Unsupported  # noqa: E402

KINDS = {dtype: at for at, dtype in enumerate(whisper.DTYPES)}


def write_model(path, weights):
    """A model.bin as CTranslate2 writes it."""

    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(weights))]
    for name, t in weights.items():
        data = bytes(t.flatten().view(torch.uint8).tolist())
        parts += [text(name), struct.pack(f"<B{t.dim()}I", t.dim(), *t.shape)]
        parts += [struct.pack("<BI", KINDS[t.dtype], len(data)), data]
    path.write_bytes(b"".join(parts) + struct.pack("<I", 0))


def encoder_weights(width=12, layers=2, positions=50):
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(name, *sizes):
        weights["encoder/" + name] = (0.3 * torch.randn(*sizes, generator=generator)).half()

    def linear(name, inside, outside):
        add(name + "/weight", outside, inside)
        add(name + "/bias", outside)

    def norm(name):
        add(name + "/gamma", width)
        add(name + "/beta", width)

    for name, inside in (("conv1", 80), ("conv2", width)):
        add(name + "/weight", width, inside, 3)
        add(name + "/bias", width)
    add("position_encodings/encodings", positions, width)
    norm("layer_norm")
    for n in range(layers):
        norm(f"layer_{n}/self_attention/layer_norm")
        linear(f"layer_{n}/self_attention/linear_0", width, 3 * width)
        linear(f"layer_{n}/self_attention/linear_1", width, width)
        norm(f"layer_{n}/ffn/layer_norm")
        linear(f"layer_{n}/ffn/linear_0", width, 2 * width)
        linear(f"layer_{n}/ffn/linear_1", 2 * width, width)
    return weights


def write_wav(path, samples, rate, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes((32767 * samples).to(torch.int16).view(torch.uint8).tolist()))


def tone(hertz, rate, seconds):
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(rate * seconds)) / rate)


def test_weights_are_read(tmp_path):
    file = tmp_path / "model.bin"
    plain, scaled = torch.randn(3, 4).half(), torch.tensor([[10, -20], [30, 40]], dtype=torch.int8)
    scale = torch.tensor([10.0, 4.0])
    write_model(file, {"a/weight": plain, "b/weight": scaled, "b/weight_scale": scale,
                       "n": torch.tensor(6, dtype=torch.int16)})  # fmt: skip
    weights = whisper.read_weights(file)
    assert set(weights) == {"a/weight", "b/weight", "n"} and weights["n"] == 6
    assert torch.equal(weights["a/weight"], plain)
    assert weights["b/weight"].tolist() == [[1.0, -2.0], [7.5, 10.0]]


def test_encoder_attends_as_it_should(tmp_path, monkeypatch):
    file = tmp_path / "model.bin"
    write_model(file, encoder_weights() | {"decoder/layer_norm/gamma": torch.ones(2).half()})
    encoder = whisper.Encoder(whisper.read_weights(file))
    mel = torch.randn(2, 80, 40)
    monkeypatch.setattr(encoder, "heads", 3)
    layers = encoder.qkv(mel)
    assert encoder.layers == len(layers) == 2
    assert all(t.shape == (2, 3, 20, 4) for qkv in layers for t in qkv)
    zeros = encoder.hidden(mel, lambda q, k, v: torch.zeros_like(q))
    assert zeros.shape == (2, 20, 12) and not torch.allclose(zeros, encoder.hidden(mel))
    q, k, v = layers[0]  # of the first layer: projections of normed input
    w = encoder.weights
    x = torch.nn.functional.gelu(
        torch.nn.functional.conv1d(mel, w["conv1/weight"], w["conv1/bias"], padding=1)
    )
    x = torch.nn.functional.conv1d(x, w["conv2/weight"], w["conv2/bias"], stride=2, padding=1)
    x = torch.nn.functional.gelu(x).mT + w["position_encodings/encodings"][:20]
    at = "layer_0/self_attention/"
    x = torch.nn.functional.layer_norm(
        x, (12,), w[at + "layer_norm/gamma"], w[at + "layer_norm/beta"]
    )
    x = x @ w[at + "linear_0/weight"].mT + w[at + "linear_0/bias"]
    torch.testing.assert_close(k[1, 2], x[1, :, 12 + 8 : 12 + 12])
    torch.testing.assert_close(v[0, 0], x[0, :, 24:28])


def test_sound_is_read_and_resampled(tmp_path):
    file = tmp_path / "a.wav"
    write_wav(file, tone(440, 8000, 1).repeat_interleave(2), 8000, channels=2)
    samples = whisper.read_wav(file)
    assert samples.shape == (16000,)
    torch.testing.assert_close(samples, tone(440, 16000, 1), atol=1e-3, rtol=0)


def test_speech_is_cut_into_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(whisper, "SECONDS", 1)
    (tmp_path / "sub").mkdir()
    write_wav(tmp_path / "short.wav", tone(300, 16000, 0.5), 16000)
    write_wav(tmp_path / "sub" / "long.wav", tone(440, 16000, 1.75), 16000)
    windows = whisper.speech(tmp_path, 2)
    assert windows.shape == (2, 16000)
    both = torch.cat([tone(440, 16000, 1.75), tone(300, 16000, 0.5)])  # the longer one first
    torch.testing.assert_close(windows.flatten(), both[:32000], atol=1e-4, rtol=0)
    with pytest.raises(Unsupported, match="2 wav files lack 1 s of 3 windows"):
        whisper.speech(tmp_path, 3)


def test_mel_of_a_tone():
    mel = whisper.log_mel(tone(1000, 16000, 1)[None])
    assert mel.shape == (1, 80, 100)
    assert mel.amax() - mel.amin() <= 2 + 1e-5  # 8 decades over 4
    loudest = mel[0, :, 50].argmax().item()
    bands = whisper.mel_bands()
    assert bands.shape == (80, 201) and bands[loudest].argmax() * 40 == pytest.approx(1000, abs=40)
    areas = bands[40:].sum(-1) * 40  # wide ones, whose triangles the bins resolve
    torch.testing.assert_close(areas, torch.ones(40), atol=0.15, rtol=0)


def test_mel_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    sound = tone(700, 16000, 30) + 0.01 * torch.randn(480000)
    theirs = transformers.WhisperFeatureExtractor()(
        sound.numpy(), sampling_rate=16000, return_tensors="pt"
    )
    ours = whisper.log_mel(sound[None])
    torch.testing.assert_close(ours, theirs.input_features, atol=1e-3, rtol=0)


def test_command_writes_what_accuracy_reads(tmp_path, monkeypatch, capsys):
    package = tmp_path / "package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    write_model(package / "model" / "model.bin", encoder_weights(width=48, layers=4))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(whisper, "PACKAGE", "package")
    monkeypatch.setattr(whisper, "SECONDS", 1)
    folder, file, path = tmp_path / "speech", tmp_path / "qkv.pt", tmp_path / "x.json"
    folder.mkdir()
    write_wav(folder / "a.wav", tone(500, 8000, 2), 8000)
    main(["whisper", str(file), "--speech", str(folder), "--windows", "2"])
    assert torch.load(file).shape == (3, 8, 6, 50, 8)
    options = ["accuracy", "--device", "cpu", "--inputs", "whisper", "--kind", "mra", "--no-time"]
    reports = []
    for source in (["--whisper-file", str(file)], ["--speech", str(folder)]):
        main([*options, *source, "--windows", "2", "--json", str(path)])
        assert str(tmp_path) not in path.read_text()
        reports.append(json.loads(path.read_text())["inputs"])
    assert reports[0] == reports[1] and reports[0][0]["shape"] == [8, 6, 50, 8]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(whisper, "PACKAGE", "not_a_package_of_anyone")
    with pytest.raises(SystemExit, match="pip install not-a-package-of-anyone"):
        main(["whisper", str(tmp_path / "x.pt"), "--speech", str(tmp_path)])
