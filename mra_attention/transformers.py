"""Hugging Face transformers: ``attn_implementation="mra"``, and its own MraModel made right.

    import mra_attention
    mra_attention.transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="mra")

Works with models that use transformers' attention interface, which :func:`coverage` tells. Imports
transformers when called.
"""

import functools

import torch
from torch.nn import functional as F

from . import calls
from .config import MRAConfig, check_config, check_exact_below
from .coverage import coverage
from .exact import exact_attention, take_part
from .functional import mra_attention, pad_head_dim
from .unserved import why_exact

__all__ = ["coverage", "patch_mra_model", "register", "stats"]


def register(name="mra", config=MRAConfig(), exact_below=None):  # noqa: B008
    """Registers MRA attention and its mask function under ``name``.

    Plain bidirectional and plain causal attention run as MRA, with or without padding. What has no
    block form runs as exact attention and is counted in :func:`stats`: 4-D masks (packed sequences,
    prefill behind a cache), sliding windows, position biases, softcap, attention sinks, a single
    query. No attention weights are returned, and dropout
    of them isn't applied (exact calls apply it); a model that trains with it warns once.
    ``exact_below`` (None, an int or "auto") adds calls with fewer keys than that, see
    :func:`mra_attention.crossover.below`. Registering a name again replaces both options.

    An attribute ``mra_config`` of a model's attention module, an :class:`MRAConfig`, takes the
    place of ``config`` there: :meth:`Calibration.apply` sets it, with a density for each head.

    ``config.layout`` is for models of pictures of one size, (14, 14) for ViT's 197 tokens. Calls
    that aren't self-attention of so many tokens or more (text, smaller pictures, cross-attention,
    causal attention) run as exact attention, counted as "layout". A larger picture's first tokens
    would count as leading ones: give each size a name of its own, which
    ``model.set_attn_implementation(name)`` changes between calls.

    Raises TypeError or ValueError for a wrong name, config or exact_below, ImportError without
    transformers 4.54 or newer."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: got {name!r}, expected a non-empty string")
    check_config(config)
    check_exact_below(exact_below)
    transformers = _transformers()
    masking = transformers.masking_utils

    def attention(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None,
        **kwargs,
    ):  # fmt: skip
        return _attention(
            config, exact_below, module, query, key, value, attention_mask, scaling, dropout,
            is_causal, kwargs,
        )  # fmt: skip

    def mask(
        batch_size, q_length, kv_length, q_offset=0, kv_offset=0,
        mask_function=masking.causal_mask_function, attention_mask=None, **kwargs,
    ):  # fmt: skip
        plain = (
            isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
            and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
        )  # fmt: skip
        # The mask of keys as it is, bool (B, M): a reduction would wait for the device.
        if plain and mask_function is masking.bidirectional_mask_function:
            if kwargs.get("allow_is_bidirectional_skip", True):
                return attention_mask
        # Causal besides: (B, 1, M).
        if plain and mask_function is masking.causal_mask_function and q_length == kv_length > 1:
            if kwargs.get("allow_is_causal_skip", True) and attention_mask is not None:
                return attention_mask[:, None, :]
        return masking.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **kwargs,
        )  # fmt: skip

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, mask)


def stats(reset=False):
    """Attention calls so far: a dict of "mra" and, for exact ones, "exact: <reason>".

    Counts eager calls; a compiled program counts when it is traced."""
    return calls.stats("transformers", reset)


# Arguments that change the scores, and so have no block form.
_SCORE_ARGUMENTS = ("sliding_window", "position_bias", "softcap", "s_aux")


def _attention(
    config, exact_below, module, query, key, value, mask, scaling, dropout, is_causal, kwargs
):
    """One call of a model: query (B, H, N, D), key, value (B, Hk, M, D) to (B, N, H, D), None."""
    config = getattr(module, "mra_config", config)
    N, D = query.shape[2], query.shape[3]
    if mask is not None and mask.dim() == 3:  # our mask function's: padded and causal
        mask, is_causal = mask[:, 0], True
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        is_causal = bool(is_causal) and mask is None and N > 1
    if is_causal and key.shape[2] > N:
        # Prefill into an empty static cache: the rest of it lies in the future.
        key, value = key[:, :, :N], value[:, :, :N]
    scale = D**-0.5 if scaling is None else float(scaling)
    reason = None
    if N == 1:
        reason = "one query"
    elif mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
        reason = f"{mask.dim()}-D mask"
    elif value.shape[-1] != D or D > 256:
        reason = f"head_dim {D} with {value.shape[-1]} of value"
    else:
        for name in _SCORE_ARGUMENTS:
            if kwargs.get(name) is not None:
                reason = name
    if reason is None:
        reason = why_exact(config, exact_below, query, key, is_causal)
    calls.count("transformers", reason)
    if kwargs.get("output_attentions"):
        calls.warn_once("MRA attention returns no attention weights to transformers")
    if reason is not None:
        out = _exact(module, query, key, value, mask, scale, dropout, is_causal, kwargs)
        return out.transpose(1, 2).contiguous(), None
    if dropout > 0:
        calls.warn_once("dropout isn't applied to the weights of MRA attention")
    query, key, value = pad_head_dim(query, key, value)
    out = mra_attention(query, key, value, mask, config=config, is_causal=is_causal, scale=scale)
    return out[..., :D].transpose(1, 2), None


def _exact(module, query, key, value, mask, scale, dropout, is_causal, kwargs):
    """Exact attention with every term of _SCORE_ARGUMENTS; a sliding window comes in the mask."""
    bias, softcap, sinks = (kwargs.get(name) for name in _SCORE_ARGUMENTS[1:])
    H, N, M = query.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    if mask is not None and mask.dim() == 2:
        mask = take_part(mask)
    if bias is None and softcap is None and sinks is None:
        return exact_attention(
            query, key, value, mask, is_causal=is_causal, dropout=dropout, scale=scale
        )[0]
    if is_causal:
        past = torch.ones(N, M, dtype=torch.bool, device=query.device).tril()
        mask = past if mask is None else mask & past

    def add_to(scores):
        if mask is None:
            return scores
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores + mask

    if softcap is None and sinks is None:  # as the models themselves: a mask that is added
        # Contiguous: with other strides, as T5's have, torch takes its slowest kernel.
        bias = add_to(bias[..., :M]).to(query.dtype).contiguous()
        return exact_attention(query, key, value, bias, dropout=dropout, scale=scale)[0]
    logits = (scale * query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if bias is not None:
        logits = logits + bias[..., :M]
    logits = add_to(logits)
    if sinks is not None:  # one more logit per head, whose weight goes nowhere
        sinks = sinks.view(1, H, 1, 1).expand(len(query), H, N, 1)
        logits = torch.cat([logits, sinks.to(logits.dtype)], -1)
    weights = logits.softmax(-1)[..., :M].to(query.dtype)
    return F.dropout(weights, dropout) @ value


def patch_mra_model():
    """Makes transformers' MraModel compute MRA attention on every device, dtype and length.

    As it comes, it gives zeros without its CUDA kernel, fails in half precision, mixes the padding
    of different sequences of a batch, and takes only lengths that are multiples of 32. Here:
    blocks of 32, ``block_per_row`` * n / 32 pairs over the head's map, ``approx_mode`` "full"
    (MRA-2) or "sparse" (MRA-2-s), ``initial_prior_*`` as forced blocks, scale 1/sqrt(head size),
    with gradients. Serves models built before and after the call; calling it again changes nothing.

    Raises ImportError without transformers."""
    _transformers()
    from transformers.models.mra import modeling_mra

    attention, encoder = modeling_mra.MraSelfAttention, modeling_mra.MraEncoder
    if attention.forward is _mra_model_attention:
        return
    build, encode = attention.__init__, encoder.forward

    @functools.wraps(build)
    def __init__(self, config):
        build(self, config)
        self.block_per_row = config.block_per_row

    @functools.wraps(encode)
    def forward(self, *args, **kwargs):
        # Layers built before the patch don't know their budget: only its value for the longest
        # input is kept in them.
        for layer in self.layer:
            if not hasattr(layer.attention.self, "block_per_row"):
                layer.attention.self.block_per_row = self.config.block_per_row
        return encode(self, *args, **kwargs)

    attention.__init__, encoder.forward = __init__, forward
    attention.forward = _mra_model_attention


def _mra_model_attention(self, hidden_states, attention_mask=None):
    """Stands for MraSelfAttention.forward: hidden_states (B, N, E), mask (B, N), 4-D or None.
    Returns a 1-tuple.

    Up to transformers 5.17 a mask comes as (B, 1, 1, N), added to scores; 5.23 hands it on as the
    caller gave it, (B, N), where 0 is padding."""
    D = self.attention_head_size
    query, key, value = pad_head_dim(
        *(
            project(hidden_states).unflatten(-1, (-1, D)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
    )
    mask = attention_mask
    if mask is not None and mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > -1  # 0, or a large negative number
    elif mask is not None:
        mask = mask != 0
    if self.approx_mode not in ("full", "sparse"):
        raise ValueError(f"approx_mode: got {self.approx_mode!r}, expected 'full' or 'sparse'")
    preset = MRAConfig.mra2 if self.approx_mode == "full" else MRAConfig.mra2_s
    config = preset(
        self.block_per_row,
        diagonal_blocks=self.initial_prior_diagonal_n_blocks,
        first_blocks=self.initial_prior_first_n_blocks,
    )
    out = mra_attention(query, key, value, mask, mask, config=config, scale=D**-0.5)
    return (out[..., :D].transpose(1, 2).flatten(2),)


def _transformers():
    try:
        import transformers
        from transformers import AttentionMaskInterface, masking_utils  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "mra_attention.transformers needs Hugging Face transformers 4.54 or newer: "
            "pip install transformers"
        ) from error
    return transformers
