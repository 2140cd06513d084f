"""Backward: gradients of query, key and value, through out and lse, against the references."""

import pytest
import torch
from helpers import (
    BEST,
    CUDA_DTYPES,
    DEVICE_DTYPES,
    Case,
    assert_same_bits,
    relative_error,
)

import mra_attention as mra

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
SIZES = (16, 32, 64, 128)


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_every_mode(device, dtype, coarse, order, selection, is_causal, masks):
    Case(
        device, dtype, coarse=coarse, order=order, selection=selection, is_causal=is_causal,
        masks=masks, N=331, D=32,
    ).check()  # fmt: skip


@pytest.mark.parametrize("block", [(q, k) for q in SIZES for k in SIZES])
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:2])
def test_every_block_size(device, dtype, block):
    if device == "cuda" and block[0] < 32:
        pytest.skip("CUDA takes block_q from 32 on")
    for coarse, is_causal in [("none", True), ("block", False), ("row", False), ("row", True)]:
        Case(
            device, dtype, block_size=block, coarse=coarse, is_causal=is_causal, masks="both",
            N=397, density=0.35,
        ).check()  # fmt: skip


@pytest.mark.parametrize("block", [64, (64, 32), (64, 16), (128, 64), (32, 32), (64, 128)])
@pytest.mark.parametrize("D", [8, 32, 40, 64, 96, 128])
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:])
def test_blocks_and_head_dims_of_the_tensor_cores(device, dtype, D, block):
    for coarse, order in FORMS[1:]:
        Case(
            device, dtype, block_size=block, D=D, coarse=coarse, order=order, masks="both", N=333,
            M=777, spread=0.5,
        ).check()  # fmt: skip


@pytest.mark.parametrize("N", [1, 64, 128, 190, 193, 1000])
@pytest.mark.parametrize("D, bk", [(72, 64), (96, 16), (128, 32), (128, 128)])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:])
def test_query_blocks_of_128(device, dtype, D, bk, N):
    """On Hopper two warpgroups attend them, of which the second may have no rows."""
    for options in (
        {"coarse": "none", "selection": "global"}, {"coarse": "block", "is_causal": True},
        {"coarse": "row", "masks": "both"}, {"coarse": "row", "order": 1, "masks": "key"},
        {"coarse": "row", "order": 1, "pool": "centred", "density": (0.1, 0.5, 1.0, 0.2)},
        {"coarse": "row", "order": 1, "pool": "centred", "is_causal": True},
    ):  # fmt: skip
        M = None if "is_causal" in options else 777
        Case(
            device, dtype, block_size=(128, bk), D=D, N=N, M=M, spread=0.5, **{"order": 0} | options
        ).check(backward=False)


@pytest.mark.parametrize("block", [64, (128, 16), (128, 64), (64, 128), (32, 64)])
@pytest.mark.parametrize("D", [136, 192, 200, 256])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:])
def test_wide_heads(device, dtype, D, block):
    """Head dims that have kernels of their own on Hopper, without order 1."""
    for coarse in ("none", "block", "row"):
        for is_causal, masks in [(False, "both"), (False, "none"), (True, "key")]:
            Case(
                device, dtype, block_size=block, D=D, coarse=coarse, order=0, masks=masks,
                is_causal=is_causal, N=333, M=None if is_causal else 777, spread=0.5,
            ).check()  # fmt: skip


@pytest.mark.parametrize("N, M", [(1, 1), (1, 300), (300, 1), (64, 129), (257, 511)])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:2])
def test_lengths_of_wide_heads(device, dtype, N, M):
    """One tile, two and many, uneven rows and rows without a pair."""
    for coarse, order in FORMS:
        for m in (1, 2, 3):
            Case(
                device, dtype, D=256, block_size=64, N=N, M=M, coarse=coarse, order=order,
                selection="global", blocks_per_row=m, spread=0.5,
            ).check()  # fmt: skip


