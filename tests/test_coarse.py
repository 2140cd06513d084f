"""Coarse: what the pairs that are not exact contribute, seen where it can be known otherwise."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import BEST, CUDA_DTYPES, Case, new_seed, relative_error

import mra_attention as mra

TIGHT = {"cpu": 1e-12, "cuda": 1e-5}


def constant_blocks(x, block):
    """Every row replaced by the mean of its block."""
    x = x.clone()
    for start in range(0, x.shape[2], block):
        part = x[:, :, start : start + block]
        part.copy_(part.mean(2, keepdim=True).expand_as(part))
    return x


@pytest.mark.parametrize("coarse, order", [("block", 0), ("block", 1), ("row", 0), ("row", 1)])
@pytest.mark.parametrize("device, dtype", BEST)
def test_constant_blocks_are_exact_attention(device, dtype, coarse, order):
    """Keys and values (for "block" queries too) that are constant within blocks lose nothing by
    pooling: the smallest budget already gives softmax attention. Short last blocks included."""
    case = Case(device, dtype, H=4, Hk=2, N=150, M=203, coarse=coarse, order=order, density=1e-6)
    k, v = constant_blocks(case.k, 32), constant_blocks(case.v, 32)
    q = constant_blocks(case.q, 32) if coarse == "block" else case.q
    out, lse = mra.mra_attention(q, k, v, **case.options, return_lse=True)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT / math.sqrt(q.shape[-1])
    assert relative_error(out, exact) <= TIGHT[device]
    assert relative_error(lse, logits.logsumexp(-1)) <= TIGHT[device]


@pytest.mark.parametrize("coarse", ["block", "row"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_nothing_selected_is_attention_to_pooled_keys(device, dtype, coarse):
    """A plan without a pair: softmax attention over block means with the bias log c_y, of the
    rows themselves ("row") or of their block's mean ("block"). Gradients by torch's autograd."""
    g = torch.Generator().manual_seed(new_seed())
    N, M, D, b = 128, 300, 16, 32
    q, k, v = (torch.randn(1, 2, L, D, generator=g).to(device, dtype) for L in (N, M, M))
    key_mask = (torch.rand(1, M, generator=g) < 0.7).to(device)
    key_mask[:, 64:96] = False
    dense = torch.zeros(1, 2, 4, 10, dtype=torch.bool, device=device)
    plan = mra.Plan.from_dense(dense, N, M, block_size=b)
    grad = torch.randn(1, 2, N, D, generator=g).to(device, dtype)

    def pooled(q, k, v):
        ones = F.pad(key_mask, (0, -M % b)).view(1, 1, -1, b, 1).double()
        count = ones.sum(-2)
        k, v = (
            (F.pad(t, (0, 0, 0, -M % b)).view(1, 2, -1, b, D) * ones).sum(-2) / count.clamp(min=1)
            for t in (k, v)
        )
        if coarse == "block":
            q = (
                q.view(1, 2, -1, b, D)
                .mean(-2, keepdim=True)
                .expand(-1, -1, -1, b, -1)
                .flatten(2, 3)
            )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=count[..., 0].log().unsqueeze(-2))

    def ours(q, k, v):
        return mra.mra_attention(q, k, v, key_mask, plan=plan, coarse=coarse, order=0)

    results = []
    for function, inputs in ((ours, (q, k, v)), (pooled, (q.double(), k.double(), v.double()))):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))])
    for name, got, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert relative_error(got, exact) <= TIGHT[device], name


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_state_made_along_with_the_plan(device, dtype, selection):
    """A plan made inside may bring the block-coarse state along; the same plan, given, cannot."""
    sizes = [(150, 203), (500, 1000), (2100, 4000), (5000, 5000), (12000, 8000)]
    for N, M in sizes if device == "cuda" else sizes[:2]:
        for options in ({}, {"diagonal_blocks": 3, "first_blocks": 1, "is_causal": True}):
            case = Case(
                device, dtype, N=N, M=N if options else M, coarse="block", masks="both",
                selection=selection, density=0.1, **options,
            )  # fmt: skip
            inside, given = case.ours(), case.ours(case.plan())
            for name in inside:
                error = relative_error(inside[name], given[name])
                assert error <= TIGHT[device], (case.seed, N, M, options, name)


@pytest.mark.parametrize("device, dtype", BEST)
def test_none_drops_what_is_not_selected(device, dtype):
    """coarse="none" is softmax attention under the element mask that the plan spells out."""
    case = Case(device, dtype, coarse="none", order=1, masks="key")
    plan = case.plan()
    mask = plan.to_dense().repeat_interleave(32, -2)[..., : case.q.shape[2], :]
    mask = mask.repeat_interleave(32, -1)[..., : case.k.shape[2]] & case.key_mask[:, None, None]
    out = case.ours(plan, backward=False)["out"]
    exact = F.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), attn_mask=mask, enable_gqa=True
    )
    assert relative_error(out, exact) <= TIGHT[device]


@pytest.mark.parametrize("device, dtype", BEST)
def test_order_is_without_effect_when_nothing_is_coarse(device, dtype):
    for options in ({"coarse": "none"}, {"coarse": "row", "density": 1.0}):
        case = Case(device, dtype, **options)
        case.options["order"] = 0
        zero = case.ours()
        case.options["order"] = 1
        one = case.ours()
        for name in zero:
            assert relative_error(one[name], zero[name]) <= TIGHT[device], name


@pytest.mark.parametrize("coarse", ["block", "row"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_first_order_term_is_first_order(device, dtype, coarse):
    """Values linear in the keys within each block, logits small: the error of order 0 is almost
    wholly first order, and order 1 takes it away (its one moment for all blocks is nearly each
    block's own here)."""
    g = torch.Generator().manual_seed(new_seed())
    D, b, M = 16, 32, 256
    center_k, center_v = (torch.randn(1, 2, M // b, 1, D, generator=g) for _ in range(2))
    spread = torch.randn(1, 2, M // b, b, D, generator=g)
    spread = spread - spread.mean(-2, keepdim=True)
    q = torch.randn(1, 2, M // b, 1, D, generator=g).expand(-1, -1, -1, b, -1).reshape(1, 2, M, D)
    matrix = torch.randn(D, D, generator=g)

    k = (center_k + spread).reshape(1, 2, M, D)
    v = (center_v + spread @ matrix).reshape(1, 2, M, D)
    q, k, v = (t.to(device, dtype) for t in (q, k, v))
    options = {"block_size": b, "blocks_per_row": 1, "coarse": coarse, "scale": 1e-3,
               "pool": "even"}  # fmt: skip
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1e-3)
    error = [
        relative_error(mra.mra_attention(q, k, v, order=order, **options), exact)
        for order in (0, 1)
    ]
    assert error[1] < 0.3 * error[0]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("H, Hk", [(2, 2), (4, 1)])
@pytest.mark.parametrize("D", [24, 64, 72, 128])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:])
def test_block_gradients_of_many_blocks(device, dtype, D, H, Hk, is_causal):
    """More than a kernel takes at once of either side, the last of them in part."""
    for block, masks in (((32, 16), "both"), ((32, 64), "none"), ((128, 16), "padding")):
        Case(
            device, dtype, B=1, H=H, Hk=Hk, N=2140, M=2140 if is_causal else 1090, D=D,
            block_size=block, masks=masks, coarse="block", order=0, density=0.1,
            is_causal=is_causal, spread=0.5,
        ).check(staged=True)  # fmt: skip


@pytest.mark.parametrize("H, Hk", [(2, 2), (4, 1)])
@pytest.mark.parametrize("D, N, nk", [(64, 2200, 1100), (40, 300, 8300), (128, 600, 2300)])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:])
def test_block_state_of_many_keys(device, dtype, D, N, nk, H, Hk):
    """More key blocks than the plan makes the state of, and than the bits of two tiles hold."""
    Case(
        device, dtype, B=1, H=H, Hk=Hk, N=N, M=16 * nk, D=D, block_size=(32, 16),
        coarse="block", order=0, blocks_per_row=4, spread=0.5,
    ).check(staged=True)  # fmt: skip


