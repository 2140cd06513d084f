"""Forward: output and lse of every mode against the references."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BEST,
    CPU_DTYPES,
    CUDA_DTYPES,
    DEVICE_DTYPES,
    DEVICES,
    Case,
    assert_same_bits,
    compare,
    limit,
    new_seed,
    relative_error,
)  # fmt: skip

import mra_attention as mra
from mra_attention.reference import mra_attention_reference

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
SIZES = (16, 32, 64, 128)
CPU_BLOCKS = [(q, k) for q in SIZES for k in SIZES]


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_every_mode(device, dtype, coarse, order, selection, is_causal, masks):
    Case(
        device, dtype, coarse=coarse, order=order, selection=selection, is_causal=is_causal,
        masks=masks, N=331, D=32,
    ).check(backward=False)  # fmt: skip


@pytest.mark.parametrize("block", CPU_BLOCKS)
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:2])
def test_every_block_size(device, dtype, block):
    if device == "cuda" and block[0] < 32:
        pytest.skip("CUDA takes block_q from 32 on")
    for coarse, is_causal in [("block", False), ("row", False), ("row", True)]:
        Case(
            device, dtype, block_size=block, coarse=coarse, is_causal=is_causal, masks="both",
            N=397, density=0.35,
        ).check(backward=False)  # fmt: skip


@pytest.mark.parametrize("masks", ["key", "query", "padding"])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_masks(device, dtype, masks):
    for coarse in ("none", "block", "row"):
        Case(device, dtype, coarse=coarse, masks=masks, N=222, M=301).check(backward=False)


@pytest.mark.parametrize(
    "N, M", [(1, 1), (1, 300), (300, 1), (31, 33), (32, 32), (129, 64), (257, 511)]
)
@pytest.mark.parametrize("device, dtype", BEST)
def test_lengths(device, dtype, N, M):
    for coarse, order in FORMS:
        for selection in ("row", "global"):
            Case(
                device, dtype, N=N, M=M, coarse=coarse, order=order, selection=selection
            ).check(backward=False)  # fmt: skip


@pytest.mark.parametrize("H, Hk", [(1, 1), (3, 3), (6, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("device, dtype", BEST)
def test_grouped_heads(device, dtype, H, Hk):
    for coarse in ("none", "block", "row"):
        Case(device, dtype, B=3, H=H, Hk=Hk, coarse=coarse, masks="key").check(backward=False)


@pytest.mark.parametrize("D", [8, 16, 24, 40, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("device, dtype", BEST + CUDA_DTYPES[1:2])
def test_head_dims(device, dtype, D):
    for coarse, order in [("none", 0), ("block", 1), ("row", 1)]:
        Case(device, dtype, D=D, coarse=coarse, order=order).check(backward=False)


@pytest.mark.parametrize("device, dtype", BEST)
def test_forced_blocks(device, dtype):
    for selection in ("row", "global"):
        Case(
            device, dtype, N=400, M=400, selection=selection, diagonal_blocks=3, first_blocks=1,
            blocks_per_row=5,
        ).check(backward=False)  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 0.03, 1.0, -0.5])
@pytest.mark.parametrize("device, dtype", BEST)
def test_scale(device, dtype, scale):
    for coarse in ("none", "block", "row"):
        Case(device, dtype, scale=scale, coarse=coarse, spread=1.0).check(backward=False)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_density_one_is_softmax_attention(device, dtype, coarse, order, is_causal):
    """Every pair selected: torch's own attention, which knows nothing of our reference."""
    case = Case(
        device, dtype, density=1.0, coarse=coarse, order=order, is_causal=is_causal,
        masks="none" if is_causal else "key",
    )  # fmt: skip
    ours = case.ours(backward=False)["out"]
    mask = None if case.key_mask is None else case.key_mask[:, None, None, :]
    exact, same = (
        F.scaled_dot_product_attention(
            case.q.to(t), case.k.to(t), case.v.to(t), attn_mask=mask, is_causal=is_causal,
            enable_gqa=True,
        )
        for t in (torch.float64, dtype)
    )  # fmt: skip
    assert relative_error(ours, exact) <= limit(dtype, device, relative_error(same, exact))


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_layouts(device, dtype, coarse, order):
    """Any strides: the memory orders that projections, packed qkv and slices leave."""
    case = Case(device, dtype, H=4, Hk=4, M=150, coarse=coarse, order=order)
    plan = case.plan()
    plain = case.ours(plan, backward=False)
    q, k, v = case.q, case.k, case.v
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)  # (B, N, 3, H, D)
    layouts = {
        "projection": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        "packed": [t.transpose(1, 2) for t in packed.unbind(2)],
        "head last": [t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (q, k, v)],
        "slice": [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (q, k, v)],
        "odd offset": [torch.cat([t[..., :1], t], -1)[..., 1:] for t in (q, k, v)],
        "last dim strided": [torch.stack([t, t], -1)[..., 0] for t in (q, k, v)],
    }
    for name, (q, k, v) in layouts.items():
        out, lse = mra.mra_attention(q, k, v, plan=plan, **case.values, return_lse=True)
        # The CPU's matrix products round by the alignment of their operands.
        bound = 4 * torch.finfo(dtype).eps if device == "cpu" else 0.0
        assert relative_error(out, plain["out"].double()) <= bound, name
        assert relative_error(lse, plain["lse"].double()) <= bound, name


