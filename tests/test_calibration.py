"""calibrate(): errors of each layer and head against exact attention, and what it proposes."""

import copy

import pytest
import torch
from helpers import CUDA, new_seed
from torch import nn
from torch.nn import functional as F

import mra_attention as mra
from mra_attention import MRAConfig, calibrate, mra_attention, replace_attention
from mra_attention.reference import mra_attention_reference

E, HEADS, B, N = 32, 4, 2, 150
CONFIG = MRAConfig(density=0.3, block_size=16)
DENSITIES = (0.1, 0.3, 0.6, 1.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(new_seed())


def encoder(layers=2, config=CONFIG):
    """Exact and MRA with the same parameters, float64, with attention that tells tokens apart."""
    layer = nn.TransformerEncoderLayer(E, HEADS, E, batch_first=True, dropout=0.1)
    exact = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double()
    for p in exact.parameters():
        nn.init.normal_(p, std=0.4)
    ours = copy.deepcopy(exact)
    assert replace_attention(ours, config) == layers
    return exact, ours


def by_hand(q, k, v, density, key_mask=None, **options):
    """Error of each head, by the reference and torch's attention: (H,)."""
    out = mra_attention_reference(q, k, v, key_mask, block_size=16, density=density, **options)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    causal = options.get("is_causal", False)
    G = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    exact = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return ((out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)).mean(0)


def test_each_layer_is_measured_on_what_exact_ones_give():
    exact, ours = encoder()
    x = torch.randn(B, N, E, dtype=torch.float64)
    ignored = torch.arange(N) >= torch.tensor([[N], [100]])
    report = calibrate(ours, dict(src=x, src_key_padding_mask=ignored), 0.2, DENSITIES)
    assert [layer.name for layer in report.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    with torch.no_grad():
        for layer, found in zip(exact.eval().layers, report.layers, strict=True):
            qkv = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
            for density, errors in zip(DENSITIES, found.errors, strict=True):
                torch.testing.assert_close(errors, by_hand(q, k, v, density, ~ignored))
            assert torch.equal(found.as_is, found.errors[1]) and (found.as_is > 1e-4).all()
            assert (found.calls, found.N, found.M, found.block_size) == (1, N, N, (16, 16))
            x = layer(x, src_key_padding_mask=ignored)


def test_the_proposal_is_the_smallest_density_that_meets_the_target():
    _, ours = encoder()
    x = torch.randn(B, N, E, dtype=torch.float64)
    means = torch.stack([x.errors.mean(-1) for x in calibrate(ours, x, 0.5, DENSITIES).layers])
    for target in (1e-6, 0.03, 0.1, 0.2, 0.4, 0.9):
        report = calibrate(ours, (x,), target, reversed(DENSITIES))
        assert report.densities == DENSITIES
        expected = [d for d, e in zip(DENSITIES, means.mean(0), strict=True) if e <= target]
        assert report.density == min(expected)
        for layer, errors in zip(report.layers, means, strict=True):
            assert layer.density == min(
                d for d, e in zip(DENSITIES, errors, strict=True) if e <= target
            )
    assert calibrate(ours, x, 1e-6, (0.1, 0.3)).density == 1.0  # none of them


def test_by_head():
    """What is proposed for each head meets the target, by what was measured, with fewer pairs."""
    _, ours = encoder()
    x = torch.randn(B, N, E, dtype=torch.float64)
    for target in (1e-6, 0.05, 0.2, 0.9):
        report = calibrate(ours, x, target, DENSITIES)
        assert report.head_density <= report.density
        given = [layer.head_density for layer in report.layers]
        assert report.head_density == pytest.approx(sum(map(sum, given)) / (2 * HEADS))
        errors = [
            layer.errors[DENSITIES.index(density), head]
            for layer in report.layers
            for head, density in enumerate(layer.head_density)
        ]
        assert sum(errors) / len(errors) <= target
        assert f"{report.head_density:.3g}" in str(report).splitlines()[-2]
    # 1.0 without having been asked for, and the least where that is enough.
    report = calibrate(ours, x, 1e-6, (0.1, 0.3))
    assert [layer.head_density for layer in report.layers] == [(1.0,) * HEADS] * 2
    report = calibrate(ours, x, 0.99, (0.1, 0.3))
    assert [layer.head_density for layer in report.layers] == [(0.1,) * HEADS] * 2


def test_layers_count_by_their_pairs():
    """Of two layers with the same errors the one with fewer pairs gets more."""
    q = 2 * torch.randn(B, 4, 4 * N, 8, dtype=torch.float64)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.long, self.short = Self(), Self()

        def forward(self, q):
            return self.long(q), self.short(q[:, :, :N])

    class Self(nn.Module):
        def forward(self, q):
            return mra_attention(q, q, q, config=CONFIG)

    report = calibrate(Two(), [q], 0.1, (0.1, 0.5))
    long, short = (layer.head_density for layer in report.layers)
    assert report.head_density == pytest.approx((16 * sum(long) + sum(short)) / (17 * 4))


@pytest.mark.parametrize("options", [dict(selection="global"), dict(levels=((64, 2),))], ids=str)
def test_one_density_where_calls_take_no_more(options):
    _, ours = encoder(config=CONFIG.replace(**options))
    x = torch.randn(B, N, E, dtype=torch.float64)
    report = calibrate(ours, x, 0.2, DENSITIES)
    assert report.head_density is None
    assert all(layer.head_density is None for layer in report.layers)
    assert str(report).splitlines()[1].endswith(" -")
    assert report.apply(ours, CONFIG.replace(**options)) == 2
    assert ours.layers[0].self_attn.config == CONFIG.replace(density=report.density, **options)


def test_apply():
    _, ours = encoder()
    x = torch.randn(B, N, E, dtype=torch.float64)
    report = calibrate(ours, x, 0.1, DENSITIES, ("even", "centred"))
    other = copy.deepcopy(ours)
    assert report.apply(ours, CONFIG) == 2
    for layer, found in zip(ours.layers, report.layers, strict=True):
        expected = CONFIG.replace(density=found.head_density, pool=report.pool)
        assert layer.self_attn.config == expected
    again = calibrate(ours, x, 0.1, DENSITIES)
    assert torch.stack([x.as_is for x in again.layers]).mean() <= 0.1 + 1e-12
    assert report.apply(other, CONFIG, by_head=False) == 2
    expected = CONFIG.replace(density=report.density, pool=report.pool)
    assert other.layers[1].self_attn.config == expected
    with pytest.raises(TypeError, match="config: got dict"):
        report.apply(ours, {})
    with pytest.raises(TypeError, match="model: got int"):
        report.apply(3)
    direct = Direct()
    found = calibrate(direct, list(2 * torch.randn(3, B, 4, N, 8, dtype=torch.float64)))
    with pytest.raises(ValueError, match="model: got a module '' that takes no config"):
        found.apply(direct)


def test_pools():
    """Each density with each of them; the first of those that need the smallest one."""
    _, ours = encoder()
    x = torch.randn(B, N, E, dtype=torch.float64)
    names = ("sampled", "even", "centred")
    alone = {}
    for pool in names:
        _, model = encoder()
        model.load_state_dict(ours.state_dict())
        replaced = [m for m in model.modules() if isinstance(m, mra.MRAMultiheadAttention)]
        for module in replaced:
            module.config = module.config.replace(pool=pool)
        assert len(replaced) == 2
        alone[pool] = calibrate(model, x, 0.2, DENSITIES)
        assert alone[pool].pool is None and alone[pool].others == {}
    for target in (1e-6, 0.05, 0.2, 0.9):
        report = calibrate(ours, x, target, DENSITIES, names)
        reports = {report.pool: report} | report.others
        assert set(reports) == set(names)
        densities = [reports[name].density for name in names]
        assert report.pool == names[densities.index(min(densities))]
        for name in names:
            for layer, expected in zip(reports[name].layers, alone[name].layers, strict=True):
                torch.testing.assert_close(layer.errors, expected.errors)
        assert str(report).splitlines()[-1].startswith(f"by pool: {report.pool!r} ")
    assert not torch.allclose(reports["even"].layers[0].errors, reports["centred"].layers[0].errors)


def test_pools_that_calls_do_not_take():
    """Measured with the calls' own in their place: under causal "sampled", without a coarse part
    all."""
    q, k, v = 2 * torch.randn(3, B, 4, N, 8, dtype=torch.float64)
    names = ("centred", "even", "sampled")

    def errors(model):
        report = calibrate(model, [q, k, v], 0.1, DENSITIES, names)
        reports = {report.pool: report} | report.others
        return [reports[name].layers[0].errors for name in names]

    centred, even, sampled = errors(Direct())
    assert torch.equal(sampled, centred) and not torch.allclose(even, centred)
    centred, even, sampled = errors(Direct(coarse="none"))
    assert torch.equal(sampled, even) and torch.equal(centred, even)


class Direct(nn.Module):
    """Attends by the function, twice, with grouped heads and causally."""

    def __init__(self, **options):
        super().__init__()
        self.config = CONFIG.replace(**options)

    def forward(self, q, k, v):
        first = mra_attention(q, k, v, config=self.config, is_causal=True)
        return mra_attention(first, k, v, config=self.config, is_causal=True, return_lse=True)


def test_calls_of_the_function():
    """Under the name of the model, averaged; the model goes on with exact results."""
    q = 2 * torch.randn(B, 4, N, 8, dtype=torch.float64)
    k, v = torch.randn(2, B, 2, N, 8, dtype=torch.float64)
    (layer,) = calibrate(Direct(), [q, k, v], densities=(0.3, 0.7)).layers
    assert (layer.name, layer.calls, layer.coarse, layer.order) == ("", 2, "row", 1)
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for density, errors in zip((0.3, 0.7), layer.errors, strict=True):
        both = [by_hand(x, k, v, density, is_causal=True) for x in (q, first)]
        torch.testing.assert_close(errors, sum(both) / 2)


def test_weights_and_given_plans_are_measured_too():
    """Modules make a plan of their own where weights are asked for."""
    module = mra.MRAMultiheadAttention(E, HEADS, batch_first=True, config=CONFIG).double()
    x = torch.randn(B, N, E, dtype=torch.float64)
    reports = [
        calibrate(module, dict(query=x, key=x, value=x, need_weights=w), densities=DENSITIES)
        for w in (False, True)
    ]
    for report in reports:
        assert report.layers[0].name == ""
        torch.testing.assert_close(report.layers[0].errors, reports[0].layers[0].errors)
        torch.testing.assert_close(report.layers[0].as_is, reports[0].layers[0].as_is)


def test_nothing_in_the_model_changes():
    _, ours = encoder()
    ours.train()
    ours.layers[1].eval()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in ours.modules()]
    training = [m.training for m in ours.modules()]
    state = {name: x.clone() for name, x in ours.state_dict().items()}
    report = calibrate(ours, torch.randn(B, N, E, dtype=torch.float64))
    assert training == [m.training for m in ours.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in ours.modules()]
    assert all(torch.equal(x, state[name]) for name, x in ours.state_dict().items())
    with pytest.raises(ValueError, match="query"):
        calibrate(ours, torch.randn(B, N, 7, dtype=torch.float64))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in ours.modules()]
    lines = str(report).splitlines()
    assert len(lines) == 1 + 2 + 1 + 1
    assert lines[0].split()[:4] == ["module", "heads", "N", "M"] and "1/16" in lines[0]
    assert lines[1].startswith("layers.0.self_attn  4      150  150  ")


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    from helpers import MODEL_SIZES

    mra.transformers.register("mra", CONFIG)
    model = transformers.BertModel(transformers.BertConfig(**MODEL_SIZES))
    model.set_attn_implementation("mra")
    report = calibrate(model, dict(input_ids=torch.randint(0, 99, (B, N))))
    names = [f"encoder.layer.{n}.attention.self" for n in range(2)]
    assert [layer.name for layer in report.layers] == names
    ids = torch.randint(0, 99, (B, N))
    with torch.no_grad():
        before = model.eval()(ids).last_hidden_state
        assert report.apply(model, CONFIG) == 2
        ours = model(ids).last_hidden_state
        mra.transformers.register("mra", CONFIG.replace(density=1.0))
        assert torch.equal(model(ids).last_hidden_state, ours)  # what a module has comes first
        assert not torch.equal(ours, before)
        for layer, found in zip(model.encoder.layer, report.layers, strict=True):
            assert layer.attention.self.mra_config.density == found.head_density
            del layer.attention.self.mra_config
        exact = model(ids).last_hidden_state
        assert not torch.equal(exact, ours)
    mra.transformers.register("mra", CONFIG)
    model.set_attn_implementation("sdpa")
    report = calibrate(model, dict(input_ids=torch.randint(0, 99, (B, N))))
    assert report.layers == () and report.density is None
    assert str(report) == "no MRA attention ran"


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_devices(device, dtype):
    """Exact attention is computed in float32 whatever the dtype; at density 1 rounding is left."""
    _, ours = encoder(config=CONFIG.replace(block_size=32))
    ours.to(device, dtype)
    report = calibrate(ours, torch.randn(B, N, E, device=device, dtype=dtype), densities=(0.3, 1.0))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for layer in report.layers:
        assert layer.errors[1].max() < rounding
        assert layer.errors[1].mean() < layer.errors[0].mean()


def test_wrong_arguments():
    model = nn.Linear(2, 2)
    for arguments, error, match in (
        (({}, {}), TypeError, "model: got dict"),
        ((model, {}, "0.1"), TypeError, "target_error: got '0.1'"),
        ((model, {}, 0), ValueError, "target_error: got 0"),
        ((model, {}, 1.5), ValueError, "target_error: got 1.5"),
        ((model, {}, 0.1, ()), ValueError, r"densities: got \(\)"),
        ((model, {}, 0.1, (None,)), ValueError, r"densities: got \(None,\)"),
        ((model, {}, 0.1, ((0.1, 0.2),)), TypeError, r"densities: got \(0.1, 0.2\), expected a"),
        ((model, {}, 0.1, (0.0,)), ValueError, "density: got 0.0"),
        ((model, {}, 0.1, (0.5,), ("mean",)), ValueError, "pools: got 'mean'"),
    ):
        with pytest.raises(error, match=match):
            calibrate(*arguments)
