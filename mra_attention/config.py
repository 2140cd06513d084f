"""Options of MRA attention: one frozen object, and the one place where Python checks them."""

import dataclasses
import math

import torch

__all__ = ["MRAConfig"]

BLOCK_SIZES = (16, 32, 64, 128)
COARSE = ("none", "block", "row")
SELECTION = ("row", "global")
POOL = ("even", "centred", "sampled")
CAUSAL_POOL = POOL[:2]  # those that go with is_causal
MAX_LEVEL_BLOCK = 2**30
DEFAULT_DENSITY = 1 / 8  # when neither budget is given


@dataclasses.dataclass(frozen=True)
class MRAConfig:
    """What :func:`mra_attention.mra_attention` takes from ``density`` on, as one object.

    It says how to approximate. What belongs to one call isn't in it: masks, is_causal, scale.

    density: share of the key blocks that each query block may take, in (0, 1]: one for all heads,
        or a tuple of one for each query head, as :func:`mra_attention.calibrate` gives them out.
        The latter with selection "row" and without levels.
    blocks_per_row: that number itself, at least 1. Give one of the two, or neither: density 1/8.
    block_size: rows in a block, 16, 32, 64 or 128; an int, or (query block, key block).
    coarse: what a block outside the plan contributes: "row" its pooled keys and values to each
        query, "block" (MRA-2) one weight for the whole query block, "none" (MRA-2-s) nothing.
    order: 1 adds the damped first-order term of the coarse part, 0 leaves it out.
    selection: "row" gives every query block its own budget, "global" ranks the head's whole map.
    diagonal_blocks, first_blocks: blocks taken first, inside the budget.
    layout: (H, W) or (T, H, W) of a picture's or a video's tokens in raster order: blocks are then
        patches of it (:mod:`mra_attention.layout`). Tokens beyond H * W come first (a class token,
        registers) and have blocks of their own. None: blocks are runs of the sequence.
    levels: coarser resolutions above ``block_size``, coarsest first, each (block, cells per row):
        ``((1024, 8), (256, 16))``. Blocks are powers of two, each at least twice the next. Cells
        of the first one are the candidates; the best of each row are split into cells of the next,
        those of ``block_size`` are exact within the budget, and a cell that isn't split is coarse
        at its own size. Selection "row". See docs/algorithm.md.
    pool: how the keys of a block weigh in its mean under coarse "row": "even" all the same,
        "centred" as the head's mean query weighs them, "sampled" as a sample of 14 of its queries
        does. The last two err less where queries agree on some keys; without levels, and under
        is_causal "centred" alone. Selection is by the centred score then: what all queries agree on
        counts less. The gradient of "centred" is whole but for the selection, that of "sampled"
        takes its weights for those of "centred" (docs/algorithm.md). "auto" is "centred" for coarse
        "row" with order 1, without levels, and "even" for everything else.

    Raises TypeError or ValueError that names the option. Hashable; equal by value.
    """

    density: float | tuple[float, ...] | None = None
    blocks_per_row: int | None = None
    block_size: int | tuple[int, int] = 64
    coarse: str = "row"
    order: int = 1
    selection: str = "row"
    diagonal_blocks: int = 0
    first_blocks: int = 0
    layout: tuple[int, ...] | None = None
    levels: tuple[tuple[int, int], ...] = ()
    pool: str = "auto"

    def __post_init__(self):
        if isinstance(self.block_size, list):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        if isinstance(self.layout, (list, torch.Size)):
            object.__setattr__(self, "layout", tuple(self.layout))
        if isinstance(self.density, list):
            object.__setattr__(self, "density", tuple(self.density))
        check_budget(self.density, self.blocks_per_row)
        check_block_size(self.block_size)
        check_choice("coarse", self.coarse, COARSE)
        check_order(self.order)
        check_choice("selection", self.selection, SELECTION)
        check_int("diagonal_blocks", self.diagonal_blocks, 0)
        check_int("first_blocks", self.first_blocks, 0)
        check_layout(self.layout)
        object.__setattr__(self, "levels", as_levels(self.levels, self.block_size, self.selection))
        check_pool(self.pool, self.coarse, self.levels)
        check_head_density(self.density, self.selection, self.levels)

    @classmethod
    def mra2(cls, blocks_per_row=4, **options):
        """The paper's MRA-2: blocks of 32, global selection, block means for the rest, order 0.

        ``options`` overrides any field; ``density=`` takes the place of ``blocks_per_row``."""
        return cls(**_preset(blocks_per_row, options, coarse="block"))

    @classmethod
    def mra2_s(cls, blocks_per_row=4, **options):
        """The paper's MRA-2-s: as :meth:`mra2`, but what isn't selected is dropped."""
        return cls(**_preset(blocks_per_row, options, coarse="none"))

    def replace(self, **options):
        """A copy with these fields changed. Setting one budget clears the other."""
        if options.get("density") is not None:
            options.setdefault("blocks_per_row", None)
        if options.get("blocks_per_row") is not None:
            options.setdefault("density", None)
        return dataclasses.replace(self, **options)


def _preset(blocks_per_row, options, **fields):
    fields.update(block_size=32, selection="global", order=0)
    if options.get("density") is None:
        fields["blocks_per_row"] = blocks_per_row
    return {**fields, **options}


# Checks. Each returns nothing and raises "name: got ..., expected ...", as the C++ checks do.


