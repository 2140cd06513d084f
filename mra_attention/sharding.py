"""How DTensor may split the operators among processes: by batch entries or by heads.

Those share nothing, so no process needs another's data. Sharded in another way (along the sequence,
say), inputs are redistributed by DTensor first.
"""

import sys

import torch
import torch.distributed as dist

from ._constant import constant

__all__ = ["register"]

_registered = False


def _alternatives(specs, presence, heads):
    """What :func:`register_sharding` wants: [(placements of results, placements of arguments)].

    specs: the arguments; what isn't a tensor gets None, one without elements is replicated.
    presence: for each result whether it has elements.
    heads: whether heads may be split."""
    from torch.distributed.tensor import Replicate, Shard

    def of(x, place):
        if not hasattr(x, "placements"):
            return None
        return place(x.ndim) if x.ndim > 1 else Replicate()

    def by_heads(dims):  # masks and counts, of two dimensions, have no heads
        return Shard(1) if dims > 2 else Replicate()

    def both(place):
        results = [place(dims) if dims else Replicate() for dims in presence]
        return results, [of(x, place) for x in specs]

    alternatives = [both(lambda _: Replicate()), both(lambda _: Shard(0))]
    return alternatives + [both(by_heads)] * heads


def _heads_align(query, key):
    """Whether every process that gets some query heads gets their key heads with them, however
    DTensor splits them: it alone chooses the mesh dimensions to split heads over."""
    if query.shape[1] == key.shape[1]:
        return True
    split = 1
    for i, size in enumerate(query.mesh.shape):
        places = [x.placements[i] for x in (query, key)]
        whole = all(p.is_replicate() for p in places)
        batch = all(p.is_shard(0) for p in places) and query.shape[0] >= query.mesh.size()
        split *= 1 if whole or batch else size
    return key.shape[1] % split == 0


def _by_head(density):
    """Whether each head has its own density: DTensor would hand all of them to each process."""
    return density is not None and len(density) > 1


def is_dtensor(x):
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def locally(function, x, dim):
    """``function`` of a DTensor, done by each process on what it has. It changes the length of
    ``dim``, which must not be split, and is the same for all entries of the other dimensions."""
    from torch.distributed.tensor import DTensor, Replicate

    x = x.redistribute(placements=[Replicate() if p.is_shard(dim) else p for p in x.placements])
    local = function(x.to_local()).contiguous()
    shape = torch.Size([*x.shape[:dim], local.shape[dim], *x.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, x.device_mesh, x.placements, shape=shape, stride=stride)


@constant  # while a program is traced: run once, leave no trace
def register():
    """Tells DTensor the rules. :func:`mra_attention.mra_attention` does it before its first call
    with a DTensor, this package where DTensor is loaded already: importing it takes as long as the
    rest of the package. Call it before handing DTensors to ``torch.ops.mra_attention`` yourself."""
    global _registered
    if _registered:
        return
    _registered = True
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.mra_attention

    @register_sharding(ops.pool.default)
    def pool(input, mask, block):
        return _alternatives((input, mask, block), (4, 2), heads=True)

    @register_sharding(ops.plan.default)
    def plan(query, key, key_mask, query_mask, blocks_per_row, density, *rest):
        args = (query, key, key_mask, query_mask, blocks_per_row, density, *rest)
        heads = _heads_align(query, key) and not _by_head(density)
        return _alternatives(args, (3, 3, 3), heads)

    @register_sharding(ops.forward.default)
    def forward(query, key, value, key_mask, query_mask, row_start, row_count, row_index,
                blocks_per_row, density, bq, bk, coarse, order, *rest):  # fmt: skip
        args = (query, key, value, key_mask, query_mask, row_start, row_count, row_index,
                blocks_per_row, density, bq, bk, coarse, order, *rest)  # fmt: skip
        is_causal, levels = rest[3], rest[5:] and rest[5]
        weighted = rest[6:7] not in ((), ("even",))
        made, queries, keys = row_start is None, coarse == "block", coarse != "none"
        order1 = coarse != "none" and order == 1
        lists, means = [3 * made] * 3, [4 * queries, 4 * keys, 4 * keys]
        counts = [2 * (queries or weighted), 2 * keys]
        share, moments = (4, 0) if levels else (3, 5 * (not is_causal))
        kept = [*means, *counts, moments * order1]
        kept += [(3 + bool(is_causal)) * weighted, 3 * weighted, 3 * weighted]
        if rest[7:] == (False,):
            kept = [0] * len(kept)
        presence = [4, 3, share * order1, *lists, *kept]
        heads = _heads_align(query, key) and not _by_head(density)
        return _alternatives(args, presence, heads)

    @register_sharding(ops.backward.default)
    def backward(grad_out, grad_lse, query, key, *rest):
        args = (grad_out, grad_lse, query, key, *rest)
        return _alternatives(args, (4, 4, 4), _heads_align(query, key))


if dist.is_available() and "torch.distributed.tensor" in sys.modules:
    register()
