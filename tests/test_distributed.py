"""Sequence-parallel attention in 2 and 4 processes (gloo, CPU) against one process."""

import itertools
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import new_seed
from torch.distributed.device_mesh import init_device_mesh

import mra_attention as mra
from mra_attention.distributed import sequence_parallel_attention

NAMES = ("out", "lse", "dq", "dk", "dv")
B, H, N, D = 2, 4, 128, 16


def cases(seed):
    """(key heads, masks?, options): every form, causal and not, few key heads and many."""
    forms = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
    for (coarse, order), is_causal, masked in itertools.product(
        forms, (False, True), (False, True)
    ):
        yield 4, masked, dict(coarse=coarse, order=order, is_causal=is_causal)
    yield from ((Hk, True, dict(selection="global")) for Hk in (1, 2))


def draw(seed, Hk, masked):
    g = torch.Generator().manual_seed(seed)
    q, grad = (torch.randn(B, H, N, D, generator=g, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(B, Hk, N, D, generator=g, dtype=torch.float64) for _ in range(2))
    grad_lse = torch.randn(B, H, N, generator=g, dtype=torch.float64)
    masks = [torch.rand(B, N, generator=g) < 0.8 for _ in range(2)] if masked else [None, None]
    if masked:
        masks[0][:, 0] = True
    return (q, k, v), masks, (grad, grad_lse)


def attend(function, tensors, masks, grads, **options):
    tensors = [x.clone().requires_grad_() for x in tensors]
    results = function(*tensors, *masks, return_lse=True, block_size=16, density=0.3, **options)
    gradients = torch.autograd.grad(results, tensors, grads)
    return dict(zip(NAMES, (*results, *gradients), strict=True))


def worker(rank, W, function, folder, seed):
    """One process: ``function(rank, seed)`` in a process group of all of them."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W)
    try:
        function(rank, seed)
        (open(f"{folder}/done{rank}", "w")).close()
    except Exception:
        with open(f"{folder}/error{rank}", "w") as file:
            file.write(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def in_processes(function, W, folder):
    """Runs ``function(rank, seed)`` in W processes; fails with what they raised."""
    context = mp.start_processes(
        worker, (W, function, str(folder), new_seed()), nprocs=W, join=False, start_method="spawn"
    )
    try:
        # Each join returns when one more process has ended.
        finished = any(context.join(timeout=120) for _ in range(W + 1))
        for process in context.processes:
            process.kill()
        assert finished, "the processes wait for each other"
    except (mp.ProcessRaisedException, mp.ProcessExitedException):
        raise AssertionError("\n".join(f.read_text() for f in folder.glob("error*"))) from None
    assert len(list(folder.glob("done*"))) == W


def sequence_parallel(rank, seed):
    W = dist.get_world_size()
    mesh = init_device_mesh("cpu", (W,), mesh_dim_names=("sp",))
    own = slice(rank * N // W, (rank + 1) * N // W)

    def part(x):
        return None if x is None else x[:, own] if x.dim() == 2 else x[:, :, own].contiguous()

    for i, (Hk, masked, options) in enumerate(cases(seed)):
        tensors, masks, grads = draw(seed + i, Hk, masked)
        whole = attend(mra.mra_attention, tensors, masks, grads, **options)
        group = mesh["sp"] if i % 2 else mesh.get_group()
        parts = ([part(x) for x in xs] for xs in (tensors, masks, grads))
        ours = attend(sequence_parallel_attention, *parts, mesh=group, **options)
        for name in NAMES:
            # Gradients of a key head that several processes have are sums in another order.
            exact = Hk % W == 0 or name in ("out", "lse", "dq")
            close = torch.equal if exact else lambda a, b: torch.allclose(a, b, 1e-12, 1e-12)
            assert close(ours[name], part(whole[name])), (rank, i, options, name)
    check_errors(mesh, W)


def check_errors(mesh, W):
    x = torch.randn(1, 3, 16, 8)
    for call, error, match in (
        (lambda: sequence_parallel_attention(x, x, x, mesh=mesh), ValueError, "mesh: got"),
        (lambda: sequence_parallel_attention(x, x, x, mesh="sp"), TypeError, "mesh: got str"),
        (lambda: sequence_parallel_attention(x, x, x, mesh=mesh, plan=1), TypeError, "plan: got"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("W", [2, 4])
def test_sequence_parallel_is_one_device(W, tmp_path):
    """Bit for bit: every head is computed whole, by one process."""
    in_processes(sequence_parallel, W, tmp_path)
