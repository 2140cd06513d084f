"""Pool: means over the valid rows of each block (operator mra_attention::pool)."""

import pytest
import torch
from helpers import BEST, DEVICE_DTYPES, DEVICES, limit, new_seed, relative_error

from mra_attention.reference import pool as pool_reference


def pool(x, mask, block):
    return torch.ops.mra_attention.pool(x, mask, block)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("L", [1, 16, 131, 256])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_pool_matches_reference(device, dtype, L, block):
    g = torch.Generator().manual_seed(new_seed())
    x = torch.randn(2, 3, L, 24, generator=g).to(device, dtype)
    for mask in (None, (torch.rand(2, L, generator=g) < 0.6).to(device)):
        mean, count = pool(x, mask, block)
        exact, exact_count = pool_reference(x.double(), mask, block)
        same, _ = pool_reference(x, mask, block)
        assert mean.shape == exact.shape and mean.is_contiguous()
        assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert count.dtype == torch.int32
        assert torch.equal(count.long().expand_as(exact_count), exact_count)
        allowed = limit(mean.dtype, "cpu", relative_error(same, exact))
        assert relative_error(mean, exact) <= allowed


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("D", [8, 16, 32, 64, 128, 136, 256])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_pool_head_dims(device, dtype, D, block):
    """Lanes share a row, and rows a warp, in another way for each width; block 1 is masked."""
    g = torch.Generator().manual_seed(new_seed())
    x = torch.randn(2, 2, 300, D, generator=g).to(device, dtype)
    mask = torch.rand(2, 300, generator=g) < 0.8
    mask[:, block : 2 * block] = False
    mask = mask.to(device)
    mean, count = pool(x, mask, block)
    exact, exact_count = pool_reference(x.double(), mask, block)
    same, _ = pool_reference(x, mask, block)
    assert torch.equal(count.long().expand_as(exact_count), exact_count)
    assert not mean[:, :, 1].any()
    assert relative_error(mean, exact) <= limit(mean.dtype, "cpu", relative_error(same, exact))


@pytest.mark.parametrize("device, dtype", BEST)
def test_pool_literals(device, dtype):
    """Rows 0..20 with value i in column 0 and 1 in column 1; blocks of 16; row 1 and 20 masked.

    Block 0: (0+2+...+15)/15 = 119/15. Block 1 holds rows 16..19: 70/4 = 17.5."""
    x = torch.zeros(1, 1, 21, 8, dtype=dtype, device=device)
    x[..., 0] = torch.arange(21)
    x[..., 1] = 1
    mask = torch.ones(1, 21, dtype=torch.bool, device=device)
    mask[0, [1, 20]] = False
    mean, count = pool(x, mask, 16)
    assert count.tolist() == [[15, 4]]
    assert mean[0, 0, :, 0].tolist() == pytest.approx([119 / 15, 17.5], rel=1e-6)
    assert mean[0, 0, :, 1].tolist() == pytest.approx([1, 1], rel=1e-6)
    assert not mean[..., 2:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_pool_empty_block_is_zero_even_beside_nan(device):
    """What a mask hides never enters a sum, be it NaN."""
    x = torch.ones(1, 2, 64, 8, device=device)
    x[:, :, 32:40] = float("nan")
    mask = torch.ones(1, 64, dtype=torch.bool, device=device)
    mask[:, 32:] = False
    mean, count = pool(x, mask, 32)
    assert count.tolist() == [[32, 0]]
    assert (mean[:, :, 0] == 1).all() and (mean[:, :, 1] == 0).all()


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_pool_any_strides(device, dtype):
    """(B, L, H, D) memory, as a projection leaves it, and a slice of a wider tensor."""
    g = torch.Generator().manual_seed(new_seed())
    wide = torch.randn(2, 77, 3, 48, generator=g).to(device, dtype)
    for x in (wide.transpose(1, 2), wide[..., 8:24].transpose(1, 2), wide[:, ::2].transpose(1, 2)):
        mean, count = pool(x, None, 32)
        expected, expected_count = pool(x.contiguous(), None, 32)
        assert torch.equal(mean, expected) and torch.equal(count, expected_count)


@pytest.mark.parametrize("device", DEVICES)
def test_pool_large_values_do_not_overflow(device):
    """128 rows of 60000 sum to more than float16 holds; the mean is still 60000."""
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    x = torch.full((1, 1, 128, 8), 57344.0, dtype=dtype, device=device)  # exact in both dtypes
    mean, _ = pool(x, None, 128)
    assert (mean == 57344).all()
