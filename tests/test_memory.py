"""Memory of one call beyond its inputs and outputs: O(N) at a fixed number of blocks a row."""

import gc

import pytest
import torch

import mra_attention as mra

pytestmark = pytest.mark.gpu

B, H, D, BLOCK, ROW = 1, 2, 64, 64, 16  # ROW blocks a row
LENGTHS = (65536, 262144)
FORMS = [("row", 1), ("none", 0)]


def peak(N, coarse, order, backward):
    """Largest number of bytes allocated during a call, less inputs and outputs.

    Bytes as requested: max_memory_allocated() also counts what a reused piece of memory has too
    much, up to a MiB for each tensor, which differs from run to run."""
    shape = (B, H, N, D)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [t.requires_grad_(backward) for t in (q, k, v)]

    def run():
        out = mra.mra_attention(
            *inputs,
            blocks_per_row=ROW,
            block_size=BLOCK,
            coarse=coarse,
            order=order,
            pool="even",
        )
        return (out, *torch.autograd.grad(out, inputs, grad)) if backward else (out,)

    run()  # what is made once and kept is not this call's
    gc.collect()  # nor is what other tests left behind, which might be given back during the run
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = run()
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    return used - sum(t.numel() * t.element_size() for t in results)


def allowed(N, coarse, order, backward):
    """Bytes of the tensors that must exist beside inputs and outputs, all at once.

    A number for each query is 4 B H N bytes (float32). Block means are B H (N / 64) D numbers for
    each of query, key and value, in float32; rows that read them take them in bfloat16 too. Lists
    are ROW int32 and a start and a count for each query block, and once more by columns.

    Partial sums, added up in a fixed order instead of by atomics, belong to the blocks of threads
    that run at once, at most 3 on a multiprocessor, so their size does not grow with N: for order 1
    two D x D matrices each, for the pooled keys two tiles of 64 x D."""
    row = 4 * B * H * N
    means = 4 * B * H * (N // BLOCK) * D
    lists = 4 * B * H * (N // BLOCK) * (ROW + 2)
    tensor = 2 * B * H * N * D  # bfloat16, one of q, k, v
    partial = 3 * torch.cuda.get_device_properties(0).multi_processor_count * 2 * 64 * D * 4

    total = row + 2 * means + lists  # lse; query and key, of which the scores are made
    if coarse == "row":
        total += means + 2 * means / 2  # value; key and value in bfloat16
    if order == 1:
        total += row + partial  # each row's coarse share
    if backward:
        total += lists + 2 * row  # columns; delta, and lse to base 2
        if coarse == "row":
            total += partial + 2 * means  # gradients of the pooled keys and values
        if order == 1:
            # delta of the coarse part and two weights a row; what goes into dq, dk, dv beside the
            # exact part, where that is made
            total += 3 * row + 3 * tensor
    return total


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
def test_memory_is_linear(coarse, order, backward):
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 200_000:
        pytest.skip("rows of 4096 scores need 200 KB of shared memory; here a workspace holds them")
    used = {N: peak(N, coarse, order, backward) for N in LENGTHS}
    small, large = (used[N] for N in LENGTHS)
    assert large <= 4.2 * small, used
    for N in LENGTHS:
        # Counts and finished matrices: small tensors that the bound leaves out.
        assert used[N] <= allowed(N, coarse, order, backward) + 2**17, (N, used)
    if not backward:
        scores = 4 * B * H * (LENGTHS[1] // BLOCK) ** 2
        assert large < scores / 4, "as much as one map of scores"
