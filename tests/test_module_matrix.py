"""MRAMultiheadAttention at density 1 is nn.MultiheadAttention in every combination of options.

Outputs, weights and the gradients of inputs and parameters, on a sample of the combinations that
has any values of any three options together at least once.
"""

import itertools
import random

import pytest
import torch
from helpers import relative_error
from torch import nn

from mra_attention import MRAConfig, MRAMultiheadAttention

E, HEADS, B, N, M, KDIM = 16, 2, 2, 20, 37, 12  # two and three blocks of 16
EXACT = MRAConfig(density=1.0, block_size=16)

OPTIONS = {
    "inputs": ("self", "memory", "three"),  # all one tensor; key is value; none the same
    "projections": ("packed", "separate"),
    "bias": (True, False),
    "layout": ("batch first", "sequence first", "unbatched"),
    "key_padding_mask": (None, "bool", "float"),
    # hinted: the causal mask beside is_causal; alone: ours gets is_causal only, nn needs both.
    "attn_mask": (
        None, "2-D bool", "2-D float", "3-D bool", "3-D float", "hinted bool", "hinted float",
        "hinted 3-D", "alone",
    ),
    "weights": (None, "mean", "heads"),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "dtype": (torch.float32, torch.float64),
}  # fmt: skip


def possible(values):
    """One tensor can't have the widths that separate projections are for."""
    return not {("inputs", "self"), ("projections", "separate")} <= set(values)


def sample(count):
    every = [c for c in itertools.product(*OPTIONS.values()) if possible(zip(OPTIONS, c))]  # noqa: B905
    return random.Random(0).sample(every, count)


CASES = sample(600)


def test_every_three_values_meet():
    named = [set(zip(OPTIONS, case, strict=True)) for case in CASES]
    pairs = [[(name, value) for value in values] for name, values in OPTIONS.items()]
    for three in itertools.combinations(pairs, 3):
        for values in itertools.product(*three):
            assert not possible(values) or any(set(values) <= case for case in named), values


def results(module, inputs, kinds, weights, masks, grads):
    """Output, weights, and with the gradients of those two the ones of inputs and parameters."""
    first = inputs[0].detach().requires_grad_()
    second = first if kinds == "self" else inputs[1].detach().requires_grad_()
    third = second if kinds in ("self", "memory") else inputs[2].detach().requires_grad_()
    out, attention = module(
        first, second, third, need_weights=weights is not None,
        average_attn_weights=weights != "heads", **masks,
    )  # fmt: skip
    outputs = (out,) if weights is None else (out, attention)
    leaves = [*{id(x): x for x in (first, second, third)}.values(), *module.parameters()]
    return out, attention, torch.autograd.grad(outputs, leaves, grads[: len(outputs)])


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize(list(OPTIONS), CASES)
def test_equals_nn(
    inputs, projections, bias, layout, key_padding_mask, attn_mask, weights, add_bias_kv,
    add_zero_attn, dtype,
):  # fmt: skip
    causal = attn_mask is not None and (attn_mask == "alone" or attn_mask.startswith("hinted"))
    m = N if causal or inputs == "self" else M
    kdim, vdim = (KDIM, KDIM if inputs == "memory" else 24) if projections == "separate" else (E, E)
    options = dict(
        bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, kdim=kdim, vdim=vdim,
        batch_first=layout == "batch first", dtype=dtype,
    )  # fmt: skip
    theirs = nn.MultiheadAttention(E, HEADS, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-0.3, 0.3)
    ours = MRAMultiheadAttention(E, HEADS, **options, config=EXACT)
    ours.load_state_dict(theirs.state_dict())

    shapes = [(B, N, E), (B, m, kdim), (B, m, vdim)]
    given = [torch.randn(s, dtype=dtype) for s in shapes]
    batch = B
    if layout == "sequence first":
        given = [x.transpose(0, 1) for x in given]
    elif layout == "unbatched":
        batch, given = 1, [x[1] for x in given]

    grads = [torch.randn_like(given[0]), None]
    if weights is not None:
        heads = (HEADS,) if weights == "heads" else ()
        shape = (B, *heads, N, m + add_bias_kv + add_zero_attn)
        grads[1] = torch.randn(shape[1:] if layout == "unbatched" else shape, dtype=dtype)

    masks = {}
    if key_padding_mask is not None:
        lengths = torch.tensor([[m], [m // 2]])
        mask = torch.arange(m) >= lengths
        mask = mask[1] if layout == "unbatched" else mask
        masks["key_padding_mask"] = as_mask(mask, key_padding_mask, dtype)
    if causal:
        mask = torch.ones(N, N, dtype=torch.bool).triu(1)
        mask = mask.expand(batch * HEADS, N, N) if attn_mask == "hinted 3-D" else mask
        masks["attn_mask"] = as_mask(mask, attn_mask, dtype)
        masks["is_causal"] = True
    elif attn_mask is not None:
        mask = torch.rand((N, m) if attn_mask.startswith("2") else (batch * HEADS, N, m)) < 0.4
        mask[..., 0] = False  # nn gives NaN for a row without a key
        masks["attn_mask"] = as_mask(mask, attn_mask, dtype)
        if attn_mask.endswith("float"):
            masks["attn_mask"] = masks["attn_mask"] + torch.randn(mask.shape, dtype=dtype)

    # A hint must not change a result. nn forgets the mask for it, here where the mask is no longer
    # the causal one: hidden from all queries, the keys that these options add have no effect.
    forgets = causal and weights is None and key_padding_mask is None
    hint = causal and not (forgets and (add_bias_kv or add_zero_attn))
    expected = results(theirs, given, inputs, weights, {**masks, "is_causal": hint}, grads)
    if attn_mask == "alone":
        del masks["attn_mask"]
    got = results(ours, given, inputs, weights, masks, grads)
    assert (got[1] is None) == (expected[1] is None) == (weights is None)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for x, y in zip(flat(got), flat(expected), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert relative_error(x, y) <= tolerance
    exact = add_bias_kv or add_zero_attn or (attn_mask is not None and not causal)
    assert ours.exact_calls == int(exact)


def flat(results):
    out, attention, grads = results
    return [out, *([] if attention is None else [attention]), *grads]


def as_mask(mask, kind, dtype):
    """A mask whose True means: ignore, as a bool one, or where the kind says so as a float one."""
    if not kind.endswith("float"):
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)
