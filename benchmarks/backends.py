"""Who is measured. A backend is a name and ``setup(context) -> Prepared``; setting up is not timed.

``exact ...``   softmax attention over all keys, by each kernel of torch that takes the shape
``flex``        FlexAttention over the same plan (blocks not selected are dropped), list given free
``flex 128``    the same share of blocks of 128, the tile that FlexAttention is tuned for
``equal pairs`` dense attention of all queries on as many keys as the plan gives each: the same
                number of exact pairs with perfect locality, the practical floor of the fine part
``mra``         mra_attention, selection and coarse part inside the time, one row for each form
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import formulas
from benchmarks.cases import Form, Unsupported
from benchmarks.inputs import draw, normal
from mra_attention import make_plan, mra_attention

KINDS = ("exact", "flex", "flex 128", "equal pairs", "mra")
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Context:
    """Inputs of a case: query, grad_out (B, H, N, D) and key, value (B, Hk, M, D).

    ``layout`` "bnhd" lays heads beside each other, as the projections of a layer do;
    ``minilm_file`` is where the case's inputs come from if they are MiniLM's and it isn't here."""

    def __init__(self, case, device, seed=0, layout="bnhd", minilm_file=None):
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(seed)

        def laid_out(x):
            x = x.to(device, case.torch_dtype)
            if layout == "bhnd":
                return x.contiguous()
            return x.transpose(1, 2).contiguous().transpose(1, 2)

        self.query, self.key, self.value = map(laid_out, draw(case, generator, minilm_file))
        self.grad_out = laid_out(normal(case, generator, case.H, case.N))

    @property
    def inputs(self):
        return self.query, self.key, self.value

    def plan(self, form, **changes):
        options = self.case.selection_options | {"selection": form.selection, "pool": form.pool}
        options |= changes
        return make_plan(self.query, self.key, **options)


@dataclasses.dataclass
class Prepared:
    """A backend ready to run: ``attend(query, key, value)`` on ``inputs``.

    form, plan: what the result is to equal, for the check; form None is not checked. ``plan`` is a
    given Plan, "all" for every pair, or None where the backend selects. ``around()`` is a context
    for every run."""

    attend: Callable
    inputs: tuple
    grad_out: torch.Tensor
    form: Form | None = None
    plan: object = None
    around: Callable = contextlib.nullcontext

    def __post_init__(self):
        self._leaves = tuple(t.detach().requires_grad_() for t in self.inputs)

    def forward(self):
        with torch.no_grad(), self.around():
            return self.attend(*self.inputs)

    def backward(self):
        """Forward and backward: (dq, dk, dv)."""
        with self.around():
            out = self.attend(*self._leaves)
            return torch.autograd.grad(out, self._leaves, self.grad_out)

    def run(self, which):
        """The function to time; it drops its results."""
        function = self.forward if which == "forward" else self.backward

        def run():
            function()

        return run


@dataclasses.dataclass(frozen=True)
class Backend:
    kind: str
    name: str
    setup: Callable
    work: Callable  # pass -> formulas.Work
    form: Form | None = None
    keys: int | None = None  # of each query, where they are not the case's M


EXACT_FORM = Form("none")  # at density 1


def list_backends(case, device_type, kinds=KINDS):
    """Every backend of these kinds that may be tried on a case."""
    backends = []
    exact = functools.partial(formulas.exact_work, case)
    if "exact" in kinds:
        names = SDPA if device_type == "cuda" else ["torch"]
        backends += [
            Backend("exact", f"exact {name}", functools.partial(_exact, name), exact)
            for name in names
        ]
    form = Form("none", 0, case.forms[0].selection)
    if case.picture:  # a plan of blocks that are patches is not one of the sequence
        kinds = [kind for kind in kinds if not kind.startswith("flex")]
    if "flex" in kinds and device_type == "cuda":
        work = functools.partial(formulas.sparse_work, case)
        backends.append(Backend("flex", "flex", functools.partial(_flex, form, None), work))
    if "flex 128" in kinds and device_type == "cuda" and case.block_size != (128, 128):
        wide = dataclasses.replace(
            case, block_size=(128, 128), blocks_per_row=None, density=_density(case)
        )
        work = functools.partial(formulas.sparse_work, wide)
        backends.append(Backend("flex 128", "flex 128", functools.partial(_flex, form, 128), work))
    if "equal pairs" in kinds and not case.is_causal:
        keys = formulas.equal_keys(case)
        work = functools.partial(exact, keys=keys)
        backends.append(Backend("equal pairs", "equal pairs", _equal_pairs, work, keys=keys))
    if "mra" in kinds:
        for form in case.forms:
            setup, work = (
                functools.partial(prepare_mra, form),
                functools.partial(formulas.mra_work, case, form),
            )
            backends.append(Backend("mra", f"mra {form.name}", setup, work, form))
    return backends


def prepare_mra(form, context):
    attend = functools.partial(mra_attention, **context.case.options(form))
    return Prepared(attend, context.inputs, context.grad_out, form)


def _exact(name, context):
    case = context.case
    if name == "math":
        _refuse_large_math(case)
    return Prepared(_sdpa(case, name), context.inputs, context.grad_out, EXACT_FORM, plan="all")


def _sdpa(case, name):
    def attend(query, key, value):
        kernel = sdpa_kernel(SDPA[name]) if name in SDPA else contextlib.nullcontext()
        with kernel, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a kernel refuses is in the error too
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=case.is_causal, enable_gqa=case.H != case.Hk
            )

    return attend


def _refuse_large_math(case):
    """It holds several float32 (N, M) arrays of every head at once."""
    need = 5 * 4 * case.B * case.H * case.N * case.M
    free = torch.cuda.mem_get_info()[0]
    if need > free // 2:
        raise Unsupported(f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def _equal_pairs(context):
    keys = formulas.equal_keys(context.case)
    key, value = (t[:, :, :keys].transpose(1, 2).contiguous().transpose(1, 2)
                  for t in (context.key, context.value))  # fmt: skip
    name = "cudnn" if context.device.type == "cuda" else "torch"
    return Prepared(
        _sdpa(context.case, name), (context.query, key, value), context.grad_out
    )  # fmt: skip


def _density(case):
    """The share of pairs of blocks that the budget allows."""
    rows = case.budgets()
    return sum(taken for _, taken, _ in rows) / sum(seen for _, _, seen in rows)


def _flex(form, block, context):
    from benchmarks.flex import flex_attend

    case = context.case
    if case.is_causal:
        raise Unsupported("its mask would need a function of the diagonal; not set up here")
    changes = {}
    if block is not None:
        changes = {"block_size": block, "density": _density(case), "blocks_per_row": None}
    plan = context.plan(form, **changes)
    if case.N % plan.block_size[0] or case.M % plan.block_size[1]:
        raise Unsupported("N and M are not multiples of the blocks")
    attend, around = flex_attend(plan, case)
    return Prepared(attend, context.inputs, context.grad_out, form, plan, around)
