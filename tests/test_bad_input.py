"""Wrong calls: each raises TypeError, ValueError or NotImplementedError that names the argument."""

import math

import pytest
import torch
from helpers import CUDA, DEVICES

import mra_attention as mra

B, H, HK, N, M, D = 2, 4, 2, 80, 96, 16


class Inputs:
    """Good inputs of one device; a wrong call changes one thing."""

    def __init__(self, device):
        self.device = device
        self.q = torch.randn(B, H, N, D, device=device)
        self.k = torch.randn(B, HK, M, D, device=device)
        self.v = torch.randn(B, HK, M, D, device=device)
        self.key_mask = torch.ones(B, M, dtype=torch.bool, device=device)
        self.query_mask = torch.ones(B, N, dtype=torch.bool, device=device)

    def plan(self, **options):
        return mra.make_plan(self.q, self.k, **options)

    def call(self, query=None, key=None, value=None, **kwargs):
        given = (
            self.q if query is None else query,
            self.k if key is None else key,
            self.v if value is None else value,
        )
        return mra.mra_attention(*given, **kwargs)

    def square(self, **kwargs):
        """Self-attention of the N = 80 tokens."""
        return mra.mra_attention(self.q, self.q, self.q, **kwargs)

    def squares(self, **options):
        return mra.make_plan(self.q, self.q, **options)


def heads(x, n):
    return x[:, :1].expand(-1, n, -1, -1)


def with_dim(x, d):
    return x.new_zeros(*x.shape[:3], d)


