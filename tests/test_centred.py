"""pool="centred" and "sampled": the operators against the dense reference, forward and backward.

Gradients are compared with the reference's; those of "centred" with finite differences too, in
test_gradcheck.py. Plans are tested in test_centred_plan.py, the reference itself in
test_centred_reference.py."""

import copy

import pytest
import torch
from helpers import (
    BEST,
    CUDA_DTYPES,
    DEVICES,
    Case,
    assert_same_bits,
    compare,
    relative_error,
)
from tools import (
    check_backward_under_autocast,
    check_export,
    check_one_graph,
    check_transforms,
)  # fmt: skip
from torch.utils.flop_counter import FlopCounterMode

import mra_attention as mra
from mra_attention import MRAConfig
from mra_attention.weights import dense_weights

OPS = torch.ops.mra_attention
POOLS = ["centred", "sampled"]
FORMS = [(pool, order) for pool in POOLS for order in (0, 1)]
forms = pytest.mark.parametrize("pool, order", FORMS)


@pytest.mark.parametrize("masks", ["none", "key", "query", "both", "padding"])
@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_is_the_reference(device, dtype, pool, order, masks):
    case = Case(device, dtype, masks=masks, pool=pool, order=order)
    ours = case.check()
    # and so it is with the reference's own plan
    reference = mra.reference.mra_attention_reference(
        case.q.double(), case.k.double(), case.v.double(), case.key_mask, case.query_mask,
        **case.options,
    )  # fmt: skip
    compare({"out": ours["out"]}, None, {"out": reference}, dtype, device)


@pytest.mark.parametrize(
    "device, dtype",
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16), *CUDA_DTYPES],
)
@forms
def test_other_dtypes(device, dtype, pool, order):
    for masks in ("none", "both"):
        Case(device, dtype, pool=pool, order=order, masks=masks, N=500, M=700, D=32).check()


