"""The plan: which pairs of blocks are exact, chosen once and used everywhere."""

import dataclasses

import torch
from torch.utils import _pytree as pytree

from .config import check_block_size, check_flag, check_int, check_layout
from .layout import Tiles, check_length

__all__ = ["Plan"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Row lists (CSR) of the exact pairs of blocks, per batch and query head.

    Query block x of a head attends exactly to the key blocks
    ``row_index[row_start[x] : row_start[x] + row_count[x]]``, ascending; what lies between the
    lists means nothing. Made by :func:`mra_attention.make_plan` or :meth:`from_dense`; passed to
    ``mra_attention(..., plan=plan)``. Works inside ``torch.compile`` and is a pytree node.

    row_start, row_count: int32 (B, H, nq). row_index: int32 (B, H, capacity).
    N, M: numbers of queries and keys. block_size: (bq, bk). nq = ceil(N / bq), nk = ceil(M / bk).
    layout: None, or (H, W) or (T, H, W): blocks are then those of :class:`layout.Tiles`, patches of
        a picture, and nq and nk count them, leading ones with the tokens that fill them up.
    levels: the coarser resolutions (block, cells per row), coarsest first, of a plan that has them.
        The row tensors then hold their lists too, (B, H, nq + ...): behind those of ``block_size``
        come the cells of blocks that were split, of ``levels[-1]`` first, of ``levels[0]`` last.
    """

    row_start: torch.Tensor
    row_count: torch.Tensor
    row_index: torch.Tensor
    N: int
    M: int
    block_size: tuple[int, int]
    is_causal: bool = False
    layout: tuple[int, ...] | None = None
    levels: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_dense(cls, mask, N, M, block_size=64, is_causal=False, layout=None):
        """Plan of a block mask: bool (B, H, nq, nk), True = exact. block_size: int or (bq, bk).

        With ``is_causal``, pairs that the diagonal crosses are added and pairs wholly in the future
        left out: the first are always exact, the second don't exist. layout: see the class.

        Raises TypeError or ValueError that names the argument."""
        block_size = as_pair(block_size)
        check_int("N", N, 1)
        check_int("M", M, 1)
        check_flag("is_causal", is_causal)
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"mask: got {kind}, expected a bool tensor (B, H, nq, nk)")
        layout = tuple(layout) if isinstance(layout, (list, torch.Size)) else layout
        check_layout(layout)
        if layout is not None:
            check_length(layout, N, M)
            if is_causal:
                raise ValueError(f"is_causal: got True with layout={layout}, expected False")
        nq, nk = (blocks(n, b, layout, block_size) for n, b in zip((N, M), block_size, strict=True))
        if mask.dim() != 4 or mask.shape[2] != nq or mask.shape[3] != nk:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected (B, H, {nq}, {nk}) for N={N}, "
                f"M={M} and block_size={block_size}{_of(layout)}"
            )
        y = torch.arange(nk, dtype=torch.int32, device=mask.device)
        if is_causal:
            if N != M:
                raise ValueError(f"is_causal: got True with N={N}, M={M}, expected N == M")
            x = torch.arange(nq, dtype=torch.int32, device=mask.device)[:, None]
            past = (y + 1) * block_size[1] <= x * block_size[0]
            exists = y * block_size[1] < ((x + 1) * block_size[0]).clamp(max=N)
            mask = (mask | ~past) & exists
        count = mask.sum(-1, dtype=torch.int32)
        # One slot of nk entries per row: no size depends on data. Sorting moves the rest behind.
        index = torch.where(mask, y, nk).sort(-1).values.flatten(2)
        start = torch.arange(0, nq * nk, nk, dtype=torch.int32, device=mask.device)
        start = start.expand(count.shape).contiguous()
        return cls(start, count, index, N, M, block_size, is_causal, layout)

    @property
    def B(self):
        return self.row_start.shape[0]

    @property
    def H(self):
        return self.row_start.shape[1]

    @property
    def nq(self):
        return self._blocks(self.N, self.block_size[0])

    @property
    def nk(self):
        return self._blocks(self.M, self.block_size[1])

    @property
    def shape(self):
        """(B, H, N, M)"""
        return (self.B, self.H, self.N, self.M)

    @property
    def device(self):
        return self.row_start.device

    def density(self):
        """Exact pairs of blocks over all B * H * nq * nk pairs, a float. Waits for the device."""
        pairs = self.B * self.H * self.nq * self.nk
        exact = self.row_count[..., : self.nq]
        return exact.sum(dtype=torch.int64).item() / max(pairs, 1)

    def to_dense(self, level=None):
        """bool (B, H, nq, nk), True where a pair of blocks is exact. No wait for the device.

        level: an index into ``levels``: True where a cell of its blocks is split instead."""
        first, nq, nk = self._rows(level)
        start, count = (x[..., first : first + nq] for x in (self.row_start, self.row_count))
        t = torch.arange(nk, dtype=torch.int32, device=self.device)
        at = start.unsqueeze(-1) + t  # a row has at most nk entries
        capacity = self.row_index.shape[-1]
        at = at.clamp(0, max(capacity - 1, 0)).flatten(2).long()
        y = self.row_index.gather(-1, at).view(self.B, self.H, nq, nk)
        live = (t < count.unsqueeze(-1)) & (y >= 0) & (y < nk)
        # Column nk takes what isn't in a list.
        y = torch.where(live, y, nk).long()
        dense = torch.zeros(self.B, self.H, nq, nk + 1, dtype=torch.bool, device=self.device)
        return dense.scatter(-1, y, True)[..., :nk]

    def _rows(self, level):
        """(first row, rows, columns) of a level's lists, or of the exact ones."""
        if level is None:
            return 0, self.nq, self.nk
        sizes = [block for block, _ in self.levels]
        block = sizes[level]
        finer = sizes[range(len(sizes))[level] + 1 :]
        first = self.nq + sum(self._blocks(self.N, size) for size in finer)
        return first, self._blocks(self.N, block), self._blocks(self.M, block)

    @property
    def lengths(self):
        """(N, M), with a layout the places in its blocks: those that fill up leading ones too."""
        if self.layout is None:
            return self.N, self.M
        sizes = all_blocks(self.block_size, self.levels)
        return (Tiles.of(self.layout, self.N, sizes).length,) * 2

    def _blocks(self, length, block):
        return blocks(length, block, self.layout, all_blocks(self.block_size, self.levels))

    def to(self, device):
        """The same plan on another device."""
        lists = (self.row_start, self.row_count, self.row_index)
        return dataclasses.replace(
            self,
            **{f.name: t.to(device) for f, t in zip(dataclasses.fields(self), lists, strict=False)},
        )

    def plot(self, batch=0, head=0, ax=None):
        """Draws one head's plan with matplotlib; returns the axes."""
        from .plot import plot_plan

        return plot_plan(self, batch=batch, head=head, ax=ax)

    def __repr__(self):
        return (
            f"Plan(shape={self.shape}, block_size={self.block_size}, is_causal={self.is_causal}"
            f"{_of(self.layout)}, blocks=({self.nq}, {self.nk})"
            f"{f', levels={self.levels}' if self.levels else ''})"
        )

    def __str__(self):
        if self.row_start.numel() == 0 or self.row_start.is_meta:
            return repr(self)
        head = f"{repr(self)[:-1]}, density={self.density():.2%}\n"
        return f"{head}(0, 0)\n{_picture(self.to_dense()[0, 0])}\n)"


def _picture(dense, most=32):
    """Text picture of a bool (nq, nk): two characters a cell, darker for a larger exact share."""
    nq, nk = dense.shape
    rows, columns = min(nq, most), min(nk, most)
    share = torch.nn.functional.adaptive_avg_pool2d(dense[None].float().cpu(), (rows, columns))[0]
    shade = lambda p: "██" if p >= 1 else "▓▓" if p > 0.5 else "░░" if p > 0 else "··"  # noqa: E731
    return "\n".join("".join(shade(p) for p in row) for row in share.tolist())


def blocks(length, block, layout=None, sizes=None):
    """How many blocks ``length`` tokens make, the last may be short; with a layout, those of its
    tokens for the block sizes ``sizes``."""
    if layout is not None:
        length = Tiles.of(layout, length, sizes).length
    return -(-length // block)


def all_blocks(block_size, levels):
    """The sizes of all blocks: block_size (bq, bk) and those of levels."""
    return (*block_size, *(block for block, _ in levels))


def _of(layout):
    return "" if layout is None else f", layout={layout}"


def as_pair(block_size):
    """block_size as (block_q, block_k), checked."""
    if isinstance(block_size, list):
        block_size = tuple(block_size)
    check_block_size(block_size)
    return block_size if isinstance(block_size, tuple) else (block_size, block_size)


def _flatten(plan):
    lists = [plan.row_start, plan.row_count, plan.row_index]
    return lists, (
        plan.N, plan.M, plan.block_size, plan.is_causal, plan.layout, plan.levels
    )  # fmt: skip


pytree.register_pytree_node(
    Plan,
    _flatten,
    lambda lists, rest: Plan(*lists, *rest),
    serialized_type_name="mra_attention.Plan",
)