# (what is wrong, the argument that the message names, the exception, the call)
WRONG = [
    # tensors
    ("query list", "query", TypeError, lambda i: i.call(query=[[1.0]])),
    ("key None", "key", TypeError, lambda i: mra.mra_attention(i.q, None, i.v)),
    ("value number", "value", TypeError, lambda i: i.call(value=1.0)),
    ("query int", "query", TypeError, lambda i: i.call(query=i.q.int())),
    ("query complex", "query", TypeError, lambda i: i.call(query=i.q.cfloat())),
    ("key other dtype", "key", TypeError, lambda i: i.call(key=i.k.bfloat16())),
    ("value other dtype", "value", TypeError, lambda i: i.call(value=i.v.half())),
    ("query sparse", "query", TypeError, lambda i: i.call(query=i.q.to_sparse())),
    ("query nested", "query", TypeError,
     lambda i: i.call(query=torch.nested.nested_tensor(list(i.q)))),
    ("query 3-D", "query", ValueError, lambda i: i.call(query=i.q[0])),
    ("key 5-D", "key", ValueError, lambda i: i.call(key=i.k[None])),
    ("value 2-D", "value", ValueError, lambda i: i.call(value=i.v[0, 0])),
    ("D = 12", "query", ValueError,
     lambda i: i.call(*(with_dim(x, 12) for x in (i.q, i.k, i.v)))),
    ("D = 264", "query", ValueError,
     lambda i: i.call(*(with_dim(x, 264) for x in (i.q, i.k, i.v)))),
    ("D = 0", "query", ValueError, lambda i: i.call(*(with_dim(x, 0) for x in (i.q, i.k, i.v)))),
    ("key D", "key", ValueError, lambda i: i.call(key=with_dim(i.k, 24))),
    ("value D", "value", ValueError, lambda i: i.call(value=with_dim(i.v, 24))),
    ("key batch", "key", ValueError, lambda i: i.call(key=i.k[:1])),
    ("value batch", "value", ValueError, lambda i: i.call(value=i.v[:1])),
    ("heads that don't divide", "key", ValueError,
     lambda i: i.call(key=heads(i.k, 3), value=heads(i.v, 3))),
    ("more key heads", "key", ValueError,
     lambda i: i.call(key=heads(i.k, 8), value=heads(i.v, 8))),
    ("no key heads", "key", ValueError, lambda i: i.call(key=i.k[:, :0], value=i.v[:, :0])),
    ("value heads", "value", ValueError, lambda i: i.call(value=i.v[:, :1])),
    ("value length", "value", ValueError, lambda i: i.call(value=i.v[:, :, 1:])),
    ("M = 0", "key", ValueError, lambda i: i.call(key=i.k[:, :, :0], value=i.v[:, :, :0])),
    # masks
    ("key_mask list", "key_mask", TypeError, lambda i: i.call(key_mask=[True] * M)),
    ("key_mask float", "key_mask", TypeError, lambda i: i.call(key_mask=i.key_mask.float())),
    ("key_mask long", "key_mask", TypeError, lambda i: i.call(key_mask=i.key_mask.long())),
    ("key_mask 4-D", "key_mask", ValueError, lambda i: i.call(key_mask=i.key_mask[:, None, None])),
    ("key_mask length", "key_mask", ValueError, lambda i: i.call(key_mask=i.key_mask[:, 1:])),
    ("key_mask batch", "key_mask", ValueError, lambda i: i.call(key_mask=i.key_mask[:1])),
    ("query_mask for key", "key_mask", ValueError, lambda i: i.call(key_mask=i.query_mask)),
    ("query_mask int8", "query_mask", TypeError,
     lambda i: i.call(query_mask=i.query_mask.to(torch.int8))),
    ("query_mask 1-D", "query_mask", ValueError, lambda i: i.call(query_mask=i.query_mask[0])),
    ("query_mask length", "query_mask", ValueError,
     lambda i: i.call(query_mask=i.query_mask[:, :-1])),
    # budget
    ("both budgets", "density", ValueError, lambda i: i.call(density=0.5, blocks_per_row=2)),
    ("density 0", "density", ValueError, lambda i: i.call(density=0.0)),
    ("density 1.5", "density", ValueError, lambda i: i.call(density=1.5)),
    ("density negative", "density", ValueError, lambda i: i.call(density=-0.1)),
    ("density NaN", "density", ValueError, lambda i: i.call(density=math.nan)),
    ("density inf", "density", ValueError, lambda i: i.call(density=math.inf)),
    ("density str", "density", TypeError, lambda i: i.call(density="0.5")),
    ("density bool", "density", TypeError, lambda i: i.call(density=True)),
    ("density tensor", "density", TypeError, lambda i: i.call(density=torch.tensor(0.5))),
    ("blocks_per_row 0", "blocks_per_row", ValueError, lambda i: i.call(blocks_per_row=0)),
    ("blocks_per_row -1", "blocks_per_row", ValueError, lambda i: i.call(blocks_per_row=-1)),
    ("blocks_per_row float", "blocks_per_row", TypeError, lambda i: i.call(blocks_per_row=2.0)),
    ("blocks_per_row bool", "blocks_per_row", TypeError, lambda i: i.call(blocks_per_row=True)),
    # block sizes
    ("block_size 0", "block_size", ValueError, lambda i: i.call(block_size=0)),
    ("block_size 48", "block_size", ValueError, lambda i: i.call(block_size=48)),
    ("block_size 256", "block_size", ValueError, lambda i: i.call(block_size=256)),
    ("block_size pair", "block_size", ValueError, lambda i: i.call(block_size=(64, 8))),
    ("block_size triple", "block_size", ValueError, lambda i: i.call(block_size=(64, 64, 64))),
    ("block_size float", "block_size", TypeError, lambda i: i.call(block_size=64.0)),
    ("block_size None", "block_size", TypeError, lambda i: i.call(block_size=None)),
    ("block_size str", "block_size", TypeError, lambda i: i.call(block_size="64")),
    # the other options
    ("coarse unknown", "coarse", ValueError, lambda i: i.call(coarse="rows")),
    ("coarse None", "coarse", TypeError, lambda i: i.call(coarse=None)),
    ("coarse int", "coarse", TypeError, lambda i: i.call(coarse=1)),
    ("order 2", "order", ValueError, lambda i: i.call(order=2)),
    ("order -1", "order", ValueError, lambda i: i.call(order=-1)),
    ("order float", "order", TypeError, lambda i: i.call(order=1.0)),
    ("order bool", "order", TypeError, lambda i: i.call(order=True)),
    ("selection unknown", "selection", ValueError, lambda i: i.call(selection="column")),
    ("selection bool", "selection", TypeError, lambda i: i.call(selection=False)),
    ("diagonal_blocks -1", "diagonal_blocks", ValueError, lambda i: i.call(diagonal_blocks=-1)),
    ("diagonal_blocks float", "diagonal_blocks", TypeError,
     lambda i: i.call(diagonal_blocks=1.5)),
    ("first_blocks -1", "first_blocks", ValueError, lambda i: i.call(first_blocks=-1)),
    ("first_blocks str", "first_blocks", TypeError, lambda i: i.call(first_blocks="1")),
    ("scale NaN", "scale", ValueError, lambda i: i.call(scale=math.nan)),
    ("scale inf", "scale", ValueError, lambda i: i.call(scale=math.inf)),
    ("scale str", "scale", TypeError, lambda i: i.call(scale="1")),
    ("is_causal int", "is_causal", TypeError, lambda i: i.call(is_causal=1)),
    ("is_causal with N != M", "is_causal", ValueError, lambda i: i.call(is_causal=True)),
    ("return_lse int", "return_lse", TypeError, lambda i: i.call(return_lse=1)),
    ("unknown option", "dropout", TypeError, lambda i: i.call(dropout=0.1)),
    # layout
    ("layout int", "layout", TypeError, lambda i: i.square(layout=80)),
    ("layout floats", "layout", TypeError, lambda i: i.square(layout=(8.0, 10))),
    ("layout bool", "layout", TypeError, lambda i: i.square(layout=(True, 80))),
    ("layout str", "layout", TypeError, lambda i: i.square(layout="8x10")),
    ("layout of one side", "layout", ValueError, lambda i: i.square(layout=(80,))),
    ("layout of four sides", "layout", ValueError, lambda i: i.square(layout=(2, 2, 2, 10))),
    ("layout 0", "layout", ValueError, lambda i: i.square(layout=(0, 80))),
    ("layout too large", "layout", ValueError, lambda i: i.square(layout=(9, 9))),
    ("layout with N != M", "layout", ValueError, lambda i: i.call(layout=(8, 10))),
    ("layout and causal", "layout", ValueError,
     lambda i: i.square(layout=(8, 10), is_causal=True)),
    ("layout and config", "layout", ValueError,
     lambda i: i.square(layout=(8, 10), config=mra.MRAConfig())),
    ("layout and query 3-D", "query", ValueError,
     lambda i: mra.mra_attention(i.q[0], i.q, i.q, layout=(8, 10))),
    ("layout and value length", "value", ValueError,
     lambda i: mra.mra_attention(i.q, i.q, i.q[:, :, 1:], layout=(8, 10))),
    ("layout and no heads", "query", ValueError,
     lambda i: mra.mra_attention(i.q[:, :0], i.q, i.q, layout=(8, 10))),
    ("layout and key_mask", "key_mask", ValueError,
     lambda i: i.square(layout=(8, 10), key_mask=i.query_mask[:, 1:])),
    ("layout and float query_mask", "query_mask", TypeError,
     lambda i: i.square(layout=(8, 10), query_mask=i.query_mask.float())),
    ("plan without the layout", "layout", ValueError,
     lambda i: i.square(plan=i.squares(), layout=(8, 10))),
    ("plan of a layout", "layout", ValueError,
     lambda i: i.square(plan=i.squares(layout=(8, 10)), layout=None)),
    ("plan of another layout", "layout", ValueError,
     lambda i: i.square(plan=i.squares(layout=(8, 10)), layout=(10, 8))),
    ("plan of a config's layout", "layout", ValueError,
     lambda i: i.square(plan=i.squares(layout=(8, 10)), config=mra.MRAConfig())),
    # config
    ("config dict", "config", TypeError, lambda i: i.call(config={"density": 0.5})),
    ("config and option", "density", ValueError,
     lambda i: i.call(config=mra.MRAConfig(), density=0.5)),
    ("config and a default", "block_size", ValueError,
     lambda i: i.call(config=mra.MRAConfig(block_size=32), block_size=64)),
    ("config both budgets", "blocks_per_row", ValueError,
     lambda i: mra.MRAConfig(density=0.5, blocks_per_row=1)),
    # plan
    ("plan mask", "plan", TypeError, lambda i: i.call(plan=i.plan().to_dense())),
    ("plan and budget", "plan", ValueError, lambda i: i.call(plan=i.plan(), density=0.5)),
    ("plan and selection", "plan", ValueError, lambda i: i.call(plan=i.plan(), selection="row")),
    ("plan and forced", "plan", ValueError, lambda i: i.call(plan=i.plan(), first_blocks=0)),
    ("plan of other keys", "plan", ValueError,
     lambda i: i.call(key=i.k[:, :, 1:], value=i.v[:, :, 1:], plan=i.plan())),
    ("plan of other queries", "plan", ValueError, lambda i: i.call(i.q[:, :, 1:], plan=i.plan())),
    ("plan of other heads", "plan", ValueError, lambda i: i.call(i.q[:, :2], plan=i.plan())),
    ("plan of other batch", "plan", ValueError,
     lambda i: i.call(i.q[:1], i.k[:1], i.v[:1], plan=i.plan())),
    ("plan of other blocks", "plan", ValueError, lambda i: i.call(plan=i.plan(), block_size=32)),
    ("plan of other config", "plan", ValueError,
     lambda i: i.call(plan=i.plan(), config=mra.MRAConfig(block_size=(64, 32)))),
    ("plan causal", "is_causal", ValueError,
     lambda i: i.call(key=i.k[:, :, :N], value=i.v[:, :, :N],
                      plan=mra.make_plan(i.q, i.k[:, :, :N], is_causal=True))),
    ("plan not causal", "is_causal", ValueError,
     lambda i: i.call(key=i.k[:, :, :N], value=i.v[:, :, :N], is_causal=True,
                      plan=mra.make_plan(i.q, i.k[:, :, :N]))),
    # make_plan
    ("make_plan query", "query", TypeError, lambda i: mra.make_plan("q", i.k)),
    ("make_plan heads", "key", ValueError, lambda i: mra.make_plan(i.q, heads(i.k, 3))),
    ("make_plan density", "density", ValueError, lambda i: i.plan(density=2)),
    ("make_plan coarse", "coarse", ValueError, lambda i: i.plan(coarse="no")),
    ("make_plan key_mask", "key_mask", ValueError, lambda i: i.plan(key_mask=i.key_mask[0])),
    ("make_plan layout", "layout", ValueError, lambda i: i.squares(layout=(9, 9))),
    ("make_plan layout causal", "layout", ValueError,
     lambda i: i.squares(layout=(8, 10), is_causal=True)),
    ("make_plan causal", "is_causal", ValueError, lambda i: i.plan(is_causal=True)),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "error", "call"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_call_names_its_argument(device, name, error, call):
    inputs = Inputs(device)
    with pytest.raises(error) as caught:
        call(inputs)
    assert type(caught.value) is error
    assert name in str(caught.value)


def test_good_call_passes():
    """What the table varies is right to begin with."""
    i = Inputs("cpu")
    out = i.call(key_mask=i.key_mask, query_mask=i.query_mask)
    assert out.shape == i.q.shape
    plan = i.squares(layout=(8, 10))
    assert i.square(plan=plan, layout=[8, 10], query_mask=i.query_mask).shape == i.q.shape


@pytest.mark.parametrize("device", [CUDA])
def test_what_cuda_has_no_kernel_for(device):
    i = Inputs(device)
    with pytest.raises(NotImplementedError, match="float64"):
        i.call(i.q.double(), i.k.double(), i.v.double())
    with pytest.raises(NotImplementedError, match="block_q"):
        i.call(block_size=(16, 64))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["key", "value", "key_mask", "query_mask", "plan"])
def test_two_devices(device, name):
    here, there = Inputs(device), Inputs("cpu")
    attribute = {"key": "k", "value": "v"}.get(name, name)
    other = there.plan() if name == "plan" else getattr(there, attribute)
    with pytest.raises(ValueError, match=name):
        here.call(**{name: other})


def test_two_devices_meta():
    """The check of devices, where no GPU is."""
    i = Inputs("cpu")
    for name, tensor in (("key", i.k), ("value", i.v), ("key_mask", i.key_mask)):
        with pytest.raises(ValueError, match=name):
            i.call(**{name: tensor.to("meta")})
    with pytest.raises(ValueError, match="plan"):
        i.call(plan=i.plan().to("meta"))