@pytest.mark.gpu
def test_block_gradients_of_more_queries_a_key_head_than_fit():
    """16 heads of 6063 query blocks share a key head: too many bits of selected pairs for the
    shared memory of one block of threads. With the keys repeated they fit."""
    g = torch.Generator("cuda").manual_seed(new_seed())
    N, options = 194_001, {"block_size": 32, "blocks_per_row": 2, "coarse": "block", "order": 0}
    q, k, v, grad_out = (
        torch.randn(1, H, N, 16, generator=g, device="cuda").bfloat16() for H in (16, 1, 1, 16)
    )

    def run(k, v):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = mra.mra_attention(*inputs, **options)
        return out, *torch.autograd.grad(out, inputs, grad_out)

    out, dq, dk, dv = run(k, v)
    *same, dk_each, dv_each = run(*(t.expand(-1, 16, -1, -1).contiguous() for t in (k, v)))
    eps = torch.finfo(torch.bfloat16).eps
    for got, expected in ((out, same[0]), (dq, same[1]), (dk, dk_each.double().sum(1, True)),
                          (dv, dv_each.double().sum(1, True))):  # fmt: skip
        assert relative_error(got, expected) <= eps


@pytest.mark.parametrize("coarse", ["block", "row"])
@pytest.mark.parametrize("device, dtype", BEST)
def test_coarse_part_helps(device, dtype, coarse):
    """On smooth sequences the coarse part brings the result nearer to exact attention."""
    g = torch.Generator().manual_seed(new_seed())
    q, k, v = (
        torch.randn(1, 4, 512, 16, generator=g).cumsum(2).mul(0.1).to(device, dtype)
        for _ in range(3)
    )
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = {
        form: relative_error(mra.mra_attention(q, k, v, block_size=32, coarse=form, order=0), exact)
        for form in ("none", coarse)
    }
    assert error[coarse] < error["none"]
