"""What is measured: cases (shapes and budget), forms (what MRA does with them), and their goals."""

import dataclasses
import itertools
import math

import torch

from mra_attention.flops import rows_of_blocks

INPUTS = ("normal", "offset", "correlated", "minilm")  # inputs.py and minilm.py make them
PASSES = ("forward", "backward")  # "backward" is forward and backward together, as in training
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Unsupported(Exception):
    """A backend or a kind of inputs does not take this case; the text says why."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What stands for the blocks that are not selected, and how blocks are selected."""

    coarse: str
    order: int = 0
    selection: str = "row"
    pool: str = "even"

    @property
    def name(self):
        name = self.coarse + (" + order 1" if self.order else "")
        name = name if self.selection == "row" else f"{name}, {self.selection}"
        return name if self.pool == "even" else f"{name}, {self.pool}"


FORMS = (Form("none"), Form("block"), Form("block", 1), Form("row"), Form("row", 1))
ROW1 = Form("row", 1)  # of even means
DEFAULT = Form("row", 1, pool="centred")  # the package's, where levels don't rule it out
WEIGHTED_FORMS = (DEFAULT, Form("row", 1, pool="sampled"))
# MRA-2 and MRA-2-s are the paper's; then its budget with row selection, and row + order 1.
PAPER_FORMS = (Form("block", 0, "global"), Form("none", 0, "global"), Form("block"), ROW1, DEFAULT)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a case is to reach, each (forward, forward + backward) or None.

    ms: end to end. exact: times as fast as the fastest exact attention of the same run. paper_ms:
    the figures of the paper's kernels, and ``paper`` how many times faster we are to be."""

    form: Form = ROW1
    ms: tuple | None = None
    exact: tuple | None = (1.0, 1.0)
    paper_ms: tuple | None = None
    paper: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: query (B, H, N, D), key and value (B, Hk, M, D), and the budget."""

    name: str
    B: int
    H: int
    N: int
    D: int
    Hk: int | None = None
    M: int | None = None
    dtype: str = "bf16"
    block_size: tuple = (64, 64)
    density: float | None = None
    blocks_per_row: int | None = None
    diagonal_blocks: int = 0
    first_blocks: int = 0
    is_causal: bool = False
    levels: tuple = ()
    picture: tuple = ()  # (H, W) or (T, H, W) of the tokens, for MRA
    inputs: str = "normal"
    forms: tuple = (*FORMS, DEFAULT)
    goal: Goal = Goal(exact=None)

    def __post_init__(self):
        object.__setattr__(self, "Hk", self.Hk or self.H)
        object.__setattr__(self, "M", self.M or self.N)

    @property
    def torch_dtype(self):
        return DTYPES[self.dtype]

    @property
    def nq(self):
        return -(-self.N // self.block_size[0])

    @property
    def nk(self):
        return -(-self.M // self.block_size[1])

    def budgets(self):
        """[(queries, exact key blocks, existing key blocks)] of each query block of a head."""
        budget = self.density, self.blocks_per_row
        return rows_of_blocks(self.N, self.M, *self.block_size, *budget, self.is_causal)

    @property
    def selection_options(self):
        """What make_plan takes, besides ``selection``."""
        names = ("density", "blocks_per_row", "block_size", "diagonal_blocks", "first_blocks",
                 "is_causal", "levels")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def options(self, form):
        """Keyword arguments of mra_attention."""
        layout = {"layout": self.picture} if self.picture else {}
        return self.selection_options | dataclasses.asdict(form) | layout

    def describe(self):
        budget = (
            f"{self.blocks_per_row} blocks a row"
            if self.blocks_per_row is not None
            else f"density {ratio(self.density)}"
        )
        kv = "" if (self.Hk, self.M) == (self.H, self.N) else f" Hk{self.Hk} M{self.M}"
        blocks = sides(self.block_size)
        levels = "".join(f", {cells} cells of {block}" for block, cells in self.levels)
        causal = ", causal" if self.is_causal else ""
        causal += f", layout {'x'.join(map(str, self.picture))}" if self.picture else ""
        inputs = f", {self.inputs} inputs" if self.inputs != "normal" else ""
        return (
            f"B{self.B} H{self.H} N{self.N} D{self.D}{kv} {self.dtype}, blocks of {blocks}, "
            f"{budget}{levels}{causal}{inputs}"
        )


def ratio(p):
    """A density as it is said: 1/16, or decimals where it is no such share."""
    if p is None:
        return "1/8"
    return f"1/{round(1 / p)}" if p < 1 and math.isclose(p * round(1 / p), 1) else f"{p:g}"


def sides(block_size):
    """A block as it is said: 64, or 64x32 where queries and keys differ."""
    return "x".join(map(str, dict.fromkeys(block_size)))


def _case(name, B, H, N, D, goal_ms, **options):
    options.setdefault("density", 1 / 16)
    goal = Goal(ms=goal_ms, **options.pop("goal", {}))
    return Case(name, B, H, N, D, goal=goal, **options)


def _paper_case(name, B, H, N, blocks_per_row, goal_ms, paper_ms, **goal):
    goal |= {"form": PAPER_FORMS[0], "paper_ms": paper_ms, "paper": 10.0}
    options = {"block_size": (32, 32), "density": None, "blocks_per_row": blocks_per_row}
    return _case(name, B, H, N, 64, goal_ms, goal=goal, forms=PAPER_FORMS, **options)


CUDA_CASES = (
    _case("A", 1, 16, 16384, 64, (0.20, 0.75)),
    _case("B", 1, 16, 16384, 128, (0.29, 1.15)),
    _case("C", 4, 16, 4096, 128, (0.11, 0.50)),
    _case("D", 1, 8, 65536, 128, (2.3, 8.6)),
    _paper_case("E", 8, 12, 4096, 8, (0.18, 0.75), (3.94, 10.8)),
    _paper_case("F", 64, 12, 512, 4, (0.13, 0.58), (2.57, 7.36), exact=None),
)
CPU_CASES = (
    _case("CPU1", 1, 8, 8192, 64, None, dtype="fp32", goal={"exact": (5.0, 4.0)}),
    _case("CPU2", 1, 8, 512, 64, None, dtype="fp32", density=1 / 4,
          goal={"exact": (1 / 1.3, 1 / 1.3)}),
)  # fmt: skip
CASES = {case.name: case for case in CUDA_CASES + CPU_CASES}


def pick_cases(args, device_type):
    """The cases that the command line asks for. Changing a named case drops its goal and marks its
    name with a star: it is another problem."""
    if args.case:
        unknown = [name for name in args.case if name not in CASES]
        if unknown:
            raise SystemExit(
                f"--case: got {', '.join(unknown)}, expected some of {', '.join(CASES)}"
            )
        cases = [CASES[name] for name in args.case]
    elif args.shape:
        cases = []
    else:
        cases = list(CPU_CASES if device_type == "cpu" else CUDA_CASES)
    dtype = "fp32" if device_type == "cpu" else "bf16"
    cases += [Case(f"shape{i + 1}", *shape, Hk=args.kv_heads, M=args.kv_len, dtype=dtype,
                   density=1 / 16) for i, shape in enumerate(args.shape or [])]  # fmt: skip
    changes = _changes(args)
    for case in cases if args.picture else ():
        if len(args.picture) not in (2, 3) or math.prod(args.picture) != case.N or args.causal:
            raise SystemExit(
                f"--picture: got {args.picture} for {case.N} tokens, expected H,W or T,H,W of as "
                "many, and no --causal"
            )
    return [_changed(case, changes) for case in cases] if changes else cases


def _changes(args):
    names = ("dtype", "block_size", "density", "blocks_per_row", "diagonal_blocks", "first_blocks")
    changes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if "density" in changes:
        changes["blocks_per_row"] = None
    elif "blocks_per_row" in changes:
        changes["density"] = None
    if args.causal:
        changes["is_causal"] = True
    if args.picture:
        changes["picture"] = tuple(args.picture)
    if args.inputs != "normal":
        changes["inputs"] = args.inputs
    if args.coarse or args.order or args.selection or args.pool:
        forms = itertools.product(
            args.coarse or ["row"], args.order or [1], args.selection or ["row"],
            args.pool or ["even"],
        )  # fmt: skip
        forms = (Form(c, o if c != "none" else 0, s, p if c == "row" else "even")
                 for c, o, s, p in forms)  # fmt: skip
        changes["forms"] = tuple(dict.fromkeys(forms))
    return changes


def _changed(case, changes):
    if set(changes) == {"forms"} or case.name.startswith("shape"):
        return dataclasses.replace(case, **changes)
    return dataclasses.replace(case, name=case.name + "*", goal=Goal(exact=None), **changes)
