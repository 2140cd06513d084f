"""MRA attention in the place of ``nn.MultiheadAttention``."""

import copy
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from . import reference
from .config import MRAConfig, check_config
from .functional import make_plan, mra_attention, pad_head_dim

__all__ = ["MRAMultiheadAttention", "replace_attention"]

# A float key_padding_mask is 0 or -inf; finite stand-ins for -inf are this or less.
MASKED = -1e4


class MRAMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with multi-resolution attention inside.

    Constructor and forward are those of ``nn.MultiheadAttention``, plus ``config``; parameters and
    state_dict are the same. Differences:

    - A float ``key_padding_mask`` says 0 (takes part) or -inf (anything up to -1e4 counts as that).
      Other values are refused on the CPU; elsewhere looking would wait for the device, and keys
      with them take part unweighed. A bias on the scores belongs in ``attn_mask``.
    - A query without any key to see gives the bias of ``out_proj``, not NaN.
    - ``need_weights=True`` computes the dense matrix that the approximation stands for, so that
      weights @ value is the output: O(N * M) memory. Its rows sum to 1; with ``order=1`` single
      weights can be negative.
    - ``is_causal=True`` alone is enough for causal attention; with ``attn_mask`` it is, as ever,
      the promise that this mask is the causal one.
    - Any other ``attn_mask``, ``add_bias_kv`` and ``add_zero_attn`` have no block structure: these
      calls compute exact attention, and ``exact_calls`` counts them (eager calls; inside a
      compiled program nothing is counted).
    - ``dropout`` isn't applied to the weights of MRA attention; training with a nonzero value warns
      once. (Exact calls apply it.)
    - head_dim needn't be a multiple of 8; others are padded with zeros.
    - Nested tensors are accepted, and give a nested result.
    """

    def __init__(
        self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False,
        kdim=None, vdim=None, batch_first=False, device=None, dtype=None, config=MRAConfig(),  # noqa: B008
    ):  # fmt: skip
        check_config(config)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.config = config
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
    def from_mha(cls, mha, config=MRAConfig()):  # noqa: B008
        """This attention on the very parameters, submodules and hooks of ``mha``."""
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha: got {type(mha).__name__}, expected an nn.MultiheadAttention")
        check_config(config)
        new = cls.__new__(cls)
        # Copies of the dicts that hold parameters, modules and hooks; what they hold is shared.
        for name, value in vars(mha).items():
            new.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
        new._qkv_same_embed_dim = False
        new.config = config
        new.exact_calls = 0
        new._warned_dropout = False
        return new

    def extra_repr(self):
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, {self.config}"

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        """As ``nn.MultiheadAttention.forward``: (output, weights or None). See the class.

        Raises TypeError or ValueError that names the argument."""
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
            if key_padding_mask is not None:
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
        q, k, v = (self._heads(x, batch_first) for x in self._project(query, key, value))
        N, M = q.shape[2], k.shape[2]
        _check_mask("key_padding_mask", key_padding_mask, ((q.shape[0], M),))
        _check_mask("attn_mask", attn_mask, ((N, M), (q.shape[0] * q.shape[1], N, M)))
        if (
            (attn_mask is not None and (not is_causal or N != M))
            or self.bias_k is not None
            or self.add_zero_attn
        ):
            if not torch.compiler.is_compiling():  # a counter that a graph reads recompiles it
                self.exact_calls += 1
            mask = _additive_mask(q, M, key_padding_mask, attn_mask, is_causal)
            out, weights = self._exact(q, k, v, mask, need_weights)
        else:
            key_mask = _takes_part(key_padding_mask)
            out, weights = self._approximate(q, k, v, key_mask, query_mask, is_causal, need_weights)
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        return self.out_proj(out.permute(order).flatten(2)), weights

    def _approximate(self, q, k, v, key_mask, query_mask, is_causal, need_weights):
        if self.training and self.dropout > 0 and not self._warned_dropout:
            _warn_dropout()
            if not torch.compiler.is_compiling():  # changing it would recompile once more
                self._warned_dropout = True
        D = q.shape[-1]
        q, k, v = pad_head_dim(q, k, v)
        kwargs = dict(config=self.config, is_causal=is_causal, scale=D**-0.5)
        weights = None
        if need_weights:
            kwargs["plan"] = make_plan(q, k, key_mask, query_mask, **kwargs)
            weights = _dense_weights(q, k, key_mask, query_mask, **kwargs)
        out = mra_attention(q, k, v, key_mask, query_mask, **kwargs)
        return out[..., :D], weights

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
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        logits = (q * D**-0.5) @ k.mT
        weights = (logits if mask is None else logits + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        return weights @ v, weights

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
        (q, lengths, query_mask), (k, _, key_mask), (v, _, _) = (
            padded[id(x)] for x in (query, key, value)
        )
        out, weights = self._attend(
            q, k, v, True, ~key_mask, None, is_causal, need_weights, query_mask
        )
        rows = [x[:n] for x, n in zip(out, lengths.tolist(), strict=True)]
        out = torch.nested.as_nested_tensor(rows, layout=query.layout)
        return out, weights.mean(1) if need_weights and average_attn_weights else weights


def replace_attention(model, config=MRAConfig(), filter=None):  # noqa: B008
    """Puts MRA attention in the place of every ``nn.MultiheadAttention`` inside ``model``.

    The replacements share the parameters; those that are MRA attention already get ``config``.
    Subclasses with a forward of their own, and parametrized modules, stay as they are. Encoders of
    ``nn.TransformerEncoder`` with such attention inside stop converting padded input to nested
    tensors. Changes ``model``.

    filter: None, or a function of a module's name in ``model`` ("encoder.layers.0.self_attn") and
        the module that says which to change. A module with several names is asked for by each.

    Returns how many modules now attend with ``config``. Raises TypeError for a wrong model, config
    or filter, ValueError when ``model`` is itself an ``nn.MultiheadAttention``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    check_config(config)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: got {type(filter).__name__}, expected a function or None")
    if _is_plain(model):
        raise ValueError(
            "model: is itself an nn.MultiheadAttention, which can't be changed in place; use "
            "MRAMultiheadAttention.from_mha(model, config)"
        )
    made, configured = {}, set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        ours = isinstance(module, MRAMultiheadAttention)
        if not (ours or _is_plain(module)) or (filter is not None and not filter(name, module)):
            continue
        if ours:
            module.config = config
            configured.add(module)
            continue
        if module not in made:
            made[module] = MRAMultiheadAttention.from_mha(module, config)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inner, MRAMultiheadAttention) for inner in module.modules()
        ):
            module.use_nested_tensor = False
    return len(made) + len(configured)


