"""Which attention modules of a Hugging Face model a registered MRA attention reaches."""

import dataclasses
import inspect
import sys

from torch import nn

from .modules import MRAMultiheadAttention

__all__ = ["Attention", "Coverage", "coverage"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention module of a model.

    name: of the module in the model, as ``named_modules`` gives it.
    kind: name of its class.
    served: whether MRA attention reaches it under a registered ``attn_implementation``.
    why: how it is reached, or why it isn't and what serves it instead.
    implementation: the ``attn_implementation`` that it is set to now; None where nothing says.
    """

    name: str
    kind: str
    served: bool
    why: str
    implementation: str | None = None


class Coverage(tuple):
    """The :class:`Attention` of every attention module, in the model's order; prints as a table."""

    __slots__ = ()

    @property
    def served(self):
        """{name: class name} of the modules that MRA attention reaches."""
        return {item.name: item.kind for item in self if item.served}

    @property
    def missed(self):
        """{name: why} of the modules that it doesn't reach."""
        return {item.name: item.why for item in self if not item.served}

    def __str__(self):
        if not self:
            return "no attention modules"
        rows = [("module", "class", "set to", "served", "why")]
        rows += [
            (
                item.name or "(the model)",
                item.kind,
                item.implementation or "-",
                "yes" if item.served else "no",
                item.why,
            )
            for item in self
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)] + [0]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, f"{len(self.served)} of {len(self)} attention modules served"])


def coverage(model):
    """Says which attention modules of ``model`` run under ``attn_implementation="mra"``, and why
    the others don't. Looks at the code of their classes; runs nothing, changes nothing.

    Served are modules whose ``forward``, or a method of theirs that it calls, reads transformers'
    attention interface, and modules that are MRA attention themselves. That a module is served
    says that its calls arrive; some may still have no block form (see
    :func:`mra_attention.transformers.register`), which only a run can tell:
    :func:`mra_attention.transformers.stats` counts them.

    Of the modules that don't read the interface, those count as attention whose class name says so;
    of several inside each other, the one that multiplies matrices or takes a softmax, else the
    innermost.

    model: any nn.Module. Returns a :class:`Coverage`. Raises TypeError for anything else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    modules = dict(model.named_modules())
    found, unsure = {}, []
    for name, module in modules.items():
        if type(module).forward is nn.Module.forward:
            continue  # a container, or helpers of attention under its name: never called
        verdict = _verdict(type(module))
        if verdict is not None:
            found[name] = verdict
        elif _says_attention(type(module)):
            unsure.append(name)
    for name in reversed(unsure):  # inner ones first
        if not any(_inside(name, other) or _inside(other, name) for other in found):
            found[name] = (False, _OWN)
    return Coverage(
        Attention(name, type(modules[name]).__name__, *found[name], _implementation(modules, name))
        for name in modules
        if name in found
    )


_INTERFACE = "attention interface"
_OWN = "computes attention itself, without the attention interface"
_COMPUTES = {"softmax", "matmul", "bmm", "baddbmm", "einsum"}


def _verdict(kind):
    """(served, why) of a module's class; None where its code doesn't tell."""
    if str(getattr(kind.forward, "__module__", "")).startswith(__package__ + "."):
        # The module of this package, or what patch_mra_model put in place.
        own = "the module's" if issubclass(kind, MRAMultiheadAttention) else "the model's"
        return True, f"is MRA attention, with {own} config"
    if issubclass(kind, nn.MultiheadAttention):
        return False, "torch's nn.MultiheadAttention; replace_attention serves it"
    names, reads_interface = _names(kind)
    if reads_interface:
        return True, _INTERFACE
    if not _says_attention(kind):
        return None
    if "mra2_attention" in names:
        return False, "transformers' own MRA; patch_mra_model() serves it"
    if "scaled_dot_product_attention" in names:
        return False, "calls scaled_dot_product_attention itself; replace_sdpa serves it"
    return (False, _OWN) if names & _COMPUTES else None


def _says_attention(kind):
    return "attention" in kind.__name__.lower()


def _names(kind):
    """The names that ``forward`` reads, with those of the methods among them, and whether one is
    transformers' attention interface. Compiled code, not source text: a comment is no use of it,
    and a class without a source file still tells."""
    interface = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", ())
    names, reads_interface, todo = set(), False, ["forward"]
    while todo:
        function = inspect.unwrap(getattr(kind, todo.pop()))
        if not inspect.isfunction(function):
            continue
        codes = [function.__code__]
        for code in codes:  # grows: functions inside of the function
            codes += [const for const in code.co_consts if inspect.iscode(const)]
            new = set(code.co_names) - names
            names |= new
            todo += [name for name in new if hasattr(kind, name)]
            reads_interface |= any(
                isinstance(function.__globals__.get(name), interface) for name in code.co_names
            )
    return names, reads_interface


def _inside(inner, outer):
    return outer == "" or inner == outer or inner.startswith(outer + ".")


def _implementation(modules, name):
    """``_attn_implementation`` of the config of the module, or of what it is in."""
    while True:
        config = getattr(modules.get(name), "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation is not None or not name:
            return implementation
        name = name.rpartition(".")[0]
