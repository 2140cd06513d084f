"""MRA attention in the place of ``nn.MultiheadAttention``."""

import copy
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from . import calls
from ._constant import constant
from .config import MRAConfig, check_config, check_exact_below
from .exact import exact_attention, take_part
from .functional import make_plan, mra_attention, pad_head_dim
from .masks import additive_mask, check_mask, takes_part, weighs
from .unserved import REASONS, why_exact
from .weights import dense_weights

__all__ = ["MRAMultiheadAttention", "stats"]


class MRAMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with multi-resolution attention inside.

    Constructor and forward are those of ``nn.MultiheadAttention``, plus ``config`` and
    ``exact_below``; parameters and state_dict are the same.

    exact_below: calls with fewer keys than this compute exact attention, which is faster on short
        input. None: never; an int; or "auto": the number that :mod:`mra_attention.crossover`
        measures, once for each device, dtype, head_dim and config.

    Differences:

    - A float ``key_padding_mask`` says 0 (takes part) or -inf (anything up to -1e4 counts as that).
      Other values are a bias on the scores: exact attention, as ``attn_mask`` below. On a GPU
      looking would wait for the device, so there they are a device-side assertion (inside a
      compiled program, unseen): give a bias as ``attn_mask``.
    - A query without any key to see gives the bias of ``out_proj``, not NaN.
    - ``need_weights=True`` computes the dense matrix that the approximation stands for, so that
      weights @ value is the output: O(N * M) memory. Its rows sum to 1; with ``order=1`` single
      weights can be negative.
    - ``is_causal=True`` alone is enough for causal attention; with ``attn_mask`` it is, as ever,
      the promise that this mask is the causal one.
    - Any other ``attn_mask``, ``add_bias_kv`` and ``add_zero_attn`` have no block structure: these
      calls compute exact attention. ``exact_calls`` counts the exact calls of this module (eager
      ones; inside a compiled program nothing is counted), :func:`stats` those of all modules, with
      the reasons.
    - ``config.layout`` holds for self-attention of as many tokens as it has, or more. Others
      (cross-attention, causal attention, fewer tokens) are exact in the same way; so is causal
      attention with ``config.pool`` "sampled".
    - ``dropout`` isn't applied to the weights of MRA attention; training with a nonzero value warns
      once. (Exact calls apply it.)
    - head_dim needn't be a multiple of 8; others are padded with zeros.
    - Nested tensors are accepted, and give a nested result.
    - ``torch.jit.script`` doesn't take it; ``torch.compile`` and ``torch.export`` do, and
      ``torch.jit.trace`` where no weights are asked for.

    Raises TypeError or ValueError for a wrong config or exact_below.
    """

    def __init__(
        self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False,
        kdim=None, vdim=None, batch_first=False, device=None, dtype=None, config=MRAConfig(),  # noqa: B008
        exact_below=None,
    ):  # fmt: skip
        check_config(config)
        check_exact_below(exact_below)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.config = config
        self.exact_below = exact_below
        self.exact_calls = 0
        self._warned_dropout = False

    def _reset_parameters(self):
        # With this flag set, nn.TransformerEncoderLayer computes attention from our parameters in
        # a fused layer of its own and never calls forward. Only the base class's initialisation
        # may see the true layout.
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def __setstate__(self, state):
        super().__setstate__(state)
        self._qkv_same_embed_dim = False

    @classmethod
    def from_mha(cls, mha, config=MRAConfig(), exact_below=None):  # noqa: B008
        """This attention on the very parameters, submodules and hooks of ``mha``."""
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha: got {type(mha).__name__}, expected an nn.MultiheadAttention")
        check_config(config)
        check_exact_below(exact_below)
        new = cls.__new__(cls)
        # Copies of the dicts that hold parameters, modules and hooks; what they hold is shared.
        for name, value in vars(mha).items():
            new.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
        new._qkv_same_embed_dim = False
        new.config = config
        new.exact_below = exact_below
        new.exact_calls = 0
        new._warned_dropout = False
        return new

    def extra_repr(self):
        exact = "" if self.exact_below is None else f", exact_below={self.exact_below!r}"
        return (
            f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, {self.config}"
            f"{exact}"
        )

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        """As ``nn.MultiheadAttention.forward``: (output, weights or None). See the class.

        Raises TypeError or ValueError that names the argument."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None:
                raise ValueError(
                    "key_padding_mask, attn_mask: got a mask beside a nested tensor, expected none"
                )
            return self._forward_nested(
                query, key, value, need_weights, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or not key.dim() == value.dim() == query.dim():
            raise ValueError(
                f"query, key, value: got {query.dim()}, {key.dim()} and {value.dim()} dimensions, "
                "expected 3 each, or 2 each for input without a batch"
            )
        if not batched:
            at = 0 if self.batch_first else 1
            # One object stays one object: the projection is then one product.
            key_is_query, value_is_key = key is query, value is key
            query = query.unsqueeze(at)
            key = query if key_is_query else key.unsqueeze(at)
            value = key if value_is_key else value.unsqueeze(at)
            if isinstance(key_padding_mask, torch.Tensor):
                key_padding_mask = key_padding_mask.unsqueeze(0)
        out, weights = self._attend(
            query, key, value, self.batch_first, key_padding_mask, attn_mask, is_causal,
            need_weights,
        )  # fmt: skip
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _attend(
        self, query, key, value, batch_first, key_padding_mask, attn_mask, is_causal, need_weights,
        query_mask=None,
    ):  # fmt: skip
        self._check_shapes(query, key, value, batch_first)
        q, k, v = (self._heads(x, batch_first) for x in self._project(query, key, value))
        N, M = q.shape[2], k.shape[2]
        check_mask("key_padding_mask", key_padding_mask, ((q.shape[0], M),))
        check_mask("attn_mask", attn_mask, ((N, M), (q.shape[0] * q.shape[1], N, M)))
        if is_causal and attn_mask is None and N != M:
            raise ValueError(
                f"is_causal: got True with {N} queries and {M} keys, expected as many keys as "
                "queries, or an attn_mask"
            )
        reason = self._why_exact(q, k, key_padding_mask, attn_mask, is_causal)
        calls.count("MRAMultiheadAttention", reason)
        if reason is not None and not torch.compiler.is_compiling():
            self.exact_calls += 1  # a counter that a graph reads would recompile it
        if reason is None or reason in REASONS:
            attend = self._approximate if reason is None else self._short
            key_mask = takes_part(key_padding_mask)
            out, weights = attend(q, k, v, key_mask, query_mask, is_causal, need_weights)
        else:
            mask = additive_mask(q, M, key_padding_mask, attn_mask, is_causal)
            out, weights = self._exact(q, k, v, mask, need_weights)
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        return self.out_proj(out.permute(order).flatten(2)), weights

    def _why_exact(self, q, k, key_padding_mask, attn_mask, is_causal):
        """Why this call runs as exact attention, in a word or two; None: as MRA attention."""
        if attn_mask is not None and (not is_causal or q.shape[2] != k.shape[2]):
            return "attn_mask"
        if self.bias_k is not None:
            return "add_bias_kv"
        if self.add_zero_attn:
            return "add_zero_attn"
        if k.shape[2] == 0:
            return "no keys"
        if weighs(key_padding_mask):
            return "key_padding_mask"
        return why_exact(self.config, self.exact_below, q, k, is_causal)

    def _approximate(self, q, k, v, key_mask, query_mask, is_causal, need_weights):
        if self.training and self.dropout > 0 and not self._warned_dropout:
            _warn_dropout()
            if not torch.compiler.is_compiling():  # changing it would recompile once more
                self._warned_dropout = True
        D = self.head_dim
        q, k, v = pad_head_dim(q, k, v)
        kwargs = dict(config=self.config, is_causal=is_causal, scale=D**-0.5)
        weights = None
        if need_weights:
            kwargs["plan"] = make_plan(q, k, key_mask, query_mask, **kwargs)
            weights = dense_weights(q, k, key_mask, query_mask, **kwargs)
        out = mra_attention(q, k, v, key_mask, query_mask, **kwargs)
        return out[..., :D], weights

    def _short(self, q, k, v, key_mask, query_mask, is_causal, need_weights):
        """Exact attention that means what :meth:`_approximate` does."""
        return exact_attention(
            q, k, v, take_part(key_mask, query_mask), is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0, need_weights=need_weights,
        )  # fmt: skip

    def _exact(self, q, k, v, mask, need_weights):
        """Exact attention; mask: float, broadcasts to (B, H, N, M), or None."""
        H, D, extra = self.num_heads, self.head_dim, 0
        if self.bias_k is not None:
            k, v = (
                torch.cat([x, b.view(1, H, 1, D).expand(len(x), -1, -1, -1)], 2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        if self.add_zero_attn:
            k, v, extra = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), extra + 1
        if mask is not None:
            mask = F.pad(mask, (0, extra))
        dropout = self.dropout if self.training else 0.0
        return exact_attention(q, k, v, mask, dropout=dropout, need_weights=need_weights)

    def _check_shapes(self, query, key, value, batch_first):
        """Three dimensions each: what the projections and exact attention would broadcast."""
        sizes = (("query", self.embed_dim), ("key", self.kdim), ("value", self.vdim))
        for (name, size), x in zip(sizes, (query, key, value), strict=True):
            if x.shape[-1] != size:
                raise ValueError(f"{name}: got {x.shape[-1]} features, expected {size}")
        at = 0 if batch_first else 1
        if key.shape[at] != query.shape[at]:
            raise ValueError(
                f"key: got batch size {key.shape[at]}, expected that of query, {query.shape[at]}"
            )
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"value: got shape {tuple(value.shape)}, expected batch and length of key, "
                f"{tuple(key.shape)}"
            )

    def _project(self, query, key, value):
        E, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            q_bias, kv_bias = (None, None) if bias is None else bias.split([E, 2 * E])
            q_weight, kv_weight = weight.split([E, 2 * E])
            k, v = F.linear(key, kv_weight, kv_bias).chunk(2, -1)
            return F.linear(query, q_weight, q_bias), k, v
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def _heads(self, x, batch_first):
        """(B, L, E) or (L, B, E) to (B, H, L, D), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _forward_nested(self, query, key, value, need_weights, average_attn_weights, is_causal):
        padded = {}
        for x in (query, key, value):
            if not x.is_nested:
                raise ValueError("query, key, value: got nested and dense, expected one kind")
            if id(x) not in padded:
                lengths = _lengths(x)
                dense = x.to_padded_tensor(0.0)
                at = torch.arange(dense.shape[1], device=x.device)
                padded[id(x)] = dense, lengths, at < lengths.to(x.device).unsqueeze(1)
        (q, lengths, query_mask), (k, key_lengths, key_mask), (v, value_lengths, _) = (
            padded[id(x)] for x in (query, key, value)
        )
        if not torch.equal(value_lengths, key_lengths):
            raise ValueError(
                f"value: got lengths {value_lengths.tolist()}, expected those of key, "
                f"{key_lengths.tolist()}"
            )
        out, weights = self._attend(
            q, k, v, True, ~key_mask, None, is_causal, need_weights, query_mask
        )
        rows = [x[:n] for x, n in zip(out, lengths.tolist(), strict=True)]
        if query.layout == torch.jagged:  # by its offsets: only then may it be added to the query
            out = torch.nested.nested_tensor_from_jagged(torch.cat(rows), query.offsets())
        else:
            out = torch.nested.as_nested_tensor(rows, layout=query.layout)
        return out, weights.mean(1) if need_weights and average_attn_weights else weights


def stats(reset=False):
    """Calls of all :class:`MRAMultiheadAttention` so far: a dict of "mra" and, for exact ones,
    "exact: <reason>".

    Counts eager calls; a compiled program counts when it is traced."""
    return calls.stats("MRAMultiheadAttention", reset)


@constant  # while a program is traced: run once, leave no trace
def _warn_dropout():
    warnings.warn("dropout: isn't applied to the weights of MRA attention", stacklevel=3)


def _lengths(nested):
    """Lengths of the rows of a nested (B, *, E) tensor, int64 (B,)."""
    if nested.layout == torch.jagged:
        return nested.offsets().diff()
    if nested.size(0) == 0:  # has no dimension but this one
        raise ValueError(
            "query, key, value: got a nested tensor without a sequence, expected at least one"
        )
    return nested._nested_tensor_size()[:, 0]
