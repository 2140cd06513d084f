"""How well MRA attention does in a model, layer by layer and head by head, and what density it
takes to do better."""

import contextlib
import dataclasses
import math

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .config import (
    CAUSAL_POOL,
    POOL,
    MRAConfig,
    check_budget,
    check_choice,
    check_config,
    check_number,
    mean_density,
)
from .coverage import coverage
from .head_density import give_out
from .modules import MRAMultiheadAttention

__all__ = ["Calibration", "Layer", "calibrate"]

DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
ROWS = 2**24  # scores that exact attention holds at once


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Attention calls of one module.

    name: of the module in the model; "" where the model's own forward attends. calls: how many.
    N, M: queries and keys of the last one. block_size, coarse, order: options of the last one.
    as_is: float64 (H,), error of each head with the options as they are.
    errors: float64 (len(densities), H), with each density in place of the budget.
    density: the smallest of the densities whose mean error over heads meets the target; 1.0 when
        none does.
    head_density: H numbers, the layer's part of what :attr:`Calibration.head_density` is the mean
        of; None where its calls take one density for all heads (selection "global", levels).

    The error of a head is ‖o − exact‖ / ‖exact‖ over the queries that take part, averaged over
    batch entries and calls."""

    name: str
    calls: int
    N: int
    M: int
    block_size: tuple[int, int]
    coarse: str
    order: int
    as_is: torch.Tensor
    errors: torch.Tensor
    density: float
    head_density: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What :func:`calibrate` found; prints as a table.

    layers: a :class:`Layer` for each module that attended.
    density: the smallest of ``densities`` whose mean error over layers and heads meets
        ``target_error``; 1.0 when none does, None when no call was seen.
    head_density: the mean, by exact pairs, of what meets the target where each head of each layer
        has one of ``densities`` or 1.0 for its own, given out where it takes most off the error for
        its cost; None where a layer takes one for all heads.
    pool: of the ``pools`` tried the one that needs the smallest density, of several the first; None
        when none were asked for. others: what each of the rest has, by its name. ``layers``,
        ``density`` and ``head_density`` are those of ``pool``."""

    target_error: float
    densities: tuple[float, ...]
    layers: tuple[Layer, ...]
    density: float | None
    head_density: float | None = None
    pool: str | None = None
    others: dict[str, "Calibration"] = dataclasses.field(default_factory=dict)

    def __str__(self):
        if not self.layers:
            return "no MRA attention ran"
        head = ["module", "heads", "N", "M", "as it is", *map(_share, self.densities)]
        head += ["proposed", "by head"]
        rows = [head]
        for layer in self.layers:
            errors = [_errors(e) for e in (layer.as_is, *layer.errors)]
            sizes = [len(layer.as_is), layer.N, layer.M]
            found = [_share(layer.density), _range(layer.head_density)]
            rows.append([layer.name or "(model)", *map(str, sizes), *errors, *found])
        means = [
            f"{torch.stack([e.mean() for e in column]).mean():.3f}"
            for column in zip(*((x.as_is, *x.errors) for x in self.layers), strict=True)
        ]
        by_head = "-" if self.head_density is None else f"{self.head_density:.3g}"
        rows.append(["mean of layers", "", "", "", *means, _share(self.density), by_head])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        note = f"|o - exact| / |exact|, mean over heads (worst head); target {self.target_error:g}"
        pools = [(self.pool, self), *self.others.items()] if self.pool else []
        found = [f"{name!r} {_share(report.density)}" for name, report in pools]
        return "\n".join([*lines, note, *([f"by pool: {', '.join(found)}"] if found else [])])

    def apply(self, model, config=MRAConfig(), by_head=True):  # noqa: B008
        """Has the attention of ``model`` run as proposed from now on: ``config`` with this report's
        density, that of each layer's heads ``by_head``, and with ``pool`` where pools were tried.

        model: the one that was measured, or another with modules of the same names. An
            :class:`MRAMultiheadAttention` gets its ``config``; a module that transformers'
            attention interface serves gets an attribute ``mra_config``, which takes the place of
            the config of :func:`mra_attention.transformers.register`. Neither is in the model's
            state dict: apply again, or keep the configs, after loading.
        by_head: False gives all heads the one density. So does a report without densities by head.

        Returns how many modules it changed. Raises TypeError for a wrong model or config,
        ValueError for a module that takes no config: one that calls the function itself."""
        check_config(config)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
        modules, served = dict(model.named_modules()), coverage(model).served
        for layer in self.layers:
            if layer.name not in served:
                raise ValueError(
                    f"model: got a module {layer.name!r} that takes no config, expected "
                    "MRAMultiheadAttention or one that transformers' attention interface serves"
                )
        for layer in self.layers:
            density = self.density
            if by_head and self.head_density is not None:
                density = layer.head_density
            own = config.replace(density=density, pool=self.pool or config.pool)
            module = modules[layer.name]
            name = "config" if isinstance(module, MRAMultiheadAttention) else "mra_config"
            setattr(module, name, own)
        return len(self.layers)


