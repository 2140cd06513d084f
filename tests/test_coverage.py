"""coverage(): which attention modules of a model arrive at ours, held against what arrives."""

import re

import pytest
import torch
from architectures import CASES, SIZES, bert, cases, spread, text, transformers
from helpers import new_seed

import mra_attention as mra


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(new_seed())


def watched(model, inputs):
    """Names of the modules whose attention arrives at a function registered for the purpose."""
    arrived, names = set(), {module: name for name, module in model.named_modules()}
    sdpa = transformers.AttentionInterface()["sdpa"]

    def attention(module, *args, **kwargs):
        arrived.add(names[module])
        return sdpa(module, *args, **kwargs)

    transformers.AttentionInterface.register("watched", attention)
    transformers.AttentionMaskInterface.register("watched", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("watched")
    with torch.no_grad():
        model(**inputs)
    return arrived


@cases
def test_coverage_is_what_arrives(case):
    build, inputs, _ = CASES[case]
    model, inputs = spread(build()).eval(), inputs()
    covered = mra.transformers.coverage(model)
    assert covered.missed == {}
    assert set(covered.served) == watched(model, inputs)
    assert {item.implementation for item in mra.transformers.coverage(model)} == {"watched"}


OWN = "computes attention itself, without the attention interface"
FUNNEL = dict(d_model=64, n_head=4, d_head=16, d_inner=64, block_sizes=[1, 1], num_decoder_layers=0)


@pytest.mark.parametrize(
    ("name", "options", "missed"),
    [
        ("DebertaV2", {}, "encoder.layer.{}.attention.self"),
        ("Longformer", {"attention_window": 32}, "encoder.layer.{}.attention.self"),
        ("MPNet", {}, "encoder.layer.{}.attention.attn"),
        ("XLNet", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 64}, "layer.{}.rel_attn"),
        # FunnelAttentionStructure beside it only makes positions.
        ("Funnel", FUNNEL, "encoder.blocks.{}.0.attention"),
    ],
)
def test_coverage_of_models_without_the_interface(name, options, missed):
    """Nothing arrives, which coverage said: the model ignores the name, or refuses it."""
    sizes = {"vocab_size": 99} if name in ("XLNet", "Funnel") else SIZES
    model = getattr(transformers, name + "Model")(
        getattr(transformers, name + "Config")(**sizes, **options)
    ).eval()
    covered = mra.transformers.coverage(model)
    assert covered.served == {}
    assert covered.missed == {missed.format(n): OWN for n in range(2)}
    assert "0 of 2 attention modules served" in str(covered) and OWN in str(covered)
    assert watched(model, text(64)) == set()


def test_coverage_names_what_serves_instead():
    """torch's module, calls of scaled_dot_product_attention, and MRA attention itself."""

    class OwnAttention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class SomeAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = OwnAttention()

        def forward(self, x):  # not through ALL_ATTENTION_FUNCTIONS
            return self.inner(x)

    model = torch.nn.ModuleDict(
        {
            "torch": torch.nn.MultiheadAttention(64, 4),
            "own": SomeAttention(),
            "mra": mra.MRAMultiheadAttention(64, 4),
            "bert": bert(),
        }
    )
    covered = mra.transformers.coverage(model)
    assert list(covered.missed) == ["torch", "own.inner"]
    assert "replace_attention" in covered.missed["torch"]
    assert "replace_sdpa" in covered.missed["own.inner"]
    assert covered.served == {
        "mra": "MRAMultiheadAttention",
        "bert.encoder.layer.0.attention.self": "BertSelfAttention",
        "bert.encoder.layer.1.attention.self": "BertSelfAttention",
    }
    lines = str(covered).splitlines()
    assert len(lines) == 1 + 5 + 1 and lines[-1] == "3 of 5 attention modules served"
    assert re.match(r"bert\S+0\S+ +BertSelfAttention +sdpa +yes +attention interface$", lines[-3])


def test_coverage_of_nothing_and_of_a_wrong_argument():
    covered = mra.transformers.coverage(torch.nn.Linear(2, 2))
    assert len(covered) == 0 and str(covered) == "no attention modules"
    with pytest.raises(TypeError, match="model: got dict, expected an nn.Module"):
        mra.transformers.coverage({})
