"""What every test file shares: devices, fresh inputs, the runs of operator and references, and the
rule by which their results are compared (tolerances live here, nowhere else).

Symbols as in docs/notation.md.
"""

import copy
import importlib.util
import math
import secrets
import sys
from pathlib import Path

import pytest
import torch

import mra_attention as mra
from mra_attention.reference import mra_attention_reference

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("out", "lse", "dq", "dk", "dv")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]
HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="this kernel is Hopper's",
)
# (device, dtype) that the operators serve. float64 is the CPU's; CUDA refuses it.
CPU_DTYPES = [("cpu", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
CUDA_DTYPES = [
    pytest.param("cuda", dtype, marks=pytest.mark.gpu)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
DEVICE_DTYPES = CPU_DTYPES + CUDA_DTYPES
# The dtype in which a device can be checked most sharply.
BEST = [("cpu", torch.float64), CUDA_DTYPES[0]]

# A small random model of transformers: arguments of its config.
MODEL_SIZES = dict(
    vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=512,
)  # fmt: skip

SCORES = 2**25  # that a reference makes at once, of a batch: 256 MB in float64

FIXED_SEED = None  # set by `pytest --seed N` where conftest.py offers it


def new_seed():
    """A seed never used before (or the one asked for), printed so that a failure shows it."""
    seed = secrets.randbits(31) if FIXED_SEED is None else FIXED_SEED
    print(f"seed {seed} (repeat with --seed {seed})")
    return seed


def kernels_of(function):
    """Names of the CUDA kernels that a call runs."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]


class Case:
    """Inputs and options of one call. ``masks``: none | key | query | both | padding. Options left
    out are the package's, but ``pool`` is "even": with it every form has one kind of means.

    ``key`` and ``query`` drop rows at random and empty one whole block of the first batch entry;
    ``padding`` keeps a prefix of each sequence, as a batch of texts does."""

    def __init__(
        self, device, dtype, *, B=2, H=4, Hk=2, N=150, M=None, D=16, masks="none", spread=1.5,
        seed=None, **options,
    ):  # fmt: skip
        self.seed = new_seed() if seed is None else seed
        causal = options.get("is_causal", False)
        M = (N if causal else 203) if M is None else M
        options.setdefault("block_size", (32, 32))
        options.setdefault("pool", "even")
        if not {"density", "blocks_per_row"} & set(options):
            options["density"] = 0.3
        self.options, self.device, self.dtype = options, device, dtype
        block = options["block_size"]
        self.block = (block, block) if isinstance(block, int) else block
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

        def heads(*shape):
            # As projections leave them, or contiguous: the gradients then lie alike.
            x = normal(*shape)
            return x.transpose(1, 2).contiguous().transpose(1, 2) if self.seed % 2 else x

        self.q, self.k = spread * heads(B, H, N, D), heads(B, Hk, M, D)
        self.v = heads(B, Hk, M, D)
        self.grad_out = normal(B, H, N, D)
        self.grad_lse = normal(B, H, N).to(torch.promote_types(dtype, torch.float32))
        self.key_mask = self.query_mask = None
        if masks in ("key", "both"):
            self.key_mask = self._random_mask(B, M, self.block[1], g).to(device)
        if masks in ("query", "both"):
            self.query_mask = self._random_mask(B, N, self.block[0], g).to(device)
        if masks == "padding":
            self.key_mask = self._lengths(B, M).to(device)
            self.query_mask = self._lengths(B, N).to(device)

    @staticmethod
    def _random_mask(B, L, block, g):
        mask = torch.rand(B, L, generator=g) < 0.8
        mask[0, block : 2 * block] = False
        mask[:, 0] = True
        return mask

    @staticmethod
    def _lengths(B, L):
        lengths = torch.tensor([max(1, L - b * L // B) for b in range(B)])
        return torch.arange(L) < lengths[:, None]

    @property
    def selection(self):
        names = ("density", "blocks_per_row", "block_size", "selection", "diagonal_blocks",
                 "first_blocks", "is_causal", "scale", "layout", "levels", "pool", "coarse",
                 "order")  # fmt: skip
        return {n: self.options[n] for n in names if n in self.options}

    @property
    def values(self):
        """Options that matter once the plan is made."""
        names = ("block_size", "coarse", "order", "is_causal", "scale", "layout", "pool")
        return {n: self.options[n] for n in names if n in self.options}

    def plan(self):
        return mra.make_plan(self.q, self.k, self.key_mask, self.query_mask, **self.selection)

    def ours(self, plan=None, backward=True):
        """Results of the operator, which makes its own plan unless one is given."""
        options = self.options if plan is None else {**self.values, "plan": plan}
        return self._run(mra.mra_attention, self.dtype, options, backward)

    def reference(self, dtype, dense, backward=True):
        """Results of the reference computed in ``dtype`` with the plan ``dense``, of as many batch
        entries at once as have SCORES scores."""
        options = {**self.values, "plan": dense}
        B, H, N, _ = self.q.shape
        step = max(1, SCORES // (H * N * self.k.shape[2]))
        if step >= B:
            return self._run(mra_attention_reference, dtype, options, backward)
        parts = []
        for first in range(0, B, step):
            part, own = copy.copy(self), slice(first, first + step)
            for name, x in vars(self).items():
                if isinstance(x, torch.Tensor):
                    setattr(part, name, x[own])
            levels = isinstance(dense, (list, tuple))
            plan = [x[own] for x in dense] if levels else dense[own]
            parts.append(part.reference(dtype, plan, backward))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _run(self, function, dtype, options, backward):
        # New leaves with the strides of the inputs: what a layout does is part of a test.
        q, k, v = (t.detach().to(dtype).requires_grad_(backward) for t in (self.q, self.k, self.v))
        out, lse = function(
            q, k, v, self.key_mask, self.query_mask, **options, return_lse=True
        )  # fmt: skip
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == q.shape[:3]
        results = [out, lse]
        if backward:
            grads = (self.grad_out.to(out.dtype), self.grad_lse.to(lse.dtype))
            results += torch.autograd.grad((out, lse), (q, k, v), grads)
        return {n: t.detach() for n, t in zip(NAMES, results, strict=False)}

    def check(self, backward=True, staged=False):
        """Operator against both references, with ``staged`` given the plan, too: other kernels may
        make the parts of a call that makes its own. Returns the operator's results."""
        plan = self.plan()
        dense = plan.to_dense()
        ours = self.ours(backward=backward)
        exact = self.reference(torch.float64, dense, backward)
        same = None
        if self.dtype != torch.float64:
            same = self.reference(self.dtype, dense, backward)
        compare(ours, same, exact, self.dtype, self.device, f"seed {self.seed}")
        if staged or self.is_short_head:  # with a plan given the stages run one by one
            staged = self.ours(plan, backward)
            compare(staged, same, exact, self.dtype, self.device, f"staged, seed {self.seed}")
        return ours

    @property
    def is_short_head(self):
        """Whether a forward that makes its own plan may be one launch (csrc/cuda/head.h)."""
        N, D = self.q.shape[2:]
        half = self.dtype in (torch.bfloat16, torch.float16)
        short = max(N, self.k.shape[2]) <= 512 and D <= 64
        others = {"levels", "layout", "is_causal"} & {n for n, v in self.options.items() if v}
        return self.device == "cuda" and half and short and not others


def relative_error(x, exact):
    """||x - exact|| / ||exact|| over the finite entries; the others must be equal."""
    x, exact = x.double(), exact.double()
    finite = exact.isfinite()
    assert torch.equal(x[~finite], exact[~finite]), "infinities differ"
    x, exact = x[finite], exact[finite]
    error, size = (x - exact).norm().item(), exact.norm().item()
    assert not math.isnan(error), "NaN in the result"
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def limit(dtype, device, same_error, tf32=False):
    """The largest relative error that passes.

    float64: 1e-12. float32 on CUDA: 1e-5 (products through three TF32 ones). Otherwise twice the
    error of PyTorch in the same dtype, and never less than half a unit in the last place: no
    result of that dtype can be asked to be better than correctly rounded."""
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32 and device == "cuda" and not tf32:
        return 1e-5
    return max(2 * same_error, torch.finfo(dtype).eps / 2)


def compare(ours, same, exact, dtype, device, note="", tf32=False):
    """Asserts the rule for every result; ``same`` and ``exact`` are the references' results."""
    lines, good = [], True
    for name, got in ours.items():
        error = relative_error(got, exact[name])
        same_error = relative_error(same[name], exact[name]) if same is not None else 0.0
        allowed = limit(dtype, device, same_error, tf32)
        lines.append(
            f"{name}: {error:.3g} (same-dtype PyTorch {same_error:.3g}, limit {allowed:.3g})"
        )
        good = good and error <= allowed
    assert good, "\n".join([note, *lines])


def assert_same_bits(first, second):
    for name in first:
        a, b = first[name], second[name]
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        assert torch.equal(a, b), name


def tiers(nq, nk, bq, bk, N, diagonal_blocks=0, first_blocks=0, selection="row", is_causal=False):
    """How strongly each pair is forced, in plain loops: (nq, nk) float64, -inf where no pair is.

    4 for a pair that the diagonal crosses, else the number of forcing conditions that it meets."""
    tier = torch.zeros(nq, nk, dtype=torch.float64)
    for x in range(nq):
        first, last = x * bq, min((x + 1) * bq, N) - 1  # its queries
        for y in range(nk):
            if diagonal_blocks > 0:
                reach = diagonal_blocks // 2 * max(bq, bk)
                # key block y overlaps [x bq - reach, (x+1) bq + reach)
                if (y + 1) * bk > x * bq - reach and y * bk < (x + 1) * bq + reach:
                    tier[x, y] += 1
            tier[x, y] += y < first_blocks
            tier[x, y] += selection == "global" and x < first_blocks
            if is_causal and y * bk > last:
                tier[x, y] = -math.inf
            elif is_causal and (y + 1) * bk > first:
                tier[x, y] = 4
    return tier


def aoti_example():
    """A module that AOTInductor compiles, called with query, key and value of head dim 16."""

    class Doubled(torch.nn.Module):
        def forward(self, q, k, v):
            return mra.mra_attention(2 * q, k, v, density=0.3, block_size=32) + q

    return Doubled()


def aoti_package(device, folder):
    """aoti_example() compiled by AOTInductor into ``folder``, for any batch size and length."""
    q, k, v = torch.randn(3, 2, 2, 70, 16, device=device)
    dims = {0: torch.export.Dim("B", min=1), 2: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(aoti_example(), (q, k, v), dynamic_shapes=(dims,) * 3)
        path = folder / "attention.pt2"
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_minilm_inputs():
    """The module examples/minilm.py, or a skip that says what is missing."""
    spec = importlib.util.spec_from_file_location("minilm", ROOT / "examples" / "minilm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["minilm"] = module
    spec.loader.exec_module(module)
    missing = module.have_minilm()
    if missing:
        pytest.skip(f"real inputs need: pip install {' '.join(missing)}")
    return module
