"""The two functions: attention, and the plan alone. Thin over the operators (csrc/).

The operators check tensors and numbers; what they can't see (types, a plan made for another call,
options that contradict each other) is checked here. Nothing here reads a tensor's data, so both
functions trace under ``torch.compile(fullgraph=True)`` with dynamic shapes.
"""

import dataclasses

import torch
from torch.nn import functional as F

from . import _load, sharding, transforms
from .config import (
    CAUSAL_POOL,
    DEFAULT_DENSITY,
    MRAConfig,
    check_config,
    check_flag,
    check_scale,
    pool_of,
    resolve_pool,
)
from .layout import Tiles, check_call
from .plan import Plan, all_blocks, as_pair

__all__ = ["mra_attention", "make_plan"]


class _Default:
    """An option that the caller left out; prints as the value it stands for."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return repr(self.value)


(_BLOCK_SIZE, _COARSE, _ORDER, _SELECTION, _DIAGONAL_BLOCKS, _FIRST_BLOCKS, _LAYOUT, _LEVELS,
 _POOL) = (_Default(field.default) for field in dataclasses.fields(MRAConfig)[2:])  # fmt: skip


def mra_attention(
    query, key, value, key_mask=None, query_mask=None, *, density=None, blocks_per_row=None,
    block_size=_BLOCK_SIZE, coarse=_COARSE, order=_ORDER, selection=_SELECTION,
    diagonal_blocks=_DIAGONAL_BLOCKS, first_blocks=_FIRST_BLOCKS, layout=_LAYOUT, levels=_LEVELS,
    pool=_POOL, is_causal=False, scale=None, plan=None, return_lse=False, config=None,
):  # fmt: skip
    """Multi-resolution attention: exact on the selected pairs of blocks, coarse on the rest.

    For query i of block x with the selected key blocks S_x, Z_i the sum of all weights::

        Z_i o_i = sum_{y in S_x} sum_{j in y} e^{s q_i.k_j} v_j + sum_{y not in S_x} e^{b_iy} v~_y

    b_iy is ``log c_y + s q_i.k~_y`` (coarse="row") or ``log c_y + s q~_x.k~_y`` ("block");
    ``order=1`` adds a damped first-order correction of the coarse part. At density 1 it is softmax
    attention. See docs/notation.md.

    query: (B, H, N, D); key, value: (B, Hk, M, D) with H % Hk == 0, any strides, one dtype:
        float64 (CPU only), float32, bfloat16 or float16; D a multiple of 8, at most 256. A
        gradient lies in memory as its input does where that is dense with rows in one piece, so
        that a leaf takes it without a copy, else, as the output always, in the order (B, N, H, D).
    key_mask: bool (B, M), query_mask: bool (B, N); True = takes part. A row that is masked, or has
        no valid key, gives zeros.
    density, blocks_per_row, block_size, coarse, order, selection, diagonal_blocks, first_blocks,
        layout, levels, pool: see :class:`MRAConfig`. Neither budget given: density 1/8. A layout
        needs N == M tokens, as many as it has or more, and no is_causal; input and results stay in
        the order of the sequence, and the shares and numbers of blocks are those of its tiles.
    config: an :class:`MRAConfig` in place of all of those. Giving both is a ValueError; for a
        variant, ``config.replace(...)``.
    is_causal: query i sees keys j <= i; needs N == M.
    scale: factor of q.k, 1/sqrt(D) when None.
    plan: a :class:`Plan` to use instead of selecting. Budget and selection options beside it are a
        ValueError; ``block_size`` and ``layout`` (its own when left out) and ``is_causal`` must be
        the plan's. A ``config`` beside it gives ``coarse``, ``order`` and ``pool``; its selection
        was spent on the plan. The scores of the plan were those of the pool it was made with: give
        :func:`make_plan` the ``coarse``, ``order`` and ``pool`` of the call.
    return_lse: also return the natural log of each row's whole mass, (B, H, N), float32 (float64
        for float64); -inf for a row of zeros.

    Returns out (B, H, N, D) in the dtype of query, a transposed view of (B, N, H, D) memory; with
    ``return_lse`` the pair (out, lse). Differentiable in query, key, value; the plan is constant.

    Raises TypeError, ValueError or NotImplementedError that names the argument.
    """
    _check_tensors(query=query, key=key, value=value)
    _check_tensors(optional=True, key_mask=key_mask, query_mask=query_mask)
    check_flag("return_lse", return_lse)
    options = _resolve(
        config, plan, is_causal, scale, density=density, blocks_per_row=blocks_per_row,
        block_size=block_size, coarse=coarse, order=order, selection=selection,
        diagonal_blocks=diagonal_blocks, first_blocks=first_blocks, layout=layout, levels=levels,
        pool=pool,
    )  # fmt: skip
    if plan is None:
        row_start = row_count = row_index = None
        budget = _budget(options)
        block_q, block_k = as_pair(options.block_size)
        layout, levels = options.layout, options.levels
    else:
        _check_plan(plan, query, key)
        row_start, row_count, row_index = plan.row_start, plan.row_count, plan.row_index
        budget = (None, None)
        block_q, block_k = plan.block_size
        layout, levels = plan.layout, plan.levels
    pool = resolve_pool(options.pool, options.coarse, options.order, levels)
    tiles = None
    if layout is not None:
        check_call(layout, query, key, value, key_mask, query_mask)
        tiles = Tiles.of(layout, query.shape[2], all_blocks((block_q, block_k), levels))
        key_mask, query_mask = tiles.masks(key_mask, query_mask, query)
        query, key, value = tiles.to_blocks(query, key, value)
    forward = transforms.forward if transforms.active() else torch.ops.mra_attention.forward
    # What backward reads again is kept where there may be one; a traced program may get one later.
    keep = transforms.active() or torch.jit.is_tracing()
    if not keep and torch.is_grad_enabled():
        keep = any(x.requires_grad for x in (query, key, value))
    out, lse, *_ = forward(
        query, key, value, key_mask, query_mask, row_start, row_count, row_index, *budget,
        block_q, block_k, options.coarse, options.order, options.selection,
        options.diagonal_blocks, options.first_blocks, is_causal, _float(scale), _flat(levels),
        pool, keep,
    )  # fmt: skip
    if tiles is not None:
        if return_lse:
            out, lse = tiles.to_tokens(out, lse)
        else:
            (out,) = tiles.to_tokens(out)
    return (out, lse) if return_lse else out


def make_plan(
    query, key, key_mask=None, query_mask=None, *, density=None, blocks_per_row=None,
    block_size=_BLOCK_SIZE, coarse=_COARSE, order=_ORDER, selection=_SELECTION,
    diagonal_blocks=_DIAGONAL_BLOCKS, first_blocks=_FIRST_BLOCKS, layout=_LAYOUT, levels=_LEVELS,
    pool=_POOL, is_causal=False, scale=None, config=None,
):  # fmt: skip
    """The plan that :func:`mra_attention` would make of these arguments.

    Selects by the scores of pairs of blocks, ``s q~_x.k~_y``: forced pairs first, then the higher
    score, ties to the lower index. With a ``pool`` other than "even" what all queries agree on
    counts less: ``s (q~_x - q^/2).k~_y`` plus a quarter of block y's log mass at the mean query q^.
    ``coarse`` and ``order`` only say what pool "auto" is. Arguments, errors and ``config`` as
    :func:`mra_attention`. Returns a :class:`Plan`; no gradient.
    """
    _check_tensors(query=query, key=key)
    _check_tensors(optional=True, key_mask=key_mask, query_mask=query_mask)
    options = _resolve(
        config, None, is_causal, scale, density=density, blocks_per_row=blocks_per_row,
        block_size=block_size, coarse=coarse, order=order, selection=selection,
        diagonal_blocks=diagonal_blocks, first_blocks=first_blocks, layout=layout, levels=levels,
        pool=pool,
    )  # fmt: skip
    block_q, block_k = as_pair(options.block_size)
    layout, given = options.layout, (query, key)
    if layout is not None:
        check_call(layout, query, key, None, key_mask, query_mask)
        tiles = Tiles.of(layout, query.shape[2], all_blocks((block_q, block_k), options.levels))
        key_mask, query_mask = tiles.masks(key_mask, query_mask, query)
        query, key = tiles.to_blocks(query, key)
    lists = torch.ops.mra_attention.plan(
        query, key, key_mask, query_mask, *_budget(options), block_q, block_k, options.selection,
        options.diagonal_blocks, options.first_blocks, is_causal, _float(scale),
        _flat(options.levels), pool_of(options),
    )  # fmt: skip
    N, M = (x.shape[2] for x in given)
    return Plan(*lists, N, M, (block_q, block_k), is_causal, layout, options.levels)


def pad_head_dim(*tensors):
    """Each tensor with zeros up to a head dim that is a multiple of 8; itself where it is one.

    Zeros change neither scores nor the first D columns of the output. They do change the default
    scale, so callers give theirs."""
    return [F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in tensors]


def _resolve(config, plan, is_causal, scale, **options):
    """The options of one call as an MRAConfig, with every contradiction refused."""
    if _load.extension is None:
        _load.require()  # says what to do
    check_flag("is_causal", is_causal)
    check_scale(scale)
    given = {
        name: value
        for name, value in options.items()
        if value is not None or name not in ("density", "blocks_per_row")
        if not isinstance(value, _Default)
    }
    if config is not None:
        check_config(config)
        if given:
            raise ValueError(
                f"config: got together with {', '.join(given)}, expected the options in one place "
                "only; config.replace(...) makes a variant"
            )
    if plan is not None:
        if not isinstance(plan, Plan):
            raise TypeError(
                f"plan: got {type(plan).__name__}, expected a Plan (make_plan or Plan.from_dense)"
            )
        spent = [n for n in given if n not in ("block_size", "coarse", "order", "layout", "pool")]
        if spent:
            raise ValueError(
                f"plan: got together with {', '.join(spent)}, expected no budget and no selection "
                "options beside a plan that is already made"
            )
        if plan.is_causal != is_causal:
            raise ValueError(
                f"plan: made with is_causal={plan.is_causal}, the call has is_causal={is_causal}"
            )
        if config is not None and config.levels != plan.levels:
            raise ValueError(
                f"plan: made with levels={plan.levels}, the config has levels={config.levels}"
            )
        wanted = config.block_size if config is not None else given.get("block_size")
        if wanted is not None and as_pair(wanted) != plan.block_size:
            raise ValueError(
                f"plan: made with block_size={plan.block_size}, the call has block_size={wanted}"
            )
    options = _config_of(given) if config is None else config
    if plan is not None and (config is not None or "layout" in given):
        if plan.layout != options.layout:
            raise ValueError(
                f"plan: made with layout={plan.layout}, the call has layout={options.layout}"
            )
    if is_causal and pool_of(options) not in CAUSAL_POOL:
        raise NotImplementedError(
            f"pool: got {options.pool!r} with is_causal=True, expected one of {CAUSAL_POOL}"
        )
    if options.layout is not None and is_causal:
        raise ValueError(
            f"layout: got {options.layout} with is_causal=True, expected is_causal=False: the "
            "order of a picture's tokens is not one of time"
        )
    return options


_PLAIN = (int, float, str)
_configs = {}  # of options that calls have given


def _config_of(given):
    """MRAConfig(**given): the same object for the same plain values, which are checked once."""
    if torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in given.values()):
        return MRAConfig(**given)
    key = *given.items(), *map(type, given.values())  # 1 == 1.0
    options = _configs.get(key)
    if options is None:
        if len(_configs) >= 256:
            _configs.clear()
        options = _configs[key] = MRAConfig(**given)
    return options


def _budget(options):
    """(blocks_per_row, [density, ...]), exactly one of them set."""
    if options.blocks_per_row is not None:
        return options.blocks_per_row, None
    density = DEFAULT_DENSITY if options.density is None else options.density
    return None, [float(x) for x in (density if isinstance(density, tuple) else (density,))]


def _float(scale):
    return None if scale is None else float(scale)


def _flat(levels):
    """levels as the operators take them: block, cells, block, cells, ...; None without any."""
    return [number for level in levels for number in level] or None


def _check_tensors(optional=False, **tensors):
    for name, x in tensors.items():
        if x is None and optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name}: got {type(x).__name__}, expected a tensor{' or None' * optional}"
            )
        if x.is_nested:
            raise TypeError(f"{name}: got a nested tensor, expected a dense one with a mask")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: got layout {x.layout}, expected a dense (strided) tensor")
        if type(x) is not torch.Tensor and sharding.is_dtensor(x):
            sharding.register()


def _check_plan(plan, query, key):
    if query.dim() != 4 or key.dim() != 4:
        return  # the operator says what is wrong with them
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if plan.shape != shape:
        raise ValueError(
            f"plan: made for (B, H, N, M) = {tuple(plan.shape)}, the call has {tuple(shape)}"
        )
    if plan.device != query.device:
        raise ValueError(f"plan: is on {plan.device}, query is on {query.device}")