@pytest.mark.parametrize("device, dtype", BEST)
def test_expanded_inputs(device, dtype):
    """Stride 0 over batch and heads."""
    case = Case(device, dtype, B=1, H=1, Hk=1)
    q, k, v = case.q.expand(3, 4, -1, -1), case.k.expand(3, 2, -1, -1), case.v.expand(3, 2, -1, -1)
    out = mra.mra_attention(q, k, v, **case.options)
    expected = mra.mra_attention(q.clone(), k.clone(), v.clone(), **case.options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_output_memory_is_batch_seq_head_dim(device, dtype):
    case = Case(device, dtype)
    out = mra.mra_attention(case.q, case.k, case.v, **case.options)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_fully_masked_rows_are_zero(device, dtype):
    """No valid key at all in batch entry 1, masked queries in entry 0; NaN in what is masked."""
    for coarse, order in FORMS:
        for selection in ("row", "global"):
            case = Case(device, dtype, N=140, coarse=coarse, order=order, selection=selection)
            case.key_mask = torch.ones(2, 203, dtype=torch.bool, device=device)
            case.key_mask[1] = False
            case.query_mask = torch.ones(2, 140, dtype=torch.bool, device=device)
            case.query_mask[0, 50:110] = False
            result = case.ours()
            dead = ~case.query_mask.clone()
            dead[1] = True
            rows = dead[:, None, :].expand(2, 4, 140)
            assert not result["out"][rows].any() and not result["dq"][rows].any()
            assert (result["lse"][rows] == -torch.inf).all()
            assert not result["dk"][1].any() and not result["dv"][1].any()
            assert all(result[n].isfinite().all() for n in ("out", "dq", "dk", "dv"))
            assert result["lse"][~rows].isfinite().all()


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_causal_rows_before_the_first_valid_key(device, coarse, order):
    """Keys 0..69 masked: rows 0..69 see nothing, row 70 sees one key and returns its value."""
    case = Case(device, torch.float32, N=200, is_causal=True, coarse=coarse, order=order)
    case.key_mask = torch.ones(2, 200, dtype=torch.bool, device=device)
    case.key_mask[:, :70] = False
    result = case.check()
    assert not result["out"][:, :, :70].any() and not result["dq"][:, :, :70].any()
    expected = case.v[:, :, 70].repeat_interleave(2, 1)
    torch.testing.assert_close(result["out"][:, :, 70], expected)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_huge_logits(device, dtype, coarse, order, selection, size):
    """Logits of +-1e4: nothing overflows, forward or backward, whichever part holds the mass."""
    seed = new_seed()
    case = Case(
        device, dtype, D=16, coarse=coarse, order=order, selection=selection, seed=seed,
        density=0.2, scale=1.0,
    )  # fmt: skip
    with torch.no_grad():
        case.q.copy_(case.q.sign()), case.k.copy_(case.k.sign())
        case.q[..., 0], case.k[..., 0] = 100.0, size / 100
        case.k[:, :, :64, 0] = 0  # blocks whose weight underflows, or that hold it all
    result = case.ours()
    for name, t in result.items():
        assert t.isfinite().all(), (name, seed)


def check_growth(device, dtype, step, block, **options):
    """Of some query heads each key block's logits lie above those of the block before (or below
    them), by what the shift of a softmax passes over or has to follow, then by little again. Not in
    float32 on CUDA, whose limit leaves no room for the rounding of such logits."""
    sizes = dict(N=6 * block, M=9 * block + 5, block_size=block, density=0.8)
    case = Case(device, dtype, scale=0.25, spread=0.5, **sizes | options)
    with torch.no_grad():
        y = torch.arange(case.k.shape[2], device=device) // block
        heads = torch.where(y < 6, y, 6).to(dtype) * (step / 2)
        case.k[..., 0] = heads
        case.q[..., 0], case.q[:, 1::2, :, 0] = 8.0, 0.0
    case.check()


GROWTH = pytest.mark.parametrize("step", [6.0, 45.0, 300.0, -45.0])


@GROWTH
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("coarse, order", [("none", 0), ("row", 1)])
@pytest.mark.parametrize("device, dtype", CPU_DTYPES + CUDA_DTYPES[1:])
def test_logits_that_grow(device, dtype, coarse, order, block, step):
    check_growth(device, dtype, step, block, D=64, coarse=coarse, order=order)


@GROWTH
@pytest.mark.parametrize(
    "block, D, options",
    [
        (64, 64, dict(coarse="none", order=0, masks="both")),
        (64, 64, dict(coarse="row", order=1, masks="both", pool="centred")),
        (64, 64, dict(coarse="row", order=0, is_causal=True, N=581, M=581)),
        (64, 128, dict(coarse="block", order=1, masks="both")),
        (128, 128, dict(coarse="row", order=1, masks="both")),
        (64, 192, dict(coarse="row", order=0, masks="both")),
    ],
)
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES[1:])
def test_logits_that_grow_in_every_kernel(device, dtype, block, D, options, step):
    check_growth(device, dtype, step, block, D=D, **options)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1e4])
