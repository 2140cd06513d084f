"""More than two resolutions: the operators against the dense reference, forward and backward.

The reference itself, and what plans hold, are in test_levels_plan.py."""

import gc
import itertools
import math
import time

import pytest
import torch
from helpers import BEST, CUDA, CUDA_DTYPES, DEVICES, Case, assert_same_bits, compare
from tools import (
    check_backward_under_autocast,
    check_export,
    check_one_graph,
    check_transforms,
    same_on_meta,
    track,
)  # fmt: skip
from torch.utils.flop_counter import FlopCounterMode

import mra_attention as mra
from mra_attention import MRAConfig
from mra_attention.reference import mra_attention_reference

OPS = torch.ops.mra_attention
FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
THREE = ((128, 2), (64, 3))  # resolutions above blocks of 16 and 32
LEVELS = [THREE, ((64, 1),), ((512, 1), (128, 1), (64, 2))]  # the last: one cell in all at first


class LevelsCase(Case):
    """A case with levels; the plan that the reference is given is the operator's."""

    def __init__(self, device="cpu", dtype=torch.float64, **options):
        # Query blocks of CUDA kernels have at least 32 rows.
        block_size = (16, 32) if device == "cpu" else (32, 16)
        defaults = dict(N=301, block_size=block_size, blocks_per_row=2, levels=THREE)
        if not options.get("is_causal"):
            defaults["M"] = 435
        super().__init__(device, dtype, **{**defaults, **options})

    def dense(self):
        plan = self.plan()
        return [*(plan.to_dense(i) for i in range(len(plan.levels))), plan.to_dense()]

    def reference(self, dtype, dense, backward=True):
        options = {**self.options, "plan": dense}
        return self._run(mra_attention_reference, dtype, options, backward)

    def check(self):
        dense, ours, same = self.dense(), self.ours(), None
        if self.dtype != torch.float64:
            same = self.reference(self.dtype, dense)
        exact = self.reference(torch.float64, dense)
        compare(ours, same, exact, self.dtype, self.device, f"seed {self.seed}")
        return ours