def calibrate(model, batch, target_error=0.1, densities=DENSITIES, pools=()):
    """Measures the MRA attention of ``model`` against exact attention on a batch of real inputs.

    Runs the model once, in eval mode without gradients. Every call of MRA attention inside, by
    :class:`MRAMultiheadAttention`, ``attn_implementation="mra"``, :func:`mra_sdpa` or the function
    itself, is computed with its options as they are, with each density in place of its budget, and
    exactly. The model goes on with the exact result, so that each layer is measured on what it
    would read from exact ones. Nothing in the model is changed; calls that run as exact attention
    anyway aren't seen.

    model: an nn.Module, not compiled. batch: its input: a dict of keyword arguments, a tuple or
        list of positional ones, or one object.
    target_error: mean of ‖o − exact‖ / ‖exact‖ to meet, in (0, 1). What a task bears differs from
        task to task: measure its own figure with the proposal.
    densities: what to try, each in (0, 1].
    pools: values of :attr:`MRAConfig.pool` to try each density with; empty: that of the calls. A
        call that doesn't take one of them ("sampled" under causal; all but "even" with levels and
        in other coarse forms than "row") is measured with its own in its place.

    Returns a :class:`Calibration`; ``print`` shows it. To use what it proposes::

        report = calibrate(model, batch)
        report.apply(model)                 # a density for each head
        report.apply(model, by_head=False)  # or the same for all

    The first has fewer exact pairs for the same error, of the calls that were measured: heads that
    need many have them, those that need few make room. Measure both on other inputs.

    Takes the time of exact attention and of as many MRA forwards as there are densities, for each
    of the pools, and memory beyond the model's own for a few outputs. Waits for the device.

    Raises TypeError or ValueError that names the argument."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    check_number("target_error", target_error)
    if not 0 < target_error < 1:
        raise ValueError(f"target_error: got {target_error!r}, expected a number in (0, 1)")
    densities = tuple(densities)
    if None in densities or not densities:
        raise ValueError(f"densities: got {densities!r}, expected numbers in (0, 1]")
    for density in densities:
        check_number("densities", density)
        check_budget(density, None)
    densities = tuple(sorted(set(densities)))
    pools = tuple(dict.fromkeys(pools))
    for pool in pools:
        check_choice("pools", pool, POOL)
    with _evaluated(model), _named(model) as names, torch.no_grad():
        with _Measure(densities, pools or (None,), names) as measured:
            if isinstance(batch, dict):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
    reports = {
        pool: _report(measured.calls, i, densities, target_error)
        for i, pool in enumerate(pools or (None,))
    }
    best = min(reports, key=lambda pool: reports[pool].density or 1.0)
    others = {pool: report for pool, report in reports.items() if pool != best}
    return dataclasses.replace(reports[best], pool=best, others=others)


class _Measure(TorchDispatchMode):
    """Sees every call of the operator, and answers with exact attention."""

    def __init__(self, densities, pools, names):
        super().__init__()
        self.densities, self.pools, self.names, self.calls = densities, pools, names, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.mra_attention.forward.default:
            return func(*args, **(kwargs or {}))
        arguments = func._schema.arguments
        call = {argument.name: argument.default_value for argument in arguments}
        call |= zip((argument.name for argument in arguments), args, strict=False)
        call |= kwargs or {}
        result = list(func(**call))
        exact, lse = _exact(call)
        as_is = _error(result[0], exact, call["query_mask"])
        free = {**call, "row_start": None, "row_count": None, "row_index": None}
        served = {"even"}
        if call["coarse"] == "row" and not call["levels"]:
            served.update(CAUSAL_POOL if call["is_causal"] else POOL)
        errors_of = {}
        wanted = [pool if pool in served else call["pool"] for pool in self.pools]
        for pool in dict.fromkeys(wanted):
            options = {**free, "blocks_per_row": None, "pool": pool}
            outs = (func(**{**options, "density": [density]})[0] for density in self.densities)
            errors = [_error(out, exact, call["query_mask"]) for out in outs]
            errors_of[pool] = torch.stack(errors)
        errors = torch.stack([errors_of[pool] for pool in wanted])
        self.calls.setdefault(self.names[-1], []).append((call, as_is, errors))
        result[0], result[1] = result[0].copy_(exact), lse.to(result[1].dtype)
        return tuple(result)


def _exact(call):
    """Softmax attention of a call: out (B, H, N, D) and lse (B, H, N), float32 or float64."""
    wide = torch.promote_types(call["query"].dtype, torch.float32)
    q, k, v = (call[name].to(wide) for name in ("query", "key", "value"))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
    (B, H, N, _), M = q.shape, k.shape[2]
    step = max(1, ROWS // max(1, B * H * M))
    outs, lses = [], []
    for first in range(0, N, step):
        logits = scale * q[:, :, first : first + step] @ k.mT
        row = torch.arange(first, first + logits.shape[2], device=q.device)[:, None]
        dead = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        if call["is_causal"]:
            dead = dead | (torch.arange(M, device=q.device) > row)
        if call["key_mask"] is not None:
            dead = dead | ~call["key_mask"][:, None, None, :]
        if call["query_mask"] is not None:
            dead = dead | ~call["query_mask"][:, None, first : first + step, None]
        logits = logits.masked_fill(dead, -math.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()
        outs.append(weights @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _error(out, exact, query_mask):
    """float64 (H,): mean over batch entries of ‖out − exact‖ / ‖exact‖, 0 where exact is 0."""
    out, exact = out.double(), exact.double()
    if query_mask is not None:
        out, exact = (x.masked_fill(~query_mask[:, None, :, None], 0) for x in (out, exact))
    difference, size = (x.flatten(2).norm(dim=-1) for x in (out - exact, exact))
    return torch.where(size > 0, difference / size, 0).mean(0).cpu()


def _report(calls_of, i, densities, target_error):
    """What the ``i``-th of the pools gives."""
    layers = tuple(
        _layer(name, calls, i, densities, target_error) for name, calls in calls_of.items()
    )
    if not layers:
        return Calibration(target_error, densities, layers, None)
    errors = torch.stack([layer.errors.mean(-1) for layer in layers]).mean(0)
    density = _smallest(densities, errors, target_error)
    layers, mean = _by_head(layers, calls_of.values(), densities, target_error)
    return Calibration(target_error, densities, layers, density, mean)


def _by_head(layers, calls, densities, target_error):
    """The layers with a density for each head, and the mean of those; as they are, and None, where
    a layer takes but one."""
    if any(call["selection"] != "row" or call["levels"] for each in calls for call, *_ in each):
        return layers, None
    sizes = densities if densities[-1] == 1 else (*densities, 1.0)
    errors = torch.cat([layer.errors for layer in layers], 1)
    errors = torch.cat([errors, errors.new_zeros(len(sizes) - len(errors), errors.shape[1])])
    costs, weights = [], []
    for layer, each in zip(layers, calls, strict=True):
        heads = len(layer.as_is)
        pairs = [call["query"][:, 0, :, 0].numel() * call["key"].shape[2] for call, *_ in each]
        costs += [sum(pairs)] * heads
        weights += [1 / (heads * len(layers))] * heads
    given = give_out(errors.tolist(), sizes, costs=costs, weights=weights, target=target_error)
    given = [sizes[i] for i in given]
    mean = sum(c * x for c, x in zip(costs, given, strict=True)) / sum(costs)
    found = []
    for layer in layers:
        own, given = given[: len(layer.as_is)], given[len(layer.as_is) :]
        found.append(dataclasses.replace(layer, head_density=tuple(own)))
    return tuple(found), mean


def _layer(name, calls, i, densities, target_error):
    call = calls[-1][0]
    as_is = torch.stack([as_is for _, as_is, _ in calls]).mean(0)
    errors = torch.stack([errors[i] for *_, errors in calls]).mean(0)
    return Layer(
        name, len(calls), call["query"].shape[2], call["key"].shape[2],
        (call["block_q"], call["block_k"]), call["coarse"], call["order"], as_is, errors,
        _smallest(densities, errors.mean(-1), target_error),
    )  # fmt: skip


def _smallest(densities, errors, target_error):
    met = [d for d, error in zip(densities, errors.tolist(), strict=True) if error <= target_error]
    return min(met, default=1.0)


@contextlib.contextmanager
def _evaluated(model):
    """The model in eval mode, each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _named(model):
    """A list whose last entry is the name of the module that runs."""
    names, handles = [""], []
    for name, module in model.named_modules():
        if module is not model:
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: names.append(name)),
                module.register_forward_hook(lambda *_: names.pop() and None, always_call=True),
            ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _errors(errors):
    return f"{errors.mean():.3f} ({errors.max():.3f})"


def _range(head_density):
    """Lowest, mean and highest of a layer's."""
    if head_density is None:
        return "-"
    low, high = min(head_density), max(head_density)
    return f"{_share(low)} to {_share(high)}, mean {mean_density(head_density):.3g}"


def _share(density):
    inverse = 1 / density
    return f"1/{round(inverse)}" if abs(inverse - round(inverse)) < 1e-9 else f"{density:g}"
