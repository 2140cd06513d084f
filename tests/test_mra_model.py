"""transformers' own MraModel, as it comes and with patch_mra_model()."""

import subprocess
import sys

import pytest
import torch
from helpers import MODEL_SIZES, ROOT, compare, new_seed

import mra_attention as mra
from mra_attention import MRAConfig
from mra_attention.reference import mra_attention_reference

transformers = pytest.importorskip("transformers")

B, N = 3, 130


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(new_seed())


def batch():
    ids = torch.randint(0, 99, (B, N))
    lengths = torch.tensor([[N], [60], [5]])
    return ids, (torch.arange(N) < lengths).long()


@pytest.fixture
def modeling_mra():
    """The module, unpatched before and after a test."""
    from transformers.models.mra import modeling_mra as module

    attention, encoder = module.MraSelfAttention, module.MraEncoder
    kept = attention.__init__, attention.forward, encoder.forward
    yield module
    attention.__init__, attention.forward, encoder.forward = kept


def mra_model(**options):
    sizes = {**MODEL_SIZES, "max_position_embeddings": 256, "hidden_dropout_prob": 0.0}
    config = transformers.MraConfig(**{**sizes, **options})
    return transformers.MraModel(config)


MODES = [("full", 0, 0), ("sparse", 0, 0), ("full", 1, 3)]


@pytest.mark.parametrize(("mode", "first", "diagonal"), MODES)
@pytest.mark.parametrize("heads", [4, 1, 16])  # head_dim 16, 64 and 4
def test_mra_model_attention_is_the_papers(modeling_mra, mode, first, diagonal, heads):
    """The patched layer against the reference, gradients included."""
    mra.transformers.patch_mra_model()
    config = transformers.MraConfig(
        **{**MODEL_SIZES, "num_attention_heads": heads}, block_per_row=2, approx_mode=mode,
        initial_prior_first_n_blocks=first, initial_prior_diagonal_n_blocks=diagonal,
    )  # fmt: skip
    layer = modeling_mra.MraSelfAttention(config).double()
    torch.nn.init.normal_(layer.query.weight, std=0.5)
    torch.nn.init.normal_(layer.key.weight, std=0.5)
    mask = torch.arange(N) < torch.tensor([[N], [60], [5]])
    bias = torch.zeros(B, 1, 1, N).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    x = torch.randn(B, N, 64, dtype=torch.float64, requires_grad=True)
    (out,) = layer(x, bias)
    q, k, v = (
        p(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for p in (layer.query, layer.key, layer.value)
    )
    expected = mra_attention_reference(
        q, k, v, mask, mask, blocks_per_row=2, block_size=32, order=0, selection="global",
        coarse="block" if mode == "full" else "none", first_blocks=first,
        diagonal_blocks=diagonal,
    )  # fmt: skip
    expected = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(out)
    inputs = (x, *(p for p in layer.parameters()))
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * max(1.0, b.abs().max().item()))


def test_mra_model_gives_zeros_without_the_patch(modeling_mra):
    """Why it exists. Should this fail, transformers has fixed its model."""
    if modeling_mra.mra_cuda_kernel is not None:
        pytest.skip("transformers found its own CUDA kernel")
    x = torch.randn(2, 64, 64)
    layer = modeling_mra.MraSelfAttention(transformers.MraConfig(**MODEL_SIZES))
    assert (layer(x, torch.zeros(2, 1, 1, 64))[0] == 0).all()
    mra.transformers.patch_mra_model()
    layer = modeling_mra.MraSelfAttention(transformers.MraConfig(**MODEL_SIZES))
    assert (layer(x, torch.zeros(2, 1, 1, 64))[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 33, 130])
def test_mra_model_any_dtype_any_length(modeling_mra, dtype, length):
    """Built before the patch; every projection gets a gradient."""
    model = mra_model().to(dtype)
    mra.transformers.patch_mra_model()
    mra.transformers.patch_mra_model()  # changes nothing
    ids, mask = batch()
    out = model(ids[:, :length], attention_mask=mask[:, :length]).last_hidden_state
    assert out.dtype == dtype and out.isfinite().all()
    (out.float() * torch.randn(out.shape)).sum().backward()
    for name, p in model.encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if length > 1 and ".self." in name and not name.endswith("key.bias"):
            assert p.grad.abs().max() > 0, name


def test_mra_model_padding_of_a_batch_stays_apart(modeling_mra):
    """Each sequence alone gives what it gives in the batch."""
    mra.transformers.patch_mra_model()
    model = mra_model(block_per_row=8).double().eval()  # the whole map: no plan to differ
    ids, mask = batch()
    together = model(ids, attention_mask=mask).last_hidden_state
    for b in range(B):
        n = mask[b].sum()
        alone = model(ids[b : b + 1, :n]).last_hidden_state
        torch.testing.assert_close(together[b, :n], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "first", "diagonal"), [*MODES, ("sparse", 1, 1)])
