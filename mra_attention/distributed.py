"""Attention over sequences that are split among processes.

Queries, keys and values lie split along the sequence, as sequence-parallel training has them. One
all-to-all gives each process whole sequences of some heads, where MRA attention runs as on one
device, and another takes the result back. Only torch's own collectives.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .functional import mra_attention

__all__ = ["sequence_parallel_attention"]


def sequence_parallel_attention(
    query, key, value, key_mask=None, query_mask=None, *, mesh, return_lse=False, **options
):
    """:func:`mra_attention.mra_attention` of sequences split among the processes of ``mesh``.

    Each of W processes, in the order of their ranks, gives its part, all of one size: query
    (B, H, N / W, D), key and value (B, Hk, M / W, D), the masks bool (B, M / W) and (B, N / W), on
    every process or on none. Fill up a sequence that W does not divide, and mask what was added.
    Results are those of one device, as every head is computed whole by one process; so are the
    gradients, through all-to-alls of their own.

    mesh: a :class:`~torch.distributed.device_mesh.DeviceMesh` of one dimension (``mesh["sp"]`` of a
        larger one), or a process group. W must divide H, and divide Hk or be a multiple of it.
    return_lse, options: as for ``mra_attention``; ``plan`` is not taken, nor "centred" and
        "sampled" as ``pool`` where W does not divide Hk: they need all query heads of a key head in
        one place. There "auto" is "even", and results are those of one device with that.

    Returns this process's part of out, (B, H, N / W, D), and with ``return_lse`` that of lse,
    (B, H, N / W). Raises TypeError or ValueError that names the argument."""
    group = _group(mesh)
    W, H, Hk = dist.get_world_size(group), query.shape[1], key.shape[1]
    if "plan" in options:
        raise TypeError("plan: got one, expected none where processes have some of the heads each")
    if H % W or (Hk % W and W % Hk):
        raise ValueError(
            f"mesh: got {W} processes for {H} query heads and {Hk} key heads, expected a number "
            "that divides the query heads, and divides the key heads or is a multiple of them"
        )
    config = options.get("config")
    options |= _own_densities(config, options.get("density"), dist.get_rank(group), W, H)
    config = options.get("config")
    pool = options.get("pool", "auto") if config is None else config.pool
    if Hk % W and pool == "auto":
        even = {"pool": "even"} if config is None else {"config": config.replace(pool="even")}
        options |= even
    elif Hk % W and pool != "even":
        raise NotImplementedError(
            f"pool: got {pool!r} for {W} processes and {Hk} key heads, expected 'even' where "
            "processes share a key head"
        )
    if Hk % W:  # several processes need the same key head
        key, value = (x.repeat_interleave(W // Hk, 1) for x in (key, value))
    query, key, value = (_to_heads(x, W, group) for x in (query, key, value))
    key_mask, query_mask = (_gathered(x, W, group) for x in (key_mask, query_mask))
    out, lse = mra_attention(query, key, value, key_mask, query_mask, return_lse=True, **options)
    out = _to_sequence(out, W, group)
    if not return_lse:
        return out
    return out, _to_sequence(lse.unsqueeze(-1), W, group).squeeze(-1)


def _own_densities(config, density, rank, W, H):
    """The option that has the densities of this process's heads, where each head has its own."""
    density = density if config is None else config.density
    if not isinstance(density, (tuple, list)):
        return {}
    if len(density) != H:
        raise ValueError(
            f"density: got {len(density)} numbers, expected one, or one for each of the {H} heads "
            "of query"
        )
    own = tuple(density[rank * H // W : (rank + 1) * H // W])
    return {"density": own} if config is None else {"config": config.replace(density=own)}


def _group(mesh):
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh: got {mesh.ndim} dimensions, expected 1: a slice of the mesh")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh: got {type(mesh).__name__}, expected a DeviceMesh or ProcessGroup")
    return mesh


class _AllToAll(torch.autograd.Function):
    """Part w of x [W, ...] to process w; part w of the result is what process w gave. Its own
    transpose."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


def _to_heads(x, W, group):
    """(B, H, L / W, D) of all heads to (B, H / W, L, D) of all positions."""
    parts = x.unflatten(1, (W, -1)).movedim(1, 0)  # W, B, H / W, L / W, D
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


def _to_sequence(x, W, group):
    """And back."""
    parts = x.unflatten(2, (W, -1)).movedim(2, 0)  # W, B, H / W, L / W, D
    return _AllToAll.apply(parts, group).movedim(0, 1).flatten(1, 2)


def _gathered(mask, W, group):
    """(B, L / W) of each process to (B, L)."""
    if mask is None:
        return None
    parts = torch.empty(W * mask.shape[0], *mask.shape[1:], dtype=torch.uint8, device=mask.device)
    dist.all_gather_into_tensor(parts, mask.to(torch.uint8).contiguous(), group=group)
    return parts.bool().unflatten(0, (W, -1)).movedim(0, 1).flatten(1, 2)
