"""Real attention inputs: q, k, v of every layer of MiniLM reading real text, in every mode."""

import functools

import pytest
import torch
from helpers import DEVICE_DTYPES, Case, load_minilm_inputs

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
LAYERS = range(6)
# float64 adds nothing that other tests don't show, and float16 is for CUDA.
DTYPES = [p for p in DEVICE_DTYPES if p != ("cpu", torch.float64)]


@functools.cache
def layers(words):
    """For each layer (q, k, v, mask) of texts of the first ``words`` words of a page of Python's
    manual; float32 on the CPU. Cut at 512 tokens."""
    minilm = load_minilm_inputs()
    from pydoc_data.topics import topics

    page = topics["compound"].split()
    return minilm.minilm_qkv([" ".join(page[:n]) for n in words])


class RealCase(Case):
    """As Case, on the inputs of one layer. Gradients of out and lse are random."""

    def __init__(self, device, dtype, layer, words=(2000,), **options):
        q, _, _, mask = layers(words)[layer]
        B, H, N, D = q.shape
        super().__init__(
            device, dtype, B=B, H=H, Hk=H, N=N, M=N, D=D, **{"density": 1 / 8, **options}
        )
        self.q, self.k, self.v = (t.to(device, dtype) for t in layers(words)[layer][:3])
        if not mask.all():
            self.key_mask = self.query_mask = mask.to(device)


def test_inputs_are_what_they_should_be():
    """Long enough, of different lengths where they should be, and attention that is not flat."""
    q, k, _, mask = layers((2000,))[0]
    assert q.shape == (1, 12, 512, 32) and mask.all()
    logits = q @ k.mT / 32**0.5
    assert logits.softmax(-1).amax(-1).mean() > 4 / 512
    *_, mask = layers((150, 60))[0]
    lengths = mask.sum(-1).tolist()
    assert lengths[0] == mask.shape[1] > lengths[1] > 32


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("coarse, order", FORMS)
@pytest.mark.parametrize("device, dtype", DTYPES)
def test_every_mode(device, dtype, coarse, order, selection, layer):
    RealCase(device, dtype, layer, coarse=coarse, order=order, selection=selection).check()


@pytest.mark.parametrize("layer", [5])
@pytest.mark.parametrize("block_size", [(64, 32), (64, 64)])
@pytest.mark.parametrize("device, dtype", DTYPES)
def test_other_blocks_and_causal(device, dtype, block_size, layer):
    for is_causal in (False, True):
        for coarse in ("block", "row"):
            RealCase(
                device, dtype, layer, coarse=coarse, block_size=block_size, is_causal=is_causal
            ).check()


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("device, dtype", DTYPES)
def test_padded_batch(device, dtype, layer):
    """Two texts of different lengths, as an encoder gets them."""
    for coarse, order in FORMS:
        case = RealCase(device, dtype, layer, (150, 60), coarse=coarse, order=order, density=0.25)
        assert case.key_mask is not None
        case.check()