@pytest.mark.parametrize("block, D", [(32, 64), (64, 64), (64, 128), (128, 128), (64, 192)])
@pytest.mark.parametrize("coarse, order", [("none", 0), ("block", 0), ("row", 1)])
@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), *CUDA_DTYPES])
def test_rows_that_do_not_count_have_no_say(device, dtype, coarse, order, block, D, what):
    """Whatever they hold, the others come out the same to the last bit."""
    options = dict(coarse=coarse, order=order, block_size=block, D=D, N=600, M=600, density=0.4)
    case = Case(device, dtype, masks="both", **options)
    first = case.ours(backward=False)
    case.q.masked_fill_(~case.query_mask[:, None, :, None], what)
    assert_same_bits(first, case.ours(backward=False))


@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_huge_keys(device, coarse, order):
    """Keys of size 1e4 that cancel in their block's mean, so that only exact logits are huge."""
    for is_causal in (False, True):
        case = Case(
            device, torch.float32, N=192, M=192, coarse=coarse, order=order, is_causal=is_causal
        )  # fmt: skip
        with torch.no_grad():
            case.k *= 1e4
            case.k[:, :, 1::2] = -case.k[:, :, ::2]
        result = case.ours()
        for name, t in result.items():
            assert t.isfinite().all(), (name, case.seed)


@pytest.mark.parametrize("device, dtype", BEST)
def test_values_far_from_zero(device, dtype):
    """A constant value comes out as it went in, whatever the weights."""
    for coarse, order in FORMS:
        case = Case(device, dtype, coarse=coarse, order=order)
        case.v.fill_(1000.0)
        out = case.ours(backward=False)["out"]
        assert relative_error(out, torch.full_like(out, 1000.0)) <= (
            1e-12 if device == "cpu" else 1e-6
        )


@pytest.mark.gpu
def test_tf32_mode():
    """Where torch allows TF32 for float32, one TF32 product may do: at most twice torch's error."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for coarse, order in FORMS:
            case = Case("cuda", torch.float32, N=500, M=700, D=64, coarse=coarse, order=order)
            dense = case.plan().to_dense()
            exact = case.reference(torch.float64, dense)
            same = case.reference(torch.float32, dense)
            compare(case.ours(plan=case.plan()), same, exact, torch.float32, "cuda",
                    f"seed {case.seed}", tf32=True)  # fmt: skip
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("device", DEVICES)
def test_operator_without_autograd(device):
    """Under no_grad and inference_mode the same numbers come out."""
    case = Case(device, torch.float32)
    with_grad = case.ours(backward=True)["out"]
    with torch.no_grad():
        assert torch.equal(with_grad, mra.mra_attention(case.q, case.k, case.v, **case.options))
    with torch.inference_mode():
        assert torch.equal(with_grad, mra.mra_attention(case.q, case.k, case.v, **case.options))


def test_reference_and_operator_share_defaults():
    """No option given: row, order 1, row selection, block 64, density 1/8."""
    case = Case("cpu", torch.float64, N=700, M=700, H=2, Hk=2)
    ours = mra.mra_attention(case.q, case.k, case.v)
    assert relative_error(ours, mra_attention_reference(case.q, case.k, case.v)) <= 1e-12
