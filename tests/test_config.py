"""MRAConfig: its values, presets, and that it stands for the options everywhere."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch

import mra_attention as mra
from mra_attention import MRAConfig, functional

OPTIONS = [field.name for field in dataclasses.fields(MRAConfig)]


def test_defaults_are_those_of_the_functions():
    for function in (mra.mra_attention, mra.make_plan):
        parameters = inspect.signature(function).parameters
        for field in dataclasses.fields(MRAConfig):
            # Left-out options print as the value they stand for.
            assert repr(parameters[field.name].default) == repr(field.default), field.name


@pytest.mark.parametrize("preset", ["mra2", "mra2_s"])
def test_presets_are_the_papers(preset):
    config = getattr(MRAConfig, preset)(blocks_per_row=8)
    assert config == MRAConfig(
        blocks_per_row=8,
        block_size=32,
        coarse="block" if preset == "mra2" else "none",
        order=0,
        selection="global",
    )
    make = getattr(MRAConfig, preset)
    assert make().blocks_per_row == 4
    forced = make(2, diagonal_blocks=3, first_blocks=1)
    assert (forced.blocks_per_row, forced.diagonal_blocks, forced.first_blocks) == (2, 3, 1)
    assert make(density=0.25).blocks_per_row is None and make(density=0.25).density == 0.25
    assert make(block_size=64).block_size == 64


def test_frozen_hashable_copyable():
    config = MRAConfig(density=0.25, block_size=[64, 32], layout=[14, 14])
    assert config.block_size == (64, 32) and config.layout == (14, 14)
    assert type(MRAConfig(layout=torch.empty(3, 4, 5).shape).layout) is tuple
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.density = 0.5
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert len({config, MRAConfig(density=0.25, block_size=(64, 32), layout=(14, 14))}) == 1


def test_replace():
    config = MRAConfig(density=0.25, coarse="block")
    assert config.replace(order=0) == MRAConfig(density=0.25, coarse="block", order=0)
    assert config.replace(blocks_per_row=3) == MRAConfig(blocks_per_row=3, coarse="block")
    assert config.replace(blocks_per_row=3).replace(density=0.5).blocks_per_row is None
    with pytest.raises(ValueError, match="order"):
        config.replace(order=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(density=0.5, block_size=(32, 16), coarse="none"),
        dict(blocks_per_row=2, block_size=16, coarse="block", order=0, selection="global"),
        dict(density=0.3, block_size=16, diagonal_blocks=3, first_blocks=1),
        dict(density=0.3, block_size=16, layout=(9, 14)),
    ],
)
def test_config_is_the_options(options):
    q, k, v = (torch.randn(1, 2, 130, 8, dtype=torch.float64) for _ in range(3))
    config = MRAConfig(**options)
    out = mra.mra_attention(q, k, v, config=config)
    assert torch.equal(out, mra.mra_attention(q, k, v, **options))
    plan = mra.make_plan(q, k, config=config)
    assert torch.equal(plan.to_dense(), mra.make_plan(q, k, **options).to_dense())
    assert torch.equal(out, mra.mra_attention(q, k, v, config=config, plan=plan))


def test_no_budget_is_density_one_eighth():
    q, k, v = (torch.randn(1, 2, 320, 8) for _ in range(3))
    out = mra.mra_attention(q, k, v, block_size=16)
    assert torch.equal(out, mra.mra_attention(q, k, v, block_size=16, density=0.125))
    assert mra.make_plan(q, k, block_size=16).density() == 3 / 20  # ceil(20 / 8) = 3 of 20 blocks


@pytest.mark.parametrize(
    "good, bad",
    [
        ({"order": 1}, {"order": True}),
        ({"order": 1}, {"order": 1.0}),
        ({"block_size": 32}, {"block_size": 32.0}),
        ({"block_size": (32, 32)}, {"block_size": (32.0, 32)}),
        ({"density": 1}, {"density": True}),
        ({"blocks_per_row": 2}, {"blocks_per_row": 2.0}),
        ({"levels": ((128, 2),)}, {"levels": ((128.0, 2),)}),
    ],
)
def test_a_call_that_went_well_lets_nothing_through(good, bad):
    """Options equal to those of an earlier call, but of another type."""
    x = torch.randn(1, 1, 256, 8)
    for _ in range(2):
        mra.mra_attention(x, x, x, **good)
    with pytest.raises(TypeError, match=next(iter(bad))):
        mra.mra_attention(x, x, x, **bad)


def test_options_of_calls_are_kept_within_bounds():
    x = torch.randn(1, 1, 16, 8)
    for i in range(1, 600):
        mra.mra_attention(x, x, x, density=i / 600)
    assert len(functional._configs) <= 256


def test_info_reports_and_prints():
    report = mra.info()
    assert report["torch"] == torch.__version__
    assert {kernel["stage"] for kernel in report["kernels"]} == {"pool", "plan", "coarse", "fine"}
    assert report["problem"] is None or isinstance(report["problem"], str)
    assert all(name in str(report) for name in report)


@pytest.mark.parametrize(
    ("arch", "capability", "serves"),
    [
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
    ],
)
def test_info_knows_which_architecture_serves(arch, capability, serves):
    from mra_attention.info import _serves

    assert _serves(arch, capability) is serves


def test_config_names_the_bad_option():
    good = dict.fromkeys(OPTIONS)
    assert set(good) == {
        "density", "blocks_per_row", "block_size", "coarse", "order", "selection",
        "diagonal_blocks", "first_blocks", "layout", "levels", "pool",
    }  # fmt: skip
    for name in OPTIONS:
        with pytest.raises((TypeError, ValueError), match=name):
            MRAConfig(**{name: -7})
        with pytest.raises(TypeError, match=name):
            MRAConfig(**{name: object()})
