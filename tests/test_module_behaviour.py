"""What torch's own tests of nn.MultiheadAttention hold it to, asked of MRAMultiheadAttention.

Against attention written out in loops, and at density 1 unless a test says so. The combinations of
options are in test_module_matrix.py, encoders and copies of whole models in
test_module_encoder.py. torch_suite.py runs torch's own tests themselves, given torch's source. What
torch tests and does not apply here:

- the fused layer of eval mode, which masks and dtypes switch it on and off, its error texts, and
  in_proj weights or biases set to None so that it is left: ours never takes it, by design;
- NaN for a query without any key when weights are asked for: ours gives the bias of out_proj;
- which exception it raises: ours are a ValueError or a TypeError that names the argument;
- an error for is_causal without attn_mask: ours needs no mask to be causal;
- torch.jit.script: the module isn't scriptable (below: a trace is what works);
- static_k, static_v, quantized attention and multi_head_attention_forward as a function: they
  belong to torch's function, not to the module.
"""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import CPU_DTYPES, CUDA_DTYPES, ROOT, limit, relative_error
from test_module import EXACT, HEADS, SPARSE, B, E, M, N, close, padding, pair, tensors
from torch import nn

import mra_attention as mra
from mra_attention import MRAMultiheadAttention

DIM = E // HEADS