@pytest.mark.parametrize("mask_form", ["(B, N)", "4-D"])
def test_mra_model_in_every_dtype(modeling_mra, dtype, mode, first, diagonal, mask_form):
    """128 tokens where 512 fit, by the rule of tests/helpers.py, with the gradients of q, k and v.

    The budget is that of the 128: 4 * block_per_row of the 16 pairs of blocks."""
    mra.transformers.patch_mra_model()
    config = transformers.MraConfig(
        **MODEL_SIZES, block_per_row=2, approx_mode=mode, initial_prior_first_n_blocks=first,
        initial_prior_diagonal_n_blocks=diagonal,
    )  # fmt: skip
    layer = modeling_mra.MraSelfAttention(config).to(dtype)
    # What the projections give: leaves, the same values in every dtype that compares them.
    qkv = [1.5 * torch.randn(B, 128, 64).to(dtype) for _ in range(3)]
    weights = torch.randn(B, 128, 64)
    keep = torch.arange(128) < torch.tensor([[128], [60], [5]])
    mask = keep.long()
    if mask_form == "4-D":
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(B, 1, 1, 128).masked_fill(~keep[:, None, None], lowest)

    def given(leaves):
        hooks = [
            project.register_forward_hook(lambda *_, leaf=leaf: leaf)
            for project, leaf in zip((layer.query, layer.key, layer.value), leaves, strict=True)
        ]
        (out,) = layer(torch.zeros(B, 128, 64, dtype=dtype), mask)
        for hook in hooks:
            hook.remove()
        return out

    def reference(leaves):
        q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in leaves)
        out = mra_attention_reference(
            q, k, v, keep, keep, blocks_per_row=2, block_size=32, order=0, selection="global",
            coarse="block" if mode == "full" else "none", first_blocks=first,
            diagonal_blocks=diagonal,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    def results(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = attend(leaves)
        grads = torch.autograd.grad(out, leaves, weights.to(out.dtype))
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))

    ours = results(given, dtype)
    assert ours["out"].dtype == dtype and ours["out"].shape == (B, 128, 64)
    compare(ours, results(reference, dtype), results(reference, torch.float64), dtype, "cpu")


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_whole_mra_model_is_that_of_the_reference(modeling_mra, monkeypatch, mode):
    """Embeddings to last state, padded, with the mask as this version of transformers hands it on;
    beside the same model whose layers call the reference."""
    mra.transformers.patch_mra_model()
    model = mra_model(approx_mode=mode, max_position_embeddings=512, block_per_row=1).double()
    for layer in model.encoder.layer:
        for project in (layer.attention.self.query, layer.attention.self.key):
            torch.nn.init.normal_(project.weight, std=0.2)
    ids, mask = batch()
    ids, mask = ids[:, :128], mask[:, :128]
    ours = model(ids, attention_mask=mask).last_hidden_state
    plain = model(ids).last_hidden_state

    def reference(*args, config, scale):
        assert config == getattr(MRAConfig, "mra2" if mode == "full" else "mra2_s")(1)
        options = dict(block_size=32, order=0, selection="global", coarse=config.coarse)
        return mra_attention_reference(*args, blocks_per_row=1, scale=scale, **options)

    monkeypatch.setattr(mra.transformers, "mra_attention", reference)
    live = mask.bool()
    for got, more in ((ours, {"attention_mask": mask}), (plain, {})):
        expected = model(ids, **more).last_hidden_state
        torch.testing.assert_close(got[live], expected[live], rtol=0, atol=1e-12)
    assert (ours - plain)[live].abs().max() > 1e-3  # the mask arrives


def test_mra_model_before_and_after_in_one_process():
    """In a process of its own, since the patch holds for all models there: first zeros from every
    attention and no gradient, then neither, for the model built before as well."""
    code = """
import torch, transformers, mra_attention as mra
from transformers.models.mra import modeling_mra

if modeling_mra.mra_cuda_kernel is not None:
    print("own kernel"), exit()
config = transformers.MraConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                                intermediate_size=64, vocab_size=99, max_position_embeddings=512)
model = transformers.MraModel(config)
ids = torch.randint(0, 99, (2, 128))

def look():
    attention, outs = model.encoder.layer[0].attention.self, []
    hook = attention.register_forward_hook(lambda *a: outs.append(a[-1][0]))
    out = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    hook.remove()
    model.zero_grad()
    (out * torch.randn_like(out)).sum().backward()
    grads = [getattr(attention, n).weight.grad for n in ("query", "key", "value")]
    zero = not outs[0].any()
    served = mra.transformers.coverage(model)
    print(zero, *(g is not None and bool(g.any()) for g in grads), len(served.served))
    print(*served.missed.values(), *(item.why for item in served if item.served))

look()
mra.transformers.patch_mra_model()
look()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    if lines == ["own kernel"]:
        pytest.skip("transformers found its own CUDA kernel")
    assert lines == [
        "True False False False 0",
        "transformers' own MRA; patch_mra_model() serves it",
        "False True True True 1",
        "is MRA attention, with the model's config",
    ]
