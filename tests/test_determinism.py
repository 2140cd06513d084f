"""The same input gives the same bits: twice, on one thread or two, in a CUDA graph, on any stream.

And nothing in forward or backward waits for the device.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from helpers import CPU_DTYPES, CUDA_DTYPES, DEVICE_DTYPES, TWO_GPUS, Case, assert_same_bits

import mra_attention as mra

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
MODES = [
    pytest.param(dict(coarse=coarse, order=order, selection=selection, is_causal=is_causal),
                 id=f"{coarse}-{order}-{selection}-{'causal' if is_causal else 'full'}")
    for coarse, order in FORMS
    for selection in ("row", "global")
    for is_causal in (False, True)
]  # fmt: skip
MODES += [
    pytest.param(dict(pool=pool, order=order, is_causal=False), id=f"{pool}-{order}")
    for pool in ("centred", "sampled")
    for order in (0, 1)
]
MODES += [
    pytest.param(dict(pool="centred", order=order, is_causal=True), id=f"centred-{order}-causal")
    for order in (0, 1)
]


def make(device, dtype, mode, **more):
    """Long enough for several work items on each of several threads; short last blocks; masks."""
    sizes = {
        "N": 707, "M": 707 if mode["is_causal"] else 451, "D": 32, "masks": "both",
        "block_size": (64, 32), "density": 0.2,
    }  # fmt: skip
    return Case(device, dtype, **{**sizes, **mode, **more})


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_same_bits_twice(device, dtype, mode):
    case = make(device, dtype, mode)
    first, held = case.ours(), []
    for n in range(3):
        # Other addresses for what is allocated inside, and other contents of reused memory.
        held.append([torch.full((1 + 4099 * n + i,), 7.0, device=device) for i in range(50)])
        assert_same_bits(first, case.ours())


@pytest.mark.parametrize("device, dtype", [CPU_DTYPES[1], *CUDA_DTYPES[1:]])
def test_calls_in_turn(device, dtype):
    """Calls of all forms one behind the other, in any order, with no wait between: each takes the
    memory that others have left, and may begin beside their last kernels. As each alone."""
    head_dims, rounds = ((64, 128), 4) if device == "cuda" else ((32,), 1)
    cases = [make(device, dtype, mode.values[0], D=D) for mode in MODES for D in head_dims]
    alone = [case.ours() for case in cases]
    random = Random(cases[0].seed)
    for _ in range(rounds):
        turns = random.sample(range(len(cases)), len(cases))
        results = [cases[i].ours() for i in turns]
        for i, result in zip(turns, results, strict=True):
            assert_same_bits(alone[i], result)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device, dtype", CPU_DTYPES)
def test_same_bits_on_one_thread_and_two(device, dtype, mode):
    case = make(device, dtype, mode)
    with threads(1):
        one = case.ours()
    with threads(2):
        two = case.ours()
    assert_same_bits(one, two)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_long_sequences(device, dtype, coarse, order, is_causal):
    """Long enough that sums over all queries or keys are made in parts."""
    mode = {"coarse": coarse, "order": order, "is_causal": is_causal}
    case = make(
        device, dtype, mode, B=1, H=2, Hk=1, N=5000, M=5000, D=16, density=0.02, masks="none"
    )  # fmt: skip
    first = case.ours()
    assert_same_bits(first, case.ours())
    if device == "cpu":
        for n in (1, 2, 3):
            with threads(n):
                assert_same_bits(first, case.ours())


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_same_plan_twice(device, dtype, selection):
    """Many ties: a choice that depends on who comes first would show."""
    mode = {"selection": selection, "is_causal": False}
    case = make(device, dtype, mode, masks="none", N=2048, M=2048)
    case.q.round_(), case.k.fill_(1.0)
    first = case.plan()
    for _ in range(3):
        again = case.plan()
        assert torch.equal(again.to_dense(), first.to_dense())
        assert torch.equal(again.row_start, first.row_start)
        assert torch.equal(again.row_count, first.row_count)


class Static:
    """Inputs at fixed addresses, and what one forward and backward makes of them."""

    def __init__(self, case):
        self.case = case
        self.inputs = [t.detach().clone().requires_grad_() for t in (case.q, case.k, case.v)]
        self.grads = [case.grad_out.clone(), case.grad_lse.clone()]

    def load(self, case):
        with torch.no_grad():
            new = (case.q, case.k, case.v, case.grad_out, case.grad_lse)
            for to, source in zip((*self.inputs, *self.grads), new, strict=True):
                to.copy_(source)

    def run(self):
        c = self.case
        out, lse = mra.mra_attention(
            *self.inputs, c.key_mask, c.query_mask, **c.options, return_lse=True
        )
        grads = torch.autograd.grad((out, lse), self.inputs, self.grads)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def detached(results):
    return {name: t.detach() for name, t in results.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
def test_cuda_graph_replays_the_same_bits(device, dtype, mode):
    """Captured once, replayed on new data. Capture itself fails on any wait for the device, and on
    any choice that was made on the host from the data captured first."""
    case = make(device, dtype, mode)
    static = Static(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once and kept is made outside of the graph
        for _ in range(2):
            static.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = static.run()
    captured = detached(captured)
    for n in range(2):
        fresh = make(device, dtype, mode, seed=case.seed + 1 + n)
        fresh.key_mask, fresh.query_mask = case.key_mask, case.query_mask
        static.load(fresh)
        for t in captured.values():
            t.fill_(float("nan"))
        graph.replay()
        assert_same_bits(fresh.ours(), captured)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[:2])
def test_current_stream_is_used(device, dtype, mode):
    """A side stream is busy, then gets its inputs. Work that went to another stream would read the
    zeros from before."""
    case = make(device, dtype, mode)
    expected = case.ours()
    static = Static(case)
    with torch.no_grad():
        for t in static.inputs + static.grads:
            t.zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        static.load(case)
        # Cloned on the side stream: a result that comes later from elsewhere is not seen either.
        results = {name: t.clone() for name, t in detached(static.run()).items()}
    side.synchronize()
    assert_same_bits(expected, results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
def test_nothing_waits_for_the_device(device, dtype, mode):
    """torch raises at any wait of its own; the event shows whether anything else waited: when the
    calls return, the device must still sleep."""
    static = Static(make(device, dtype, mode))
    case, given = static.case, static.case.plan()

    def everything():
        static.run()
        case.plan()
        mra.mra_attention(*static.inputs, case.key_mask, plan=given, **case.values)

    everything()  # kernels are loaded, and memory is reserved, at the first use
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_200_000_000)  # cycles: some 600 ms, for hosts that are busy
        done.record()
        everything()
        waiting = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert waiting, "forward or backward waited for the device"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_longer_call_behind_a_shorter_one_of_another_thread(dtype):
    """What shared memory a kernel may have is the process's: a shorter call takes nothing away."""

    def run(N):
        q = torch.randn(1, 2, N, 64, device="cuda", dtype=dtype)
        mra.mra_attention(q, q, q, density=1 / 16, block_size=32, coarse="row", pool="even")
        torch.cuda.synchronize()

    run(8192)
    with ThreadPoolExecutor(1) as other:
        other.submit(run, 1024).result()
    run(8192)


@pytest.mark.parametrize("device", [pytest.param("cuda:1", marks=TWO_GPUS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_another_device_than_the_current_one(mode, dtype, device):
    """Tensors on cuda:1 while cuda:0 is current: the same bits as with cuda:1 current."""
    case = make(device, dtype, mode)
    with torch.cuda.device(0):
        results = case.ours()
        assert {t.device for t in results.values()} == {torch.device("cuda", 1)}
        assert case.plan().device == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert_same_bits(results, case.ours())


@pytest.mark.parametrize("device", [pytest.param("cuda:1", marks=TWO_GPUS)])
def test_layout_on_another_device_than_the_current_one(device):
    x = torch.randn(3, 2, 4, 200, 64, device=device, dtype=torch.bfloat16).requires_grad_()

    def run(current):
        with torch.cuda.device(current):
            out = mra.mra_attention(*x, layout=(10, 20), density=1 / 4, block_size=32)
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
            assert torch.cuda.current_device() == current
        return {"out": out, "grad": grad}

    assert_same_bits(run(0), run(1))