def in_loops(module, query, key, value, masked, bias=None):
    """Batch-first attention of one query at a time, from the module's parameters: (B, N, E).

    masked: bool (B, HEADS, N, M), True = ignored; bias: the same shape, added to the scores."""
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = [0, 0, 0] if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.mT + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            at = slice(h * DIM, (h + 1) * DIM)
            for i in range(q.shape[1]):
                rows = (~masked[b, h, i]).nonzero().flatten().tolist()
                weigh = {}
                for j in rows:
                    score = float(q[b, i, at] @ k[b, j, at]) / math.sqrt(DIM)
                    weigh[j] = math.exp(score + (0 if bias is None else float(bias[b, h, i, j])))
                for j, w in weigh.items():
                    out[b, i, at] += w / sum(weigh.values()) * v[b, j, at]
    return out @ module.out_proj.weight.mT + (
        0 if module.out_proj.bias is None else module.out_proj.bias
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attn", [None, "2-D", "3-D", "float"])
@pytest.mark.parametrize("kwargs", [{}, dict(kdim=24, vdim=40), dict(bias=False)])
@torch.no_grad()
def test_attention_in_loops(kwargs, attn, padded):
    _, ours = pair(batch_first=True, **kwargs)
    ours = ours.double()
    dims = kwargs.get("kdim", E), kwargs.get("vdim", E)
    q, k, v = (x[:, :14].double() for x in tensors(True, True, *dims))
    masked, bias = torch.zeros(B, HEADS, 14, 14, dtype=torch.bool), None
    kpm = mask = None
    if padded:
        kpm = padding(14)
        masked |= kpm[:, None, None]
    if attn == "float":
        mask = torch.randn(14, 14, dtype=torch.float64)
        bias = mask.expand_as(masked)
    elif attn is not None:
        mask = torch.rand((14, 14) if attn == "2-D" else (B * HEADS, 14, 14)) < 0.4
        mask[..., 0] = False
        masked |= mask if attn == "2-D" else mask.view(B, HEADS, 14, 14)
    expected = in_loops(ours, q, k, v, masked, bias)
    for need_weights in (False, True):
        close(ours(q, k, v, kpm, need_weights, mask)[0], expected)


def test_a_2d_mask_is_a_3d_one_repeated():
    _, ours = pair(batch_first=True)
    inputs = tensors(True, True)
    mask = torch.rand(N, M) < 0.4
    mask[:, 0] = False
    flat = ours(*inputs, attn_mask=mask)
    for again in (
        ours(*inputs, attn_mask=mask.expand(B * HEADS, N, M)),
        ours(*inputs, attn_mask=torch.zeros(N, M).masked_fill(mask, -torch.inf)),
    ):
        assert torch.equal(flat[0], again[0]) and torch.equal(flat[1], again[1])


def test_batch_first_is_a_transposition():
    _, first = pair(SPARSE, batch_first=True)
    second = MRAMultiheadAttention(E, HEADS, config=SPARSE)
    second.load_state_dict(first.state_dict())
    inputs = tensors(True, True)
    out, weights = first(*inputs, padding(M))
    swapped, same = second(*(x.transpose(0, 1) for x in inputs), padding(M))
    close(swapped.transpose(0, 1), out)
    close(same, weights)


def test_an_unbatched_input_is_a_batch_of_one():
    _, ours = pair(SPARSE, batch_first=True)
    q, k, v = tensors(True, True)
    for average in (False, True):
        out, weights = ours(q[:1], k[:1], v[:1], padding(M)[:1], average_attn_weights=average)
        alone = ours(q[0], k[0], v[0], padding(M)[0], average_attn_weights=average)
        assert torch.equal(alone[0], out[0]) and torch.equal(alone[1], weights[0])
        assert alone[1].shape == ((N, M) if average else (HEADS, N, M))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_query_without_a_key_gives_the_bias(padded, is_float, need_weights):
    """In exact calls too, for values and gradients. The other queries keep theirs."""
    theirs, ours = pair(batch_first=True)
    theirs, ours = theirs.double(), ours.double()
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[3] = True
    if padded:  # what one mask leaves, the other one takes
        mask[3, : N // 2] = False
    kpm = torch.zeros(B, N, dtype=torch.bool)
    kpm[0, : N // 2] = padded
    if is_float:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
    x = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)
    out, weights = ours(x, x, x, kpm, need_weights, mask)
    empty = torch.zeros(B, N, dtype=torch.bool)
    empty[0, 3] = True
    empty[1:, 3] = not padded
    close(out[empty], ours.out_proj.bias.expand_as(out[empty]))
    expected, theirs_weights = theirs(x, x, x, kpm, need_weights, mask)
    close(out[~empty], expected[~empty])
    if need_weights:
        assert (weights[empty] == 0).all()
        close(weights[~empty], theirs_weights[~empty])
    grads = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
    assert all(g.isfinite().all() for g in grads)
    (alone,) = torch.autograd.grad(ours(x, x, x, kpm, need_weights, mask)[0][empty].sum(), x)
    assert (alone == 0).all()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kwargs", [{}, dict(add_zero_attn=True)])
def test_empty_dimensions(kwargs, need_weights):
    theirs, ours = pair(batch_first=True, **kwargs)
    for batch, n, m in ((0, N, M), (0, 0, 0), (B, 0, M), (B, N, 0), (B, 0, 0)):
        q = torch.randn(batch, n, E, requires_grad=True)
        k = torch.randn(batch, m, E, requires_grad=True)
        out, weights = ours(q, k, k, need_weights=need_weights)
        expected, theirs_weights = theirs(q, k, k, need_weights=need_weights)
        close_or_empty(out, expected)
        if need_weights:
            close_or_empty(weights, theirs_weights)
        out.sum().backward()
        assert q.grad.shape == q.shape and (q.grad == 0).all() == (not q.numel() or m == 0)


def close_or_empty(x, y):
    assert x.shape == y.shape and x.dtype == y.dtype
    if x.numel():
        close(x, y)


WRONG = {
    "query of 1 dimension": ("query", ValueError, (E,), (N, E), (N, E), {}),
    "query of 4 dimensions": ("query", ValueError, (1, B, N, E), (B, N, E), (B, N, E), {}),
    "unbatched key": ("key", ValueError, (B, N, E), (N, E), (N, E), {}),
    "unbatched value": ("value", ValueError, (B, N, E), (B, N, E), (N, E), {}),
    "batched key": ("key", ValueError, (N, E), (B, N, E), (B, N, E), {}),
    "features of query": ("query: got 31", ValueError, (B, N, 31), (B, N, E), (B, N, E), {}),
    "features of key": ("key: got 31", ValueError, (B, N, E), (B, N, 31), (B, N, E), {}),
    "features of value": ("value: got 31", ValueError, (B, N, E), (B, N, E), (B, N, 31), {}),
    "batch of key": ("key: got batch size 1", ValueError, (B, N, E), (1, N, E), (1, N, E), {}),
    "batch of value": ("value", ValueError, (B, N, E), (B, N, E), (1, N, E), {}),
    "length of value": ("value", ValueError, (B, N, E), (B, M, E), (B, N, E), {}),
    "padding of an unbatched call": (
        "key_padding_mask", ValueError, (N, E), (N, E), (N, E), dict(key_padding_mask=(B, N))
    ),
    "padding without a batch": (
        "key_padding_mask", ValueError, (B, N, E), (B, N, E), (B, N, E), dict(key_padding_mask=(N,))
    ),
    "padding of the queries": (
        "key_padding_mask", ValueError, (B, N, E), (B, M, E), (B, M, E),
        dict(key_padding_mask=(B, N)),
    ),
    "mask of one dimension": (
        "attn_mask", ValueError, (B, N, E), (B, M, E), (B, M, E), dict(attn_mask=(M,))
    ),
    "mask of the batch, not of heads": (
        "attn_mask", ValueError, (B, N, E), (B, M, E), (B, M, E), dict(attn_mask=(B, N, M))
    ),
    "mask transposed": (
        "attn_mask", ValueError, (B, N, E), (B, M, E), (B, M, E), dict(attn_mask=(M, N))
    ),
    "mask of a batch, unbatched": (
        "attn_mask", ValueError, (N, E), (M, E), (M, E), dict(attn_mask=(B * HEADS, N, M))
    ),
    "causal with more keys": (
        "is_causal", ValueError, (B, N, E), (B, M, E), (B, M, E), dict(is_causal=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("exact_below", [None, 1000])
@pytest.mark.parametrize("masked", [False, True])  # an exact call, where torch would broadcast
@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes_are_refused(what, masked, exact_below):
    name, error, query, key, value, kwargs = WRONG[what]
    ours = MRAMultiheadAttention(E, HEADS, batch_first=True, config=SPARSE, exact_below=exact_below)
    kwargs = {
        k: torch.zeros(v, dtype=torch.bool) if isinstance(v, tuple) else v
        for k, v in kwargs.items()
    }
    if masked and not kwargs:
        kwargs["attn_mask"] = torch.zeros(N, key[-2])
    with pytest.raises(error, match=name):
        ours(torch.randn(query), torch.randn(key), torch.randn(value), **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_padding_mask_that_weighs_keys_is_exact_attention(need_weights):
    """At density 1/4 too, counted, and with the gradient of the mask."""
    theirs, ours = pair(config=SPARSE, batch_first=True)
    x, bias = torch.randn(B, N, E), torch.randn(B, N)
    bias[:, 5] = -torch.inf
    mra.modules.stats(reset=True)
    results = []
    for module in (ours, theirs):
        mask = bias.clone().requires_grad_()
        out, weights = module(x, x, x, key_padding_mask=mask, need_weights=need_weights)
        (grad,) = torch.autograd.grad(out.square().sum(), mask)
        results.append((out, grad, weights if need_weights else out))
    for a, b in zip(*results, strict=True):
        close(a, b)
    assert mra.modules.stats() == {"exact: key_padding_mask": 1} and ours.exact_calls == 1


@pytest.mark.gpu
def test_a_padding_mask_that_weighs_keys_fails_on_a_gpu():
    """In the queue of the device, without a wait; a mask of 0 and -inf passes."""
    code = (
        "import sys, torch, mra_attention as mra\n"
        "module = mra.MRAMultiheadAttention(32, 2, batch_first=True, device='cuda')\n"
        "x, mask = torch.randn(1, 40, 32, device='cuda'), torch.zeros(1, 40, device='cuda')\n"
        "mask[:, 30:] = -torch.inf\n"
        "module(x, x, x, key_padding_mask=mask)\n"
        "torch.cuda.synchronize()\n"
        "print('passed')\n"
        "module(x, x, x, key_padding_mask=mask + 0.5)\n"
        "torch.cuda.synchronize()\n"
        "print('unseen')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert result.stdout.split() == ["passed"] and result.returncode != 0
    assert "assert" in result.stderr


def test_wrong_types_are_refused():
    ours, x = MRAMultiheadAttention(E, HEADS, config=SPARSE), torch.randn(N, E)
    with pytest.raises(TypeError, match="query: got list"):
        ours([x], x, x)
    with pytest.raises(TypeError, match="value: got NoneType"):
        ours(x, x, None)
    for batch in (x, x.unsqueeze(1)):
        with pytest.raises(TypeError, match="key_padding_mask: got list"):
            ours(batch, batch, batch, [False] * N)
        with pytest.raises(TypeError, match="attn_mask: got torch.int64"):
            ours(batch, batch, batch, attn_mask=torch.zeros(N, N).long())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(
    ("kwargs", "causal"), [({}, False), ({}, True), (dict(add_zero_attn=True), False)]
)
def test_nested_is_padded(layout, kwargs, causal):
    """Values and gradients; the result can be added to the query, as a residual is."""
    _, ours = pair(batch_first=True, **kwargs)
    ours = ours.double()
    rows = [torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in (45, 7, 20)]
    x = torch.nested.as_nested_tensor(rows, layout=layout)
    out = x + ours(x, x, x, need_weights=False, is_causal=causal)[0]
    dense = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    kpm = torch.arange(45) >= torch.tensor([[45], [7], [20]])
    expected = dense + ours(dense, dense, dense, kpm, False, is_causal=causal)[0]
    for got, row, n in zip(out.unbind(), expected, (45, 7, 20), strict=True):
        close(got, row[:n])
    if layout == torch.jagged:
        ones = torch.linspace(-1, 1, 72 * E, dtype=torch.float64).view(72, E)
        got = torch.autograd.grad((out.values() * ones).sum(), rows)
        live = torch.cat([row[:n] for row, n in zip(expected, (45, 7, 20), strict=True)])
        for a, b in zip(got, torch.autograd.grad((live * ones).sum(), rows), strict=True):
            close(a, b)


def test_nested_without_a_sequence():
    empty = torch.nested.nested_tensor([])
    with pytest.raises(ValueError, match="a nested tensor without a sequence"):
        MRAMultiheadAttention(E, HEADS, batch_first=True)(empty, empty, empty)


def test_nested_values_belong_to_nested_keys():
    _, ours = pair(batch_first=True)
    q, k, v, w = (
        torch.nested.as_nested_tensor([torch.randn(n, E) for n in lengths], layout=torch.jagged)
        for lengths in ((4, 5), (9, 6), (9, 6), (6, 9))
    )
    assert [x.shape for x in ours(q, k, v)[0].unbind()] == [(4, E), (5, E)]
    with pytest.raises(ValueError, match="value: got lengths .6, 9., expected those of key"):
        ours(q, k, w)
    with pytest.raises(ValueError, match="nested and dense"):
        ours(q, k, torch.randn(2, 9, E))


@pytest.mark.parametrize(("device", "dtype"), [*CPU_DTYPES, ("cpu", torch.float16), *CUDA_DTYPES])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_dtypes(device, dtype, need_weights, exact):
    """The house's rule: at most twice the error of torch's module in the same dtype."""
    theirs, ours = pair(device=device, dtype=dtype, batch_first=True, add_zero_attn=exact)
    x = torch.randn(B, N, E, device=device).to(dtype)
    with torch.no_grad():
        got = ours(x, x, x, need_weights=need_weights)
        same = theirs(x, x, x, need_weights=need_weights)
        best = theirs.double()(*[x.double()] * 3, need_weights=need_weights)
    for a, b, c in zip(got, same, best, strict=True):
        if c is not None:
            assert a.dtype == dtype and a.device == x.device
            assert relative_error(a, c) <= limit(dtype, device, relative_error(b, c))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kwargs", [{}, dict(kdim=24, vdim=40), dict(bias=False)])
def test_copies(kwargs, copied):
    ours = MRAMultiheadAttention(E, HEADS, **kwargs, config=SPARSE, exact_below=7).eval()
    again = copied(ours)
    assert again.config == SPARSE and again.exact_below == 7 and not again.training
    assert not again._qkv_same_embed_dim  # torch's fused layer stays out
    inputs = tensors(False, True, kwargs.get("kdim", E), kwargs.get("vdim", E))
    before = ours(*inputs)[0]
    assert torch.equal(again(*inputs)[0], before)
    with torch.no_grad():
        again.out_proj.weight.zero_()
    assert torch.equal(ours(*inputs)[0], before)  # nothing is shared


def test_frozen_projections_get_no_gradient():
    _, ours = pair(batch_first=True)
    ours.in_proj_weight.requires_grad_(False)
    x = torch.randn(B, N, E)
    ours(x, x, x)[0].sum().backward()
    assert ours.in_proj_weight.grad is None and ours.out_proj.weight.grad.any()


@pytest.mark.filterwarnings("ignore")
def test_traced_but_not_scripted():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MRAMultiheadAttention(E, HEADS, batch_first=True, config=EXACT).eval()

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = Only()
    traced = torch.jit.trace(model, torch.randn(B, N, E))
    x = torch.randn(B, M, E)
    close(traced(x), model(x))
    with pytest.raises(RuntimeError):
        torch.jit.script(model.attention)