@pytest.mark.parametrize("block", [64, 32, (64, 32), (32, 64)])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:2])
def test_more_blocks_than_the_device_holds(device, dtype, selection, D, block):
    """Blocks of threads take several tiles of rows or keys each, the later ones from a queue."""
    for coarse, order in [("none", 0), ("block", 0), ("row", 1)]:
        case = Case(
            device, dtype, block_size=block, D=D, coarse=coarse, order=order, selection=selection,
            B=4, H=8, Hk=8, N=2048, M=2048, density=1 / 16, spread=1.0,
        )  # fmt: skip
        assert_same_bits(case.check(), case.ours())


@pytest.mark.parametrize("pooled", [31, 32, 33, 65])
@pytest.mark.parametrize("block", [64, 32, (32, 64), (64, 16)])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:3])
def test_half_a_tile_of_pooled_keys(device, dtype, D, block, pooled):
    """Up to 32 of them, for Hopper's kernels of the rows; with them alone, or exact ones too."""
    keys = block if isinstance(block, int) else block[1]
    for order, pool, causal, budget in [
        (0, "even", False, {"selection": "global", "blocks_per_row": 1}),
        (1, "even", False, {"density": 0.1}),
        (1, "centred", False, {"density": 0.1}),
        (1, "centred", True, {"density": 0.1}),
    ]:
        if causal and keys > 32:
            continue
        M = pooled * keys - 5
        Case(
            device, dtype, D=D, block_size=block, coarse="row", order=order, pool=pool, B=1, H=2,
            Hk=1, N=M if causal else 333, M=M, is_causal=causal, spread=0.5, masks="both", **budget,
        ).check()  # fmt: skip


@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("D", [8, 32, 64])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:2])
def test_more_heads_than_the_device_holds(device, dtype, D, block):
    """What a head sums then comes from one block of threads, whole."""
    Case(
        device, dtype, block_size=block, D=D, coarse="row", order=1, masks="both", B=16, H=32,
        Hk=32, N=130, M=200,
    ).check()  # fmt: skip


@pytest.mark.parametrize("block", [64, 32, (32, 64), (128, 64)])
@pytest.mark.parametrize("D", [64, 128, 192])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:2])
def test_more_query_heads_of_a_key_head_than_a_warp_has_threads(device, dtype, D, block):
    """A warp looks up where the lists of a key block lie, a query head for each thread."""
    for H, Hk, selection in [(40, 1, "row"), (66, 2, "global")]:
        Case(
            device, dtype, D=D, block_size=block, coarse="row", order=1, selection=selection, B=2,
            H=H, Hk=Hk, N=130, M=200, density=0.4,
        ).check()  # fmt: skip


@pytest.mark.parametrize("block", [64, 32, (64, 32), (32, 64), (64, 128), (64, 16)])
@pytest.mark.parametrize("D", [32, 64, 128, 192])
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:2])
def test_keys_that_most_rows_choose(device, dtype, D, block):
    """Hopper's gradients of keys begin with the key blocks that are in many lists."""
    for Hk, order, pool in [(4, 0, "even"), (4, 1, "even"), (2, 1, "centred")]:
        case = Case(
            device, dtype, D=D, block_size=block, coarse="row", order=order, pool=pool, Hk=Hk,
            N=700, M=1100, spread=1, density=0.2,
        )  # fmt: skip
        case.q += case.q[:, :, :1]  # towards the same keys
        lists = case.plan().to_dense().sum(2)
        if D <= 64:
            assert (lists > 2 * lists.double().mean()).any()
        case.check()


@pytest.mark.parametrize("masks", ["key", "query", "padding"])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_masks(device, dtype, masks):
    for coarse, order in FORMS:
        Case(device, dtype, coarse=coarse, order=order, masks=masks, N=222, M=301).check()


