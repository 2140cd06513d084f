"""DTensor and FSDP2 in 2 processes (gloo on the CPU, NCCL on 2 GPUs) against one process."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, TWO_GPUS
from test_distributed import GROUPS, NAMES, assert_same, attend, draw, in_processes
from torch import nn

import mra_attention as mra
from mra_attention import MRAConfig, MRAMultiheadAttention

W = 2
POOLS = ["centred", "sampled"]
FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]


def cases(device):
    """(placement of q, k, v; key heads; masks?; options; placement that the output should have)."""
    from torch.distributed.tensor import Replicate, Shard

    batch, heads, sequence, whole = Shard(0), Shard(1), Shard(2), Replicate()
    for (coarse, order), (place, Hk), is_causal in itertools.product(
        FORMS, [(batch, 2), (heads, 4), (heads, 2)], [False, True]
    ):
        options = dict(coarse=coarse, order=order, is_causal=is_causal, pool="even")
        yield place, Hk, True, options, place
    yield batch, 1, False, dict(selection="global"), batch
    yield heads, 4, False, dict(selection="global"), heads
    for place, masked in itertools.product((batch, heads), (False, True)):
        yield place, 2, masked, dict(layout=(9, 14)), place
    for pool, (place, Hk) in itertools.product(POOLS, [(batch, 2), (heads, 2)]):
        yield place, Hk, True, dict(pool=pool), place
    yield whole, 2, True, {}, whole
    yield batch, 2, True, dict(density=(0.1, 0.3, 0.6, 1.0)), batch
    yield heads, 4, True, dict(density=(0.1, 0.3, 0.6, 1.0)), None  # each process would get all
    yield heads, 1, True, {}, None  # one key head for both processes: anything but heads
    yield sequence, 1, True, {}, None


def sharded_worker(rank, seed, device):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    mesh = init_device_mesh(device, (W,))

    def function(*tensors, return_lse, **options):
        out, lse = mra.mra_attention(*tensors, return_lse=True, **options)
        placed.append(out.placements[0])
        return out, lse

    for i, (place, Hk, masked, options, expected) in enumerate(cases(device)):
        tensors, masks, grads = draw(seed + i, Hk, masked, device)
        whole = attend(mra.mra_attention, tensors, masks, grads, **options)
        placed, note = [], (place, Hk, options)
        split = [distribute_tensor(x, mesh, [place]) for x in (*tensors, *grads)]
        masks = [x if x is None else distribute_tensor(x, mesh, [Replicate()]) for x in masks]
        ours = attend(function, split[:3], masks, split[3:], **options)
        assert expected is None or placed == [expected], (note, placed)
        assert expected is not None or not placed[0].is_shard(1), (note, placed)
        for name in NAMES:
            # A batch of another size may add up the gradients of keys and values in another order,
            # and those of pooled keys go to the queries' too where means are weighted.
            even = options.get("pool") == "even"
            bits = name in ("out", "lse") or (even and name == "dq")
            assert_same(ours[name].full_tensor(), whole[name], bits, (note, name))
    check_plans_and_meshes(mesh, seed, device)


def check_plans_and_meshes(mesh, seed, device):
    """A plan that is made sharded and given; pool; heads that don't divide; two mesh dimensions."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    (q, k, v), _, _ = draw(seed, 2, False, device)
    block = GROUPS[device][2]
    options = dict(block_size=block, density=0.3)
    plan = mra.make_plan(q, k, **options)
    expected = mra.mra_attention(q, k, v, plan=plan)
    means = torch.ops.mra_attention.pool(k, None, block)
    for place in ([Shard(0)], [Shard(1)]):
        split = [distribute_tensor(x, mesh, place) for x in (q, k, v)]
        made = mra.make_plan(*split[:2], **options)
        assert made.row_index.placements == tuple(place)
        assert torch.equal(made.row_index.full_tensor(), plan.row_index)
        out = mra.mra_attention(*split, plan=made)
        assert out.placements == tuple(place)
        assert_same(out.full_tensor(), expected, True, place)
        for got, mean in zip(
            torch.ops.mra_attention.pool(split[1], None, block), means, strict=True
        ):
            assert_same(got.full_tensor(), mean, True, place)
    # Three key heads for two processes: halves of the query heads need parts of the same key head.
    six, three = torch.cat([q, q[:, :2]], 1), torch.cat([k, k[:, :1]], 1)
    split = [distribute_tensor(x, mesh, [Shard(1)]) for x in (six, three, three)]
    out = mra.mra_attention(*split, **options)
    assert_same(out.full_tensor(), mra.mra_attention(six, three, three, **options), True, "heads")
    for shape in ((1, W), (W, 1)):
        square = init_device_mesh(device, shape)
        place = [Shard(0), Shard(1)]
        split = [distribute_tensor(x, square, place) for x in (q, k, v)]
        out = mra.mra_attention(*split, **options)
        assert out.placements == tuple(place)
        assert_same(out.full_tensor(), expected, True, shape)


def fsdp_worker(rank, seed, device):
    """One step of SGD, each process with half of the batch, against one process with all of it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    _, dtype, block = GROUPS[device]
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device, dtype)
    assert mra.replace_attention(model, MRAConfig(density=0.3, block_size=block)) == 2
    x, towards = torch.randn(2, 2 * W, 100, 32, dtype=dtype, device=device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone, mesh = copy.deepcopy(model), init_device_mesh(device, (W,))
    for block in model.layers:
        assert isinstance(block.self_attn, MRAMultiheadAttention)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for each, rows in ((alone, slice(None)), (model, slice(2 * rank, 2 * rank + 2))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        (each(x[rows]) * towards[rows]).mean().backward()
        optimizer.step()
    sharded = dict(model.named_parameters())
    for name, expected in alone.named_parameters():
        got = sharded[name]
        assert not torch.equal(expected, before[name]), name
        assert got.to_local().numel() < expected.numel(), name
        assert_same(got.full_tensor(), expected, False, name)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("worker", [sharded_worker, fsdp_worker])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_processes_are_one(worker, device, tmp_path):
    in_processes(worker, W, tmp_path, device)


def test_torch_without_distributed():
    """The package imports, and attention works; only the registration is left out."""
    code = """
import torch, torch.distributed
torch.distributed.is_available = lambda: False
import mra_attention
q = torch.randn(1, 2, 40, 8)
assert mra_attention.mra_attention(q, q, q).shape == q.shape
from torch.distributed.tensor import DTensor
known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
print(torch.ops.mra_attention.forward.default in known)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "False", run.stdout + run.stderr
