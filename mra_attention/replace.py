"""MRA attention in the place of every ``nn.MultiheadAttention`` of a model."""

from torch import nn

from .config import MRAConfig, check_config, check_exact_below
from .modules import MRAMultiheadAttention

__all__ = ["replace_attention"]


def replace_attention(model, config=MRAConfig(), filter=None, exact_below=None):  # noqa: B008
    """Puts MRA attention in the place of every ``nn.MultiheadAttention`` inside ``model``.

    The replacements share the parameters; those that are MRA attention already get ``config`` and
    ``exact_below``.
    Subclasses with a forward of their own, and parametrized modules, stay as they are. Encoders of
    ``nn.TransformerEncoder`` with such attention inside stop converting padded input to nested
    tensors. Changes ``model``.

    filter: None, or a function of a module's name in ``model`` ("encoder.layers.0.self_attn") and
        the module that says which to change. A module with several names is asked for by each.
    exact_below: see :class:`MRAMultiheadAttention`; so are calls that don't fit ``config.layout``.
        Where layers see pictures of several sizes, give each its config: a call with a filter for
        each size.

    Returns how many modules now attend with ``config``. Raises TypeError for a wrong model, config
    or filter, ValueError when ``model`` is itself an ``nn.MultiheadAttention``, either for a wrong
    exact_below.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    check_config(config)
    check_exact_below(exact_below)
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
            module.config, module.exact_below = config, exact_below
            configured.add(module)
            continue
        if module not in made:
            made[module] = MRAMultiheadAttention.from_mha(module, config, exact_below)
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