@pytest.mark.parametrize("spread", [20, 40])
@pytest.mark.parametrize("block", [(32, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize("D", [32, 64])
def test_large_scores(D, block, spread):
    """Scores of hundreds: weights near 1 need the very scores again that forward's lse is of."""
    Case(
        "cpu", torch.float32, coarse="row", order=1, D=D, block_size=block, spread=spread, Hk=4,
        N=512, M=512, density=1 / 8,
    ).check()  # fmt: skip


@pytest.mark.parametrize("N, M", [(1, 300), (300, 1), (31, 33), (32, 32), (129, 64), (257, 511)])
@pytest.mark.parametrize("device, dtype", BEST)
def test_lengths(device, dtype, N, M):
    for coarse, order in FORMS:
        for selection in ("row", "global"):
            Case(device, dtype, N=N, M=M, coarse=coarse, order=order, selection=selection).check()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_one_query_one_key(device, dtype):
    """N = M = 1: out = v, lse = s q.k, so dv = dO, dq = dlse s k, dk = dlse s q."""
    for coarse, order in FORMS:
        for is_causal in (False, True):
            case = Case(
                device, dtype, N=1, M=1, H=2, Hk=2, coarse=coarse, order=order, is_causal=is_causal
            )  # fmt: skip
            result = case.ours()
            s = 16**-0.5
            q, k = case.q.double(), case.k.double()
            g = case.grad_lse.double().unsqueeze(-1) * s
            # dq and dk hold p (dO.v - delta), which cancels: errors scale with |dO| |v| |q or k|.
            terms = (case.grad_out.double() * case.v.double()).abs().sum(-1).max() * s
            size = max(1.0, float(terms * torch.maximum(q.abs().max(), k.abs().max())))
            tight = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps * size}
            for name, expected in [
                ("out", case.v), ("lse", s * (q * k).sum(-1)), ("dv", case.grad_out),
                ("dq", g * k), ("dk", g * q),
            ]:  # fmt: skip
                torch.testing.assert_close(result[name].double(), expected.double(), **tight)


@pytest.mark.parametrize("H, Hk", [(1, 1), (6, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("device, dtype", BEST)
def test_grouped_heads(device, dtype, H, Hk):
    for coarse in ("none", "block", "row"):
        Case(device, dtype, B=3, H=H, Hk=Hk, coarse=coarse, masks="key").check()


@pytest.mark.parametrize("D", [8, 24, 40, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:2])
def test_head_dims(device, dtype, D):
    for coarse, order in [("none", 0), ("block", 1), ("row", 1)]:
        Case(device, dtype, D=D, coarse=coarse, order=order).check()


@pytest.mark.parametrize("device, dtype", BEST)
def test_forced_blocks_and_rows_without_a_pair(device, dtype):
    for coarse, order in FORMS:
        case = Case(
            device, dtype, N=400, M=400, selection="global", first_blocks=1, blocks_per_row=1,
            coarse=coarse, order=order,
        )  # fmt: skip
        assert (case.plan().to_dense().sum(-1) == 0).any()
        case.check()


@pytest.mark.parametrize("device, dtype", BEST)
def test_logits_that_vary_much_inside_blocks(device, dtype):
    """Where the damping of order 1 is far from 1, and the softmax near one key."""
    for coarse in ("block", "row"):
        Case(device, dtype, coarse=coarse, order=1, spread=12.0, D=32).check()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
def test_gradcheck(coarse, order, is_causal):
    """Analytic against numerical gradients. The plan is fixed: its gradient is zero by definition,
    and a numerical step must not change it."""
    case = Case(
        "cpu", torch.float64, B=1, H=2, Hk=1, N=35, M=None if is_causal else 41, D=8,
        block_size=(16, 16), density=0.4, coarse=coarse, order=order, is_causal=is_causal,
        masks="key",
    )  # fmt: skip
    plan = case.plan()

    def function(q, k, v):
        return mra.mra_attention(
            q, k, v, case.key_mask, plan=plan, **case.values, return_lse=True
        )  # fmt: skip

    def finite(q, k, v):  # rows without weight have lse -inf, whose difference is NaN
        out, lse = function(q, k, v)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    inputs = [t.detach().clone().requires_grad_() for t in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(finite, inputs, fast_mode=False)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_one_input_needs_a_gradient(device, dtype, coarse, order, needed):
    case = Case(device, dtype, coarse=coarse, order=order)
    full = case.ours()
    inputs = [
        t.detach().requires_grad_(r) for t, r in zip((case.q, case.k, case.v), needed, strict=True)
    ]
    out, lse = mra.mra_attention(*inputs, **case.options, return_lse=True)
    loss = (out * case.grad_out).sum() + (lse * case.grad_lse).sum()
    loss.backward()
    for t, r, name in zip(inputs, needed, ("dq", "dk", "dv"), strict=True):
        assert (t.grad is not None) == r
        if r:
            torch.testing.assert_close(t.grad, full[name])


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", BEST)
def test_layouts_of_the_gradient(device, dtype, coarse, order):
    """The gradient of out comes as a transposed view, expanded (out.sum()), or strided."""
    case = Case(device, dtype, coarse=coarse, order=order)
    q, k, v = (t.detach().requires_grad_() for t in (case.q, case.k, case.v))
    out = mra.mra_attention(q, k, v, **case.options)
    g = case.grad_out
    plain = torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
    for other in (
        g.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([g, g], -1)[..., 0],
        g.mT.contiguous().mT,
    ):  # fmt: skip
        grads = torch.autograd.grad(out, (q, k, v), other, retain_graph=True)
        for a, b in zip(plain, grads, strict=True):
            assert torch.equal(a, b)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for a, b in zip(ones, torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def layouts_of(x):
    """The memory orders that (B, H, L, D) tensors come in, and whether a gradient lies alike."""
    B, H, L, D = x.shape
    packed = torch.empty(B, L, 3, H, D, device=x.device, dtype=x.dtype)
    yield "as it is", x.contiguous(), True
    yield "projection", x.transpose(1, 2).contiguous().transpose(1, 2), True
    yield "batch inside", x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), True
    yield "packed", packed[:, :, 1].transpose(1, 2).copy_(x), False
    yield "slice", torch.cat([x, x], -1)[..., :D], False
    yield "last dim strided", x.mT.contiguous().mT, False


@pytest.mark.parametrize(
    "coarse, order, pool", [(*form, "even") for form in FORMS] + [("row", 1, "centred")]
)
@pytest.mark.parametrize("device, dtype", BEST)
def test_layouts_of_the_inputs(device, dtype, coarse, order, pool):
    """Gradients have the strides of their inputs, if these are dense with whole rows, else those of
    (B, L, H, D); Meta's are the same, and a leaf takes them without a copy."""
    case = Case(device, dtype, coarse=coarse, order=order, pool=pool)
    plain = None
    for layouts in zip(*(layouts_of(x) for x in (case.q, case.k, case.v)), strict=True):
        leaves = [x.detach().requires_grad_() for _, x, _ in layouts]
        name, alike = layouts[0][0], layouts[0][2]
        made = {}
        for i, x in enumerate(leaves):
            x.register_hook(lambda g, i=i, made=made: made.update({i: (g.data_ptr(), g.stride())}))
        mra.mra_attention(*leaves, **case.options).backward(case.grad_out)
        on_meta = [
            torch.empty_strided(x.shape, x.stride(), device="meta", dtype=dtype, requires_grad=True)
            for x in leaves
        ]
        out = mra.mra_attention(*on_meta, **case.options)
        metas = torch.autograd.grad(out, on_meta, case.grad_out.to("meta"))
        assert [g.stride() for g in metas] == [made[i][1] for i in range(3)], name
        plain = plain or [x.grad for x in leaves]
        for i, (x, expected) in enumerate(zip(leaves, plain, strict=True)):
            B, H, L, D = x.shape
            memory, strides = made[i]
            assert strides == (x.stride() if alike else (H * L * D, D, H * D, 1)), name
            assert not alike or x.grad.data_ptr() == memory, name
            bound = 4 * torch.finfo(dtype).eps if device == "cpu" else 0.0
            assert relative_error(x.grad, expected.double()) <= bound, name


@pytest.mark.parametrize("device, dtype", BEST)
def test_only_lse_has_a_gradient(device, dtype):
    case = Case(device, dtype)
    case.grad_out = torch.zeros_like(case.grad_out)
    q, k, v = (t.detach().requires_grad_() for t in (case.q, case.k, case.v))
    _, lse = mra.mra_attention(q, k, v, **case.options, return_lse=True)
    lse.backward(case.grad_lse)
    assert v.grad is None or not v.grad.any()
    expected = case.ours()
    torch.testing.assert_close(q.grad, expected["dq"])
    torch.testing.assert_close(k.grad, expected["dk"])


def test_second_derivative_is_refused():
    case = Case("cpu", torch.float64)
    q = case.q.detach().requires_grad_()
    out = mra.mra_attention(q, case.k, case.v, **case.options)
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        g.sum().backward()
