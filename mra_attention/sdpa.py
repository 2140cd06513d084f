"""MRA attention behind ``torch.nn.functional.scaled_dot_product_attention``.

    out = mra_attention.mra_sdpa(query, key, value, config=config)
    with mra_attention.replace_sdpa(config):
        model(images)

serves whatever calls that function inside.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import calls
from ._constant import constant
from .config import MRAConfig, check_config, check_exact_below
from .exact import exact_attention, take_part
from .functional import mra_attention, pad_head_dim
from .unserved import REASONS, why_exact

__all__ = ["mra_sdpa", "replace_sdpa", "stats"]


def mra_sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, *, config=MRAConfig(), exact_below=None,  # noqa: B008
):  # fmt: skip
    """``scaled_dot_product_attention`` with MRA attention where that can say the same.

    Arguments, shapes and result are those of torch's function, plus ``config`` and ``exact_below``
    (None, an int or "auto": calls with fewer keys than that run as exact attention, see
    :func:`mra_attention.crossover.below`). So do these: a mask that differs from query to query or
    from head to head, a float mask, ``is_causal`` with N != M, a single query, head dims above 256
    or of another size for the values, float64 on a GPU, more than one batch dimension, nested
    tensors, devices other than CPU and CUDA, whatever isn't self-attention of as many tokens as
    ``config.layout`` has or more, and whatever torch refuses. :func:`stats` counts them with the
    reason. A bool mask with one row of keys for all queries and heads, (B, 1, 1, M) for example, is
    a key mask.

    ``dropout_p`` isn't applied to the weights of MRA attention; a nonzero value warns once. (Exact
    calls apply it.) A row without a key gives zeros."""
    check_config(config)
    check_exact_below(exact_below)
    mask, reason = None, _why_exact(query, key, value, attn_mask, is_causal, enable_gqa)
    if reason is None and attn_mask is not None:
        mask = _key_mask(query, key, attn_mask)
        reason = "mask of single queries or heads" if mask is None else None
    if reason is None:
        reason = why_exact(config, exact_below, query, key, is_causal)
    calls.count("sdpa", reason)
    if reason in REASONS:
        mask = take_part(mask)
        mask = mask if mask is None or query.dim() == 4 else mask.squeeze(1)
        return exact_attention(
            query, key, value, mask, is_causal=is_causal, dropout=dropout_p, scale=scale,
            enable_gqa=enable_gqa,
        )[0]  # fmt: skip
    if reason is not None:
        # Not by the name that an outer replace_sdpa answers to.
        return torch.ops.aten.scaled_dot_product_attention.default(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if dropout_p > 0:
        calls.warn_once("dropout_p: isn't applied to the weights of MRA attention")
    D, heads = query.shape[-1], query.dim() == 4
    if not heads:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    query, key, value = pad_head_dim(query, key, value)
    scale = D**-0.5 if scale is None else scale
    out = mra_attention(query, key, value, mask, config=config, is_causal=is_causal, scale=scale)
    out = out[..., :D]
    return out if heads else out.squeeze(1)


class replace_sdpa(TorchFunctionMode):
    """Context in which ``scaled_dot_product_attention`` is :func:`mra_sdpa` with ``config`` and
    ``exact_below``.

    It holds for every call from this thread, also under a name that was imported before, and for
    programs compiled inside of it. ``nn.MultiheadAttention`` calls one function for everything and
    stays exact, which :func:`stats` counts; :func:`mra_attention.replace_attention` serves it.

    Raises TypeError for a wrong config, TypeError or ValueError for a wrong exact_below."""

    def __init__(self, config=MRAConfig(), exact_below=None):  # noqa: B008
        check_config(config)
        check_exact_below(exact_below)
        super().__init__()
        self.config = config
        self.exact_below = exact_below

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return mra_sdpa(*args, **kwargs, config=self.config, exact_below=self.exact_below)
        if func is F.multi_head_attention_forward and not _inside_another():
            calls.count("sdpa", "nn.MultiheadAttention")
        return func(*args, **kwargs)


@constant  # while a program is traced: run once
def _inside_another():
    """Whether a replace_sdpa around the one that asks will see the same call."""
    return any(isinstance(mode, replace_sdpa) for mode in _get_current_function_mode_stack())


def stats(reset=False):
    """Calls of :func:`mra_sdpa` so far, with those under :class:`replace_sdpa`.

    A dict of "mra" and, for exact ones, "exact: <reason>".

    Counts eager calls; a compiled program counts when it is traced."""
    return calls.stats("sdpa", reset)


def _why_exact(query, key, value, attn_mask, is_causal, enable_gqa):
    """Why this call has no form as MRA attention, in a word or two; None: it has, if what a bool
    mask says is one row of keys (:func:`_key_mask`)."""
    if any(x.is_nested for x in (query, key, value)):
        return "nested tensor"
    if query.dim() not in (3, 4):
        return f"{query.dim()}-D query"
    if not _shapes_fit(query, key, value, enable_gqa):
        return "shapes"
    if not query.dtype == key.dtype == value.dtype:
        return "dtypes"  # autocast may make them one
    if query.shape[-2] == 1:
        return "one query"
    if value.shape[-1] != query.shape[-1] or query.shape[-1] > 256:
        return f"head_dim {query.shape[-1]} with {value.shape[-1]} of value"
    if query.device.type not in ("cpu", "cuda"):
        return f"device {query.device.type}"
    if query.dtype == torch.float64 and query.device.type != "cpu":
        return "float64"
    if is_causal and attn_mask is not None:
        return "mask beside is_causal"  # torch says what is wrong with that
    if is_causal and query.shape[-2] != key.shape[-2]:
        return "is_causal with N != M"
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        return f"{attn_mask.dtype} mask".removeprefix("torch.")
    return None


def _shapes_fit(query, key, value, enable_gqa):
    """Whether nothing is broadcast and no size contradicts another."""
    if key.dim() != query.dim() or value.dim() != query.dim():
        return False
    if key.shape[:-1] != value.shape[:-1] or key.shape[-1] != query.shape[-1]:
        return False
    if key.shape[0] != query.shape[0] or key.shape[-2] == 0:
        return False
    if query.dim() == 3:
        return True
    H, Hk = query.shape[1], key.shape[1]
    return H == Hk or (enable_gqa and Hk > 0 and H % Hk == 0)


def _key_mask(query, key, mask):
    """A bool mask that broadcasts to (B, H, N, M), or (B, N, M) without heads, as one of keys:
    (B, M); None where it differs between queries or heads. Looks at no value."""
    if query.dim() == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if not 2 <= mask.dim() <= 4:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in (1, 2):
        if mask.shape[dim] != 1 and mask.stride(dim) != 0:
            return None
    B, M = query.shape[0], key.shape[-2]
    if mask.shape[0] not in (1, B) or mask.shape[3] not in (1, M):
        return None
    return mask[:, 0, 0].expand(B, M)