@pytest.mark.parametrize("D", [8, 32, 40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
@forms
def test_kernels(device, dtype, pool, order, D):
    """Every padded head dim, and the kernels for short blocks and for others."""
    for block_size in ((32, 32), (64, 64), (128, 16), (32, 128)):
        Case(device, dtype, pool=pool, order=order, masks="both", N=333, M=509, D=D, spread=1.0,
             block_size=block_size).check()  # fmt: skip


@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
@forms
def test_long_heads(device, dtype, pool, order, D):
    """More pooled keys than one tile holds, rows in several parts; and more than have a part of
    their own in the sums of a row's pooled gradients (csrc/cuda/fine.cpp)."""
    for masks in ("none", "both"):
        options = dict(B=1, H=4, Hk=2, D=D, masks=masks, pool=pool, order=order)
        Case(device, dtype, N=2100, M=4500, density=0.05, **options).check()
        if dtype != torch.float32:  # which goes by other kernels
            block_size = (64, 16)
            Case(
                device, dtype, N=130, M=16500, block_size=block_size, density=0.02, **options
            ).check()


@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_many_heads_and_parts_of_few(device, dtype, pool, order, D):
    """Up to 32 and up to 64 pooled keys (sm90/backward_pooled_order1.cuh on Hopper): more heads
    than a GPU has multiprocessors, of one tile of rows to four; few heads in many parts."""
    options = dict(D=D, pool=pool, order=order, masks="both")
    for B, H, Hk, N, M in ((72, 4, 4, 50, 90), (45, 6, 6, 250, 300), (40, 8, 2, 130, 200),
                           (1, 1, 1, 5000, 700), (1, 4, 2, 2500, 1000), (40, 4, 4, 200, 1100),
                           (35, 4, 2, 50, 2048), (1, 4, 2, 2500, 1900)):  # fmt: skip
        B = B if device == "cuda" else min(B, 3)  # a CPU has no use for as many
        Case(device, dtype, B=B, H=H, Hk=Hk, N=N, M=M, **options).check()
    for block_size, M in (
        (64, 500),
        ((128, 32), 500),
        ((64, 16), 500),
        (64, 2200),
        ((128, 16), 1024),
    ):
        Case(device, dtype, N=470, M=M, block_size=block_size, **options).check()


@pytest.mark.parametrize("block_size", [16, 64, (128, 16), (32, 128)])
@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_shapes(device, dtype, pool, order, block_size):
    """Key heads of one to four query heads, fewer queries than are sampled, short last blocks."""
    if device == "cuda" and block_size == 16:
        block_size = (32, 16)  # a GPU has no blocks of 16 queries
    for H, Hk, N, M in ((4, 4, 130, 130), (4, 1, 37, 301), (2, 1, 300, 129), (1, 1, 1, 20)):
        options = dict(H=H, Hk=Hk, N=N, M=M, block_size=block_size, density=0.2)
        Case(device, dtype, **options, masks="both", pool=pool, order=order).check()


@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_options_beside_it(device, dtype, pool, order):
    for options in (
        dict(selection="global"), dict(diagonal_blocks=2, first_blocks=1), dict(scale=0.7),
        dict(layout=(9, 16), M=150), dict(density=1.0), dict(blocks_per_row=1),
    ):  # fmt: skip
        Case(device, dtype, **options, masks="both", pool=pool, order=order).check()


@pytest.mark.parametrize("device", DEVICES)
@forms
def test_a_given_plan_is_the_same(device, pool, order):
    case = Case(device, torch.float32, masks="both", pool=pool, order=order)
    assert_same_bits(case.ours(), case.ours(plan=case.plan()))


@forms
def test_same_bits_for_any_number_of_threads(pool, order):
    case = Case("cpu", torch.float32, N=700, M=700, H=2, Hk=1, B=1, masks="both", pool=pool,
                order=order)  # fmt: skip
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.ours()
        torch.set_num_threads(2)
        assert_same_bits(one, case.ours())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device, dtype", BEST)
@forms
def test_what_empty_blocks_hold_goes_nowhere(device, dtype, pool, order):
    case = Case(device, dtype, N=203, pool=pool, order=order)
    keep = torch.arange(203, device=device) // 32 % 2 == 0
    case.key_mask, case.query_mask = keep.repeat(2, 1), torch.stack([keep, keep.roll(32)])
    result = case.check()
    for x in (case.k, case.v):
        x.masked_fill_(~keep[:, None], torch.nan)
    assert_same_bits(result, case.ours())


@pytest.mark.parametrize("size", [1e3, -1e3])
@pytest.mark.parametrize("device, dtype", [("cpu", torch.float64), ("cpu", torch.float32), BEST[1]])
@forms
def test_huge_logits(device, dtype, pool, order, size):
    case = Case(device, dtype, masks="both", spread=size, pool=pool, order=order)
    assert all(case.ours()[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))
    if dtype == torch.float64:
        compare(
            case.ours(backward=False), None,
            case.reference(dtype, case.plan().to_dense(), backward=False), dtype, "cpu",
        )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@forms
def test_nothing_to_attend(device, pool, order):
    options = dict(blocks_per_row=1, block_size=32, pool=pool, order=order)
    k = torch.randn(2, 1, 100, 8, device=device)
    for B, N in ((0, 50), (2, 0)):
        q = torch.randn(B, 2, N, 8, device=device, requires_grad=True)
        out = mra.mra_attention(q, k[:B], k[:B], **options)
        assert out.shape == q.shape
        out.sum().backward()
    none, all_ = torch.zeros(2, 100, dtype=torch.bool, device=device), None
    for key_mask, query_mask in ((none, all_), (all_, none[:, :50]), (none, none[:, :50])):
        leaves = [
            torch.randn(2, n, m, 8, device=device).requires_grad_() for n, m in ((2, 50), (1, 100))
        ]
        out, lse = mra.mra_attention(
            leaves[0], leaves[1], leaves[1], key_mask, query_mask, return_lse=True, **options
        )
        assert (out == 0).all() and (lse == -torch.inf).all()
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert (grad == 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_compiles_to_one_graph(pool, dynamic):
    check_one_graph(MRAConfig(blocks_per_row=2, block_size=32, pool=pool), dynamic)


@pytest.mark.parametrize("pool", POOLS)
def test_export_with_any_length(pool):
    check_export(MRAConfig(block_size=32, pool=pool))


@pytest.mark.parametrize("pool", POOLS)
def test_torch_func_and_autocast(pool):
    check_transforms(MRAConfig(blocks_per_row=1, block_size=32, pool=pool))


@pytest.mark.parametrize("device", DEVICES)
@forms
def test_backward_under_autocast(device, pool, order):
    check_backward_under_autocast(MRAConfig(block_size=32, pool=pool, order=order), device)


@pytest.mark.parametrize("device, dtype", BEST)
@pytest.mark.parametrize(
    "pool, order, causal",
    [(*form, False) for form in FORMS] + [("centred", o, True) for o in (0, 1)],
)
def test_weights_are_the_matrix_it_stands_for(device, dtype, pool, order, causal):
    options = dict(masks="both", pool=pool, order=order)
    if causal:
        options |= dict(is_causal=True, N=280, M=280, block_size=(32, 16))
    case = Case(device, dtype, Hk=4, **options)
    config = MRAConfig(**{name: x for name, x in case.options.items() if name != "is_causal"})
    weights = dense_weights(
        case.q, case.k, case.key_mask, case.query_mask, config=config, is_causal=causal,
        scale=0.25, plan=case.plan(),
    )  # fmt: skip
    compare({"out": weights @ case.v}, None, case.ours(backward=False), dtype, device)


@pytest.mark.parametrize("pool", POOLS)
def test_modules_take_it(pool):
    config = MRAConfig(density=0.2, block_size=16, pool=pool)
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True).double()
    exact = copy.deepcopy(layer)
    assert mra.replace_attention(layer, config) == 1
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    assert not torch.equal(layer(x), exact(x))
    layer.self_attn.config = config.replace(density=1.0)
    torch.testing.assert_close(layer(x), exact(x), rtol=1e-9, atol=1e-9)


def test_operations_are_counted():
    q, k, v = (torch.randn(1, h, 128, 16) for h in (2, 1, 1))
    counts = {}
    for pool in ("even", *POOLS):
        with FlopCounterMode(display=False) as counter:
            mra.mra_attention(q, k, v, block_size=32, pool=pool)
        counts[pool] = counter.get_total_flops()
    assert counts["centred"] - counts["even"] == 5 * 16 * 128
    assert counts["sampled"] - counts["even"] == 33 * 16 * 128


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(pool=5), TypeError), (dict(pool=None), TypeError), (dict(pool="mean"), ValueError),
        (dict(pool="centred", coarse="block"), ValueError),
        (dict(pool="sampled", coarse="none"), ValueError),
        (dict(pool="centred", levels=((128, 2),)), NotImplementedError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_pool(options, error):
    q, k, v = (torch.randn(1, 1, 300, 8) for _ in range(3))
    for function, tensors in ((mra.mra_attention, (q, k, v)), (mra.make_plan, (q, k))):
        with pytest.raises(error, match="pool: got"):
            function(*tensors, block_size=32, **options)
    with pytest.raises(error, match="pool: got"):
        MRAConfig(block_size=32, **options)


def test_causal_is_refused():
    x = torch.randn(1, 1, 300, 8)
    plan, sampled = mra.make_plan(x, x, is_causal=True), dict(pool="sampled")
    for options in (sampled, dict(config=MRAConfig(pool="sampled")), dict(plan=plan, **sampled)):
        with pytest.raises(NotImplementedError, match="pool: got"):
            mra.mra_attention(x, x, x, is_causal=True, **options)


@pytest.mark.parametrize("masks", ["none", "both", "padding"])
@pytest.mark.parametrize("block_size", [(32, 32), (16, 64), (64, 16), (128, 32), (32, 128)])
@pytest.mark.parametrize(
    "device, dtype", [("cpu", torch.float64), ("cpu", torch.bfloat16), *CUDA_DTYPES]
)
@pytest.mark.parametrize("order", [0, 1])
def test_causal(order, device, dtype, block_size, masks):
    if device == "cuda" and block_size == (16, 64):
        block_size = (64, 64)  # a GPU has no blocks of 16 queries
    # Of 20 tokens many entries: what rounding the output leaves in delta adds up by chance.
    for B, H, Hk, N in ((2, 4, 2, 150), (2, 2, 2, 203), (32, 1, 1, 20)):
        options = dict(B=B, H=H, Hk=Hk, N=N, M=N, block_size=block_size, density=0.2, masks=masks)
        case = Case(device, dtype, **options, is_causal=True, pool="centred", order=order)
        case.check()
        assert_same_bits(case.ours(), case.ours(plan=case.plan()))


@pytest.mark.parametrize("D", [8, 32, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("device, dtype", CUDA_DTYPES)
@pytest.mark.parametrize("order", [0, 1])
def test_causal_kernels(order, device, dtype, D):
    """Every padded head dim; chunks of heads; more blocks of queries than one thread takes."""
    # In float32 the tensor cores' rounding towards zero adds up over thousands of rows.
    longest = 2000 if dtype == torch.float32 else 4500
    for block_size, N in (
        ((32, 32), 333), ((64, 64), 1501), ((128, 16), 509), ((32, 64), 700), ((32, 16), longest)
    ):  # fmt: skip
        options = dict(B=1, H=4, Hk=2, N=N, M=N, D=D, spread=1.0, block_size=block_size)
        options |= dict(masks="both", density=0.1, is_causal=True)
        Case(device, dtype, **options, pool="centred", order=order).check()


@pytest.mark.parametrize("order", [0, 1])
def test_causal_rows_know_no_later_block(order):
    """What changes behind a block of queries changes nothing before it."""
    options = dict(block_size=32, density=0.2, is_causal=True, pool="centred", order=order)
    q, k, v = (torch.randn(1, 2, 200, 16, dtype=torch.float64) for _ in range(3))
    before = mra.mra_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, :, 96:] = torch.randn(1, 2, 104, 16, dtype=torch.float64)
    after = mra.mra_attention(q, k, v, **options)
    assert torch.equal(before[:, :, :96], after[:, :, :96])
    assert not torch.equal(before[:, :, 96:], after[:, :, 96:])


def test_causal_pays():
    """Where queries agree on some keys, under causal as elsewhere."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 32, dtype=torch.float64, generator=g) for _ in range(3))
    q += 2 * torch.randn(1, 4, 1, 32, dtype=torch.float64, generator=g)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = {
        pool: relative_error(mra.mra_attention(q, k, v, is_causal=True, pool=pool), exact)
        for pool in ("even", "centred")
    }
    assert error["centred"] < 0.6 * error["even"], error


def test_causal_calls_of_models_are_exact_and_counted():
    """Where the function refuses; with masks of keys too."""
    config, x = MRAConfig(density=0.3, block_size=16, pool="sampled"), torch.randn(2, 60, 16)
    module = mra.MRAMultiheadAttention(16, 2, batch_first=True, config=config)
    exact = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    exact.load_state_dict(module.state_dict())
    mra.modules.stats(reset=True)
    out, _ = module(x, x, x, is_causal=True, need_weights=False)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(60)
    torch.testing.assert_close(out, exact(x, x, x, attn_mask=mask, need_weights=False)[0])
    module(x, x, x)
    assert mra.modules.stats() == {"exact: pool": 1, "mra": 1}
    q = torch.randn(2, 2, 60, 16)
    mra.sdpa.stats(reset=True)
    out = mra.mra_sdpa(q, q, q, is_causal=True, config=config)
    exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(out, exact) and mra.sdpa.stats() == {"exact: pool": 1}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pool", POOLS)
def test_scores_that_are_distances(pool, seed):
    """-|x - y|^2 as a product: what all queries agree on, |y|^2, tells which blocks are near. A
    plan that leaves it out errs three times as much as with even means."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1024, 2, generator=g, dtype=torch.float64)
    x = x.take_along_dim(mra.order_points(x).unsqueeze(-1), 1)
    square, ones = x.square().sum(-1, keepdim=True), torch.ones(1, 1024, 1, dtype=torch.float64)
    q, k = torch.cat([2 * x, -ones], -1)[None], torch.cat([x, square], -1)[None]
    v = torch.sin(9 * x)[None]
    exact = (200.0 * q @ k.mT).softmax(-1) @ v
    options = dict(scale=200.0, block_size=32, density=1 / 8)
    q, k, v = (torch.nn.functional.pad(t, (0, 8 - t.shape[-1])) for t in (q, k, v))

    def error(pool):
        out = mra.mra_attention(q, k, v, pool=pool, **options)
        return (out[..., :2] - exact).norm().item()

    assert error(pool) < 1.6 * error("even")
