"""Sequence-parallel attention in 2 and 4 processes (gloo on the CPU, NCCL on GPUs) against one."""

import itertools
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import TWO_GPUS, limit, new_seed, relative_error
from torch.distributed.device_mesh import init_device_mesh

import mra_attention as mra
from mra_attention.distributed import sequence_parallel_attention

NAMES = ("out", "lse", "dq", "dk", "dv")
B, H, N, D = 2, 4, 128, 16
# Device: (backend, dtype, size of blocks).
GROUPS = {"cpu": ("gloo", torch.float64, 16), "cuda": ("nccl", torch.float32, 32)}


def cases(seed):
    """(key heads, masks?, options): every form, causal and not, few key heads and many."""
    forms = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
    for (coarse, order), is_causal, masked in itertools.product(
        forms, (False, True), (False, True)
    ):
        yield 4, masked, dict(coarse=coarse, order=order, is_causal=is_causal)
    yield from ((Hk, True, dict(selection="global")) for Hk in (1, 2))
    yield from ((2, masked, dict(layout=(8, 16))) for masked in (False, True))
    yield from (
        (4, masked, dict(pool=pool)) for masked, pool in ((False, "even"), (True, "sampled"))
    )
    for is_causal in (False, True):
        yield 2, True, dict(density=(0.1, 0.9, 0.3, 0.6), is_causal=is_causal)


def draw(seed, Hk, masked, device):
    g, dtype = torch.Generator().manual_seed(seed), GROUPS[device][1]
    q, grad = (torch.randn(B, H, N, D, generator=g).to(device, dtype) for _ in range(2))
    k, v = (torch.randn(B, Hk, N, D, generator=g).to(device, dtype) for _ in range(2))
    grad_lse = torch.randn(B, H, N, generator=g).to(device, dtype)
    masks = [torch.rand(B, N, generator=g) < 0.8 for _ in range(2)] if masked else [None, None]
    if masked:
        masks[0][:, 0] = True
        masks = [x.to(device) for x in masks]
    return (q, k, v), masks, (grad, grad_lse)


def attend(function, tensors, masks, grads, **options):
    block = GROUPS[tensors[0].device.type][2]
    tensors = [x.clone().requires_grad_() for x in tensors]
    options = {"density": 0.3} | options
    results = function(*tensors, *masks, return_lse=True, block_size=block, **options)
    gradients = torch.autograd.grad(results, tensors, grads)
    return dict(zip(NAMES, (*results, *gradients), strict=True))


def assert_same(got, expected, bits, note):
    """Bit for bit on the CPU where ``bits``, else to rounding; integers always bit for bit."""
    if not got.is_floating_point() or (bits and got.device.type == "cpu"):
        assert torch.equal(got, expected), note
    else:
        assert relative_error(got, expected) <= limit(got.dtype, got.device.type, 0), note


def worker(rank, W, function, folder, seed, device):
    """One process: ``function(rank, seed, device)`` in a process group of all of them."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        GROUPS[device][0], init_method=f"file://{folder}/store", rank=rank, world_size=W
    )
    try:
        function(rank, seed, device)
        (open(f"{folder}/done{rank}", "w")).close()
    except Exception:
        with open(f"{folder}/error{rank}", "w") as file:
            file.write(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
    # Straight out: torch's FSDP2 over gloo may abort while the interpreter is taken down.
    os._exit(0)


def in_processes(function, W, folder, device):
    """Runs ``function(rank, seed, device)`` in W processes; fails with what they raised."""
    context = mp.start_processes(
        worker, (W, function, str(folder), new_seed(), device), nprocs=W, join=False,
        start_method="spawn",
    )  # fmt: skip
    try:
        # Each join returns when one more process has ended.
        finished = any(context.join(timeout=120) for _ in range(W + 1))
        for process in context.processes:
            process.kill()
        assert finished, "the processes wait for each other"
    except (mp.ProcessRaisedException, mp.ProcessExitedException):
        raise AssertionError("\n".join(f.read_text() for f in folder.glob("error*"))) from None
    assert len(list(folder.glob("done*"))) == W


def sequence_parallel(rank, seed, device):
    W = dist.get_world_size()
    mesh = init_device_mesh(device, (W,), mesh_dim_names=("sp",))
    own = slice(rank * N // W, (rank + 1) * N // W)

    def part(x):
        return None if x is None else x[:, own] if x.dim() == 2 else x[:, :, own].contiguous()

    for i, (Hk, masked, options) in enumerate(cases(seed)):
        tensors, masks, grads = draw(seed + i, Hk, masked, device)
        # Processes that share a key head have even means where others have weighted ones.
        alone = options if Hk % W == 0 else options | dict(pool="even")
        whole = attend(mra.mra_attention, tensors, masks, grads, **alone)
        group = mesh["sp"] if i % 2 else mesh.get_group()
        parts = ([part(x) for x in xs] for xs in (tensors, masks, grads))
        ours = attend(sequence_parallel_attention, *parts, mesh=group, **options)
        for name in NAMES:
            # Gradients of a key head that several processes have are sums in another order.
            bits = Hk % W == 0 or name in ("out", "lse", "dq")
            assert_same(ours[name], part(whole[name]), bits, (rank, i, options, name))
    check_shared_key_head(mesh, W, rank, seed)
    check_errors(mesh, W)


def check_shared_key_head(mesh, W, rank, seed):
    """pool "auto" of a config, and one that is given, are "even" there."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, 32 * W, 8, generator=g) for heads in (W, 1))
    q, k = (x.to(mesh.device_type) for x in (q, k))
    config = mra.MRAConfig(density=0.3, block_size=32)
    expected = mra.mra_attention(q, k, k, config=config.replace(pool="even"))
    part = [x[:, :, 32 * rank : 32 * (rank + 1)].contiguous() for x in (q, k, k)]
    for options in (dict(config=config), dict(density=0.3, block_size=32, pool="auto")):
        out = sequence_parallel_attention(*part, mesh=mesh, **options)
        torch.testing.assert_close(out, expected[:, :, 32 * rank : 32 * (rank + 1)])
    each = config.replace(density=tuple((head + 1) / W for head in range(W)))
    expected = mra.mra_attention(q, k, k, config=each.replace(pool="even"))
    out = sequence_parallel_attention(*part, mesh=mesh, config=each)
    torch.testing.assert_close(out, expected[:, :, 32 * rank : 32 * (rank + 1)])


def check_errors(mesh, W):
    x, y = torch.randn(1, 3, 16, 8), torch.randn(1, W, 16, 8)
    weighted = mra.MRAConfig(pool="centred")
    for call, error, match in (
        (lambda: sequence_parallel_attention(x, x, x, mesh=mesh), ValueError, "mesh: got"),
        (lambda: sequence_parallel_attention(x, x, x, mesh="sp"), TypeError, "mesh: got str"),
        (lambda: sequence_parallel_attention(y, y, y, mesh=mesh, density=(0.5,) * (W + 1)),
         ValueError, "density: got .* numbers"),
        (lambda: sequence_parallel_attention(x, x, x, mesh=mesh, plan=1), TypeError, "plan: got"),
        (lambda: sequence_parallel_attention(y, y[:, :1], y[:, :1], mesh=mesh, config=weighted),
         NotImplementedError, "pool: got"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    ("W", "device"), [(2, "cpu"), (4, "cpu"), pytest.param(2, "cuda", marks=TWO_GPUS)]
)
def test_sequence_parallel_is_one_device(W, device, tmp_path):
    """Bit for bit on the CPU: every head is computed whole, by one process."""
    in_processes(sequence_parallel, W, tmp_path, device)