def _is_plain(module):
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and not nn.utils.parametrize.is_parametrized(module)
    )


@torch.compiler.assume_constant_result  # while a program is traced: run once, leave no trace
def _warn_dropout():
    warnings.warn("dropout: isn't applied to the weights of MRA attention", stacklevel=3)


def _check_mask(name, mask, shapes):
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or not (
        mask.dtype == torch.bool or mask.is_floating_point()
    ):
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"{name}: got {kind}, expected a bool or floating tensor")
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}"
        )


def _takes_part(key_padding_mask):
    """nn's mask (True or -inf: ignore) as ours (True: takes part)."""
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    takes_part = key_padding_mask > MASKED
    # Looked at only where that costs no wait: an eager tensor on the CPU.
    eager = type(key_padding_mask) is torch.Tensor and not torch.compiler.is_compiling()
    if eager and key_padding_mask.device.type == "cpu":
        if (takes_part & (key_padding_mask != 0)).any():
            raise ValueError(
                "key_padding_mask: got values other than 0 and -inf, expected a bool mask or these "
                "two; a bias on the scores belongs in attn_mask"
            )
    return takes_part


def _additive_mask(q, M, key_padding_mask, attn_mask, is_causal):
    """nn's masks as one float mask that broadcasts to (B, H, N, M); None without any."""
    if attn_mask is None and is_causal:
        attn_mask = torch.ones(q.shape[2], M, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    total = None
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        mask = mask.to(q.dtype)
        total = mask if total is None else total + mask
    return total


def _dense_weights(q, k, key_mask, query_mask, *, config, is_causal, scale, plan):
    """The matrix W (B, H, N, M) with W @ value = MRA attention, in the dtype of q.

    Exact pairs weigh e^{s q_i.k_j} / Z_i; a key of a coarse block weighs e^{b_iy} / (c_y Z_i), its
    share of the block. Order 1 adds P_i gamma_i s q_i.(k_j - k~_y) / n to every key that the
    coarse part may see, which moves weight inside blocks and sums to zero.
    """
    N, M = q.shape[2], k.shape[2]
    bq, bk = plan.block_size
    x, y = torch.arange(N, device=q.device) // bq, torch.arange(M, device=q.device) // bk
    q_mean, _ = reference.pool(q, query_mask, bq)
    k_mean, k_count = reference.pool(k, key_mask, bk)
    valid = reference._or_ones(key_mask, q, M)[:, None, None, :]
    past = reference._past((plan.nq, plan.nk), bq, bk, is_causal, q.device)
    exact = plan.to_dense()[:, :, x]  # (B, H, N, nk)
    L = scale * q_mean @ k_mean.mT
    b = reference.coarse(config.coarse, scale, q, k_mean, L, k_count, past[x] & ~exact, x)
    b = b - k_count.clamp(min=1).to(b.dtype).log()[:, None, None, :]  # of one key of the block
    a = (scale * q @ k.mT).to(b.dtype)
    live = exact[..., y] & valid
    if is_causal:
        live = live & torch.ones(N, M, dtype=torch.bool, device=q.device).tril()
    logits = torch.where(live, a, b[..., y].masked_fill(exact[..., y] | ~valid, -torch.inf))
    if query_mask is not None:
        logits = logits.masked_fill(~query_mask[:, None, :, None], -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if config.order == 1 and config.coarse != "none":
        seen = past[x][:, y] & valid
        share = weights.masked_fill(exact[..., y], 0).sum(-1, keepdim=True)
        inside = (a - (scale * q @ k_mean.mT.to(q.dtype)).to(a.dtype)[..., y]).masked_fill(~seen, 0)
        n = seen.sum(-1, keepdim=True).clamp(min=1)
        # s^2 q Sigma q^T is the mean square of `inside`.
        gamma = 1 / (1 + (inside * inside).sum(-1, keepdim=True) / n / 4)
        weights = weights + share * gamma * inside / n
    return weights.to(q.dtype)


def _lengths(nested):
    """Lengths of the rows of a nested (B, *, E) tensor, int64 (B,)."""
    if nested.layout == torch.jagged:
        return nested.offsets().diff()
    return nested._nested_tensor_size()[:, 0]