@pytest.mark.parametrize("masks", ["none", "both", "padding"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_is_the_reference(device, dtype, coarse, order, levels, is_causal, masks):
    options = dict(coarse=coarse, order=order, is_causal=is_causal, levels=levels)
    case = LevelsCase(device, dtype, **options, masks=masks)
    case.check()
    if device != "cpu":
        return  # test_levels_plan.py: there near ties may differ
    # and so is the plan
    reference = case.reference(torch.float64, None, backward=False)
    compare(case.ours(backward=False), None, reference, torch.float64, "cpu", f"seed {case.seed}")


@pytest.mark.parametrize("layout", [(15, 20), (3, 9, 11)])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_blocks_of_every_level_are_patches(device, dtype, coarse, order, layout):
    """With one leading token or four, whose block is as large as the coarsest."""
    case = LevelsCase(device, dtype, coarse=coarse, order=order, layout=layout, M=301, masks="both")
    plan, (bq, bk), places = case.plan(), case.block, 128 + math.prod(layout)
    assert (plan.nq, plan.nk) == (-(-places // bq), -(-places // bk))
    assert plan.to_dense(0).shape[-1] == -(-places // 128)
    case.check()


OTHER_DTYPES = [("cpu", t) for t in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("device, dtype", OTHER_DTYPES + CUDA_DTYPES)
@pytest.mark.parametrize("coarse, order", FORMS)
def test_other_dtypes(coarse, order, device, dtype):
    for is_causal in (False, True):
        LevelsCase(device, dtype, coarse=coarse, order=order, is_causal=is_causal).check()


@pytest.mark.parametrize("block_size", [64, (128, 16), (32, 128)])
@pytest.mark.parametrize("coarse", ["block", "row"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_other_blocks(device, dtype, coarse, block_size):
    shape = dict(N=700, M=700, H=2, Hk=1, levels=((512, 1), (256, 2)), diagonal_blocks=1)
    for is_causal, budget in itertools.product((False, True), (dict(blocks_per_row=2), {})):
        if not budget:
            budget = dict(density=0.2, blocks_per_row=None)
        LevelsCase(device, dtype, **shape, block_size=block_size, coarse=coarse,
                   is_causal=is_causal, **budget).check()  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", [("block", 1), ("row", 1)])
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:2])
def test_cells_beyond_the_budget(device, dtype, coarse, order, is_causal):
    """Forced ones, more than a level may split; and as many as there are."""
    forced = dict(levels=((128, 1), (64, 1)), diagonal_blocks=7, first_blocks=9)
    many = dict(levels=((256, 99), (64, 99)), N=1500, B=1, H=2, Hk=1)
    many |= {} if is_causal else dict(M=1600)
    for options in (forced, many):
        LevelsCase(device, dtype, coarse=coarse, order=order, is_causal=is_causal, masks="both",
                   **options).check()  # fmt: skip


@pytest.mark.parametrize("D", [8, 40, 64, 128, 256])
@pytest.mark.parametrize("coarse, order", [("block", 1), ("row", 1)])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
def test_head_dims(device, dtype, coarse, order, D):
    """With many cells: more than are looked up at a time, and cells with many children."""
    for block_size, levels in (((64, 64), ((128, 2),)), ((32, 16), ((32 << 5, 1), (64, 9)))):
        LevelsCase(device, dtype, B=1, H=2, Hk=1, N=3000, M=3000, D=D, coarse=coarse, order=order,
                   block_size=block_size, levels=levels, masks="both").check()  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device, dtype", BEST)
def test_a_given_plan_is_the_same(device, dtype, form, is_causal):
    coarse, order = form
    case = LevelsCase(device, dtype, coarse=coarse, order=order, is_causal=is_causal, masks="both")
    assert_same_bits(case.ours(), case.ours(plan=case.plan()))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
def test_same_bits_twice_on_a_gpu(device, dtype, coarse, order, is_causal):
    """And nothing waits for the device, on any stream."""
    case = LevelsCase(device, dtype, coarse=coarse, order=order, is_causal=is_causal, N=2000,
                      M=2000, masks="both")  # fmt: skip
    first, held = case.ours(), []
    for n in range(3):
        # Other addresses for what is allocated inside, and other contents of reused memory.
        held.append([torch.full((1 + 4099 * n + i,), 7.0, device=device) for i in range(50)])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                again = case.ours()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert_same_bits(first, again)


@pytest.mark.parametrize("coarse, order", FORMS)
def test_same_bits_for_any_number_of_threads(coarse, order):
    case = LevelsCase(coarse=coarse, order=order, dtype=torch.float32, N=700, masks="both")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, plan = case.ours(), case.plan()
        torch.set_num_threads(2)
        assert_same_bits(one, case.ours())
        assert torch.equal(plan.row_index, case.plan().row_index)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(coarse, order, is_causal):
    case = LevelsCase(B=1, H=2, Hk=1, N=68, M=68, D=8, block_size=16, blocks_per_row=1,
                      levels=((64, 1), (32, 1)), coarse=coarse, order=order, is_causal=is_causal,
                      masks="both", spread=0.7)  # fmt: skip
    plan = case.plan()

    def attend(q, k, v):
        return mra.mra_attention(
            q, k, v, case.key_mask, case.query_mask, plan=plan, coarse=coarse, order=order,
            is_causal=is_causal, return_lse=True,
        )  # fmt: skip

    weight = attend(case.q, case.k, case.v)[1].isfinite()

    def finite(q, k, v):
        out, lse = attend(q, k, v)
        return out, torch.where(weight, lse, 0.0)

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(finite, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def arguments(case):
    """Of plan and forward, and of backward after it."""
    o, masks = case.options, (case.key_mask, case.query_mask)
    flat = [n for level in o["levels"] for n in level]
    sizes = (o["blocks_per_row"], None, *case.block)
    plan = (case.q, case.k, *masks, *sizes, "row", 0, 0, o["is_causal"], None, flat)
    forward = (case.q, case.k, case.v, *masks, None, None, None, *sizes, o["coarse"], o["order"],
               "row", 0, 0, o["is_causal"], None, flat)  # fmt: skip
    out, lse, share, *rest = OPS.forward(*forward)
    kept = [x if x.dim() > 1 else None for x in rest[3:]]
    backward = (case.grad_out, case.grad_lse, case.q, case.k, case.v, *masks, out, lse, share,
                *rest[:3], *case.block, o["coarse"], o["order"], o["is_causal"], None, *kept,
                flat)  # fmt: skip
    return plan, forward, backward


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device, dtype", BEST)
def test_operators(device, dtype, coarse, order, is_causal):
    options = dict(coarse=coarse, order=order, is_causal=is_causal)
    case = LevelsCase(device, dtype, **options, masks="both", B=1, D=8)
    for op, args in zip((OPS.plan, OPS.forward, OPS.backward), arguments(case), strict=True):
        same_on_meta(op, args)
        torch.library.opcheck(op.default, track(args) if op == OPS.forward else args)


@pytest.mark.parametrize("coarse, order", FORMS[1:])
@pytest.mark.parametrize("device, dtype", BEST)
def test_backward_makes_the_means_it_is_not_given(device, dtype, coarse, order):
    case = LevelsCase(device, dtype, coarse=coarse, order=order, is_causal=False)
    _, _, args = arguments(case)
    without = [*args[:-10], *[None] * 9, args[-1]]
    for given, made in zip(OPS.backward(*args), OPS.backward(*without), strict=True):
        assert torch.equal(given, made)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    check_one_graph(MRAConfig(blocks_per_row=2, block_size=32, levels=THREE), dynamic)


def test_export_with_any_length():
    check_export(MRAConfig(blocks_per_row=2, block_size=32, levels=THREE))


def test_torch_func_and_autocast():
    check_transforms(MRAConfig(blocks_per_row=1, block_size=32, levels=((64, 2),)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_backward_under_autocast(device, form):
    coarse, order = form
    check_backward_under_autocast(
        MRAConfig(block_size=32, levels=((128, 2),), coarse=coarse, order=order), device
    )


def test_modules_attend_and_refuse_weights():
    """A dense matrix of one resolution would not be what the output comes from."""
    config = MRAConfig(blocks_per_row=1, block_size=16, levels=((64, 1),))
    module = mra.MRAMultiheadAttention(16, 2, batch_first=True, config=config)
    x = torch.randn(1, 130, 16)
    assert module(x, x, x, need_weights=False)[0].shape == x.shape
    with pytest.raises(NotImplementedError, match="need_weights: got True with levels"):
        module(x, x, x)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_attend(device):
    options = dict(blocks_per_row=1, block_size=32, levels=((64, 2),))
    k = torch.randn(2, 1, 100, 8, device=device)
    for B, N in ((0, 50), (2, 0)):
        q = torch.randn(B, 2, N, 8, device=device, requires_grad=True)
        out = mra.mra_attention(q, k[:B], k[:B], **options)
        assert out.shape == q.shape
        out.sum().backward()
    mask = torch.zeros(2, 100, dtype=torch.bool, device=device)
    q = torch.randn(2, 2, 50, 8, device=device, requires_grad=True)
    for coarse in ("none", "block", "row"):
        out, lse = mra.mra_attention(q, k, k, mask, coarse=coarse, return_lse=True, **options)
        assert (out == 0).all() and (lse == -torch.inf).all()
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert (grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_do_not_hang(device):
    q, k, v = (torch.randn(1, 1, 300, 8, device=device) for _ in range(3))
    q[..., 5, :], k[..., 70, 3], v[..., 200, 0] = torch.nan, torch.inf, -torch.inf
    for coarse in ("none", "block", "row"):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        out = mra.mra_attention(*x, blocks_per_row=1, block_size=32, levels=THREE, coarse=coarse)
        torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize(
    "levels, error",
    [
        (5, TypeError), ("no", TypeError), ((128, 2), TypeError), (((128.0, 2),), TypeError),
        (((128, True),), TypeError), (((128,),), ValueError), (((128, 2, 3),), ValueError),
        (((96, 2),), ValueError), (((32, 2),), ValueError), (((128, 0),), ValueError),
        (((128, 2), (256, 2)), ValueError), (((128, 2), (128, 2)), ValueError),
        (((2**31, 2),), ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_levels(levels, error):
    q, k, v = (torch.randn(1, 1, 300, 8) for _ in range(3))
    for function, tensors in ((mra.mra_attention, (q, k, v)), (mra.make_plan, (q, k))):
        with pytest.raises(error, match="levels: got"):
            function(*tensors, block_size=32, levels=levels)
    with pytest.raises(error, match="levels: got"):
        MRAConfig(block_size=(16, 32), levels=levels)


def test_bad_levels_of_the_operators():
    x = torch.randn(1, 1, 300, 8)
    for flat in ([64], [96, 2], [32, 2], [128, 2, 128, 2], [64, 0], [2**31, 1], [-64, 1]):
        with pytest.raises(ValueError, match="levels: got"):
            OPS.plan(x, x, None, None, 2, None, 32, 32, "row", 0, 0, False, None, flat)
    with pytest.raises(ValueError, match="levels: got selection"):
        OPS.plan(x, x, None, None, 2, None, 32, 32, "global", 0, 0, False, None, [64, 2])
    with pytest.raises(ValueError, match="levels: got selection"):
        MRAConfig(selection="global", levels=((128, 2),))
    plan = mra.make_plan(x, x, block_size=32, levels=((128, 2),))
    with pytest.raises(ValueError, match="levels"):
        mra.mra_attention(x, x, x, plan=plan, levels=((128, 2),))
    with pytest.raises(ValueError, match="levels"):
        mra.mra_attention(x, x, x, plan=plan, config=MRAConfig(block_size=32))
    lists = (plan.row_start[..., :-1], plan.row_count[..., :-1], plan.row_index)
    with pytest.raises(ValueError, match="row_start"):
        OPS.forward(x, x, x, None, None, *lists, None, None, 32, 32, "row", 1, "row", 0, 0, False,
                    None, [128, 2])  # fmt: skip


def test_work_of_a_token_does_not_grow():
    """Operations counted, and the time of processors, with room: 4 times the tokens."""
    config = MRAConfig(blocks_per_row=8, block_size=64, levels=((1024, 4), (256, 8)), order=0)
    flops, seconds = [], []
    for N in (16384, 65536):
        q, k, v = (torch.randn(1, 1, N, 64) for _ in range(3))
        times = []
        for _ in range(3):
            start = time.process_time()
            mra.mra_attention(q, k, v, config=config)
            times.append(time.process_time() - start)
        with FlopCounterMode(display=False) as counter:
            mra.mra_attention(q, k, v, config=config)
        flops.append(counter.get_total_flops() / N)
        seconds.append(min(times) / N)
    assert flops[1] < 1.15 * flops[0]
    assert seconds[1] < 1.6 * seconds[0], seconds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", [CUDA])
def test_memory_of_a_token_does_not_grow(device, form):
    coarse, order = form
    config = MRAConfig(blocks_per_row=8, block_size=64, levels=((1024, 4), (256, 8)),
                       coarse=coarse, order=order)  # fmt: skip
    used = []
    gc.collect()  # what other tests left must not be given back meanwhile
    for N in (65536, 262144):
        x = [torch.randn(1, 2, N, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]
        for t in x:
            t.requires_grad_()
        peaks = []  # autograd's threads may give back the gradients of the turn before only now
        for _ in range(4):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            torch.autograd.grad(mra.mra_attention(*x, config=config).sum(), x)
            peaks.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
        used.append(max(peaks) / N)
    assert used[1] < 1.1 * used[0], used