def check_config(config):
    if not isinstance(config, MRAConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected an MRAConfig")


def check_budget(density, blocks_per_row):
    """At most one budget; density in (0, 1], or a tuple of such; blocks_per_row at least 1."""
    if density is not None:
        if blocks_per_row is not None:
            raise ValueError(
                f"density and blocks_per_row: got both ({density!r} and {blocks_per_row!r}), "
                "expected at most one"
            )
        if isinstance(density, tuple) and not density:
            raise ValueError("density: got (), expected a number for each query head")
        for number in density if isinstance(density, tuple) else (density,):
            check_number("density", number)
            if not 0 < number <= 1:  # written so that NaN fails too
                raise ValueError(f"density: got {density!r}, expected numbers in (0, 1]")
    if blocks_per_row is not None:
        check_int("blocks_per_row", blocks_per_row, 1)


def check_block_size(block_size):
    """An int of BLOCK_SIZES, or a pair of them."""
    pair = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    accepted = "expected 16, 32, 64 or 128, or a pair (query block, key block) of them"
    if not all(isinstance(b, int) and not isinstance(b, bool) for b in pair):
        raise TypeError(f"block_size: got {block_size!r}, {accepted}")
    if len(pair) != 2 or not all(b in BLOCK_SIZES for b in pair):
        raise ValueError(f"block_size: got {block_size!r}, {accepted}")


def check_layout(layout):
    """None, or two or three positive ints."""
    if layout is None:
        return
    accepted = "expected None, (H, W) or (T, H, W)"
    if not isinstance(layout, tuple) or not all(
        isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in layout
    ):
        raise TypeError(f"layout: got {layout!r}, {accepted} with ints")
    if len(layout) not in (2, 3) or not all(n > 0 for n in layout):
        raise ValueError(f"layout: got {layout!r}, {accepted} with ints of at least 1")


def as_levels(levels, block_size, selection="row"):
    """levels as a tuple of pairs of ints, checked beside block_size and selection."""
    accepted = "expected pairs (block, cells per row), coarsest first"
    sequences, integers = (tuple, list), (int, torch.SymInt)
    if not isinstance(levels, sequences) or not all(isinstance(p, sequences) for p in levels):
        raise TypeError(f"levels: got {levels!r}, {accepted}")
    if any(not isinstance(n, integers) or isinstance(n, bool) for p in levels for n in p):
        raise TypeError(f"levels: got {levels!r}, {accepted}")
    if any(len(p) != 2 for p in levels):
        raise ValueError(f"levels: got {levels!r}, {accepted}")
    pairs = [tuple(p) for p in levels]
    below = max(block_size) if isinstance(block_size, tuple) else block_size
    for block, cells in reversed(pairs):
        if block < 2 * below or block > MAX_LEVEL_BLOCK or block & (block - 1):
            raise ValueError(
                f"levels: got block {block} above {below}, expected a power of two, at least twice "
                f"what follows and at most {MAX_LEVEL_BLOCK}"
            )
        if cells < 1:
            raise ValueError(
                f"levels: got {cells} cells per row for block {block}, expected at least 1"
            )
        below = block
    if pairs and selection != "row":
        raise ValueError(f"levels: got selection {selection!r}, expected 'row' beside levels")
    return tuple(pairs)


def check_pool(pool, coarse, levels):
    check_choice("pool", pool, ("auto", *POOL))
    if pool in ("auto", "even"):
        return
    if coarse != "row":
        raise ValueError(
            f"pool: got {pool!r} with coarse {coarse!r}, expected coarse 'row' beside it"
        )
    if levels:
        raise NotImplementedError(f"pool: got {pool!r} with levels, expected 'even' beside levels")


def mean_density(density):
    """density, or its mean over the heads."""
    return sum(density) / len(density) if isinstance(density, tuple) else density


def check_head_density(density, selection, levels):
    """One density for all heads, unless selection is by row and without levels."""
    if isinstance(density, tuple) and (selection != "row" or levels):
        beside = "levels" if levels else f"selection {selection!r}"
        raise NotImplementedError(
            f"density: got one for each head with {beside}, expected one for all heads, or "
            "selection 'row' without levels"
        )


def resolve_pool(pool, coarse, order, levels):
    """The one of POOL that ``pool`` stands for in a call: what operators take in place of "auto".

    Others than "auto" stay what they are, also where they will be refused."""
    if pool != "auto":
        return pool
    # len, as torch.compile takes no truth of a tuple with symbols
    weighted = coarse == "row" and order == 1 and len(levels) == 0
    return "centred" if weighted else "even"


def pool_of(config):
    """The one of POOL that calls with ``config`` run."""
    return resolve_pool(config.pool, config.coarse, config.order, config.levels)


def check_choice(name, value, accepted):
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}, expected one of {accepted}")
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, expected one of {accepted}")


def check_order(order):
    check_int("order", order, 0)
    if order > 1:
        raise ValueError(f"order: got {order!r}, expected 0 or 1")


def check_int(name, value, least):
    # A SymInt stands for an int while a program is traced.
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")


def check_number(name, value):
    if not isinstance(value, (int, float, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a number")


def check_scale(scale):
    if scale is not None:
        check_number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale: got {scale!r}, expected a finite number")


def check_exact_below(exact_below):
    """None, "auto" or a number of tokens."""
    accepted = "expected None, an int of at least 0 or 'auto'"
    if exact_below is None or (isinstance(exact_below, str) and exact_below == "auto"):
        return
    if isinstance(exact_below, str) or (type(exact_below) is int and exact_below < 0):
        raise ValueError(f"exact_below: got {exact_below!r}, {accepted}")
    if isinstance(exact_below, bool) or not isinstance(exact_below, (int, torch.SymInt)):
        raise TypeError(f"exact_below: got {exact_below!r}, {accepted}")


def check_flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
