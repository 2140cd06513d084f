"""Every CUDA kernel once or more over small shapes, forward and backward, for compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitizer.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitizer.py

racecheck needs a build of its own on Hopper (MRA_RACECHECK=1, docs/kernels.md): `make sanitize`. It
compares nothing (the tests do); it prints how many calls ran. Options named behind it (`levels
pool D=256`) leave only the calls that have one of them, a share (`3/12`: the third of twelve) of
those every twelfth, so that twelve can run side by side. Not collected by pytest.
"""

import itertools
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
sys.path.append(str(HERE.parent))  # behind PYTHONPATH

from helpers import Case  # noqa: E402

import mra_attention as mra  # noqa: E402

FORMS = [("none", 0), ("block", 0), ("block", 1), ("row", 0), ("row", 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def cases():
    """(dtype, options) of every call."""
    modes = itertools.product(DTYPES, FORMS, ["row", "global"], [False, True], ["none", "both"])
    for dtype, (coarse, order), selection, is_causal, masks in modes:
        yield (
            dtype,
            dict(coarse=coarse, order=order, selection=selection, is_causal=is_causal, masks=masks),
        )
    for dtype, D, (coarse, order) in itertools.product(DTYPES, [64, 80, 128, 256], FORMS[1::2]):
        yield dtype, dict(D=D, coarse=coarse, order=order)
    for block in itertools.product([32, 64, 128], [16, 32, 64, 128]):
        yield torch.bfloat16, dict(D=64, N=260, block_size=block)
    for D, block, (coarse, order) in itertools.product([32, 64, 128, 256], [64, (64, 16)], FORMS):
        options = dict(D=D, N=330, M=700, block_size=block, coarse=coarse, order=order)
        yield torch.bfloat16, options | dict(masks="both")
    # short heads: all stages in one launch
    heads = [(32, dict(coarse=c, order=0, selection="global")) for c in ("none", "block")]
    heads += [
        (block, dict(coarse=coarse, order=order))
        for block in (32, 64)
        for coarse, order in (("none", 0), ("block", 0), ("row", 0), ("row", 1))
    ]
    heads += [
        (block, dict(order=1, pool=pool, Hk=4))
        for pool in ("centred", "sampled")
        for block in (32, 64)
    ]
    for N, D, (block, options) in itertools.product([100, 250, 512], [32, 64], heads):
        for dtype, masks in (
            (torch.bfloat16, "both"),
            (torch.bfloat16, "none"),
            (torch.float16, "both"),
        ):
            shape = dict(N=N, M=max(N - 20, N // 32 * 32), D=D, block_size=block, masks=masks)
            yield dtype, shape | options
    # all stages before fine in one launch
    whole = itertools.product(["even", "centred"], [32, 64, 128], [32, 64, (128, 64)])
    for pool, D, block in whole:
        for masks, forced in (("none", {}), ("both", dict(diagonal_blocks=3))):
            options = dict(Hk=4, N=600, M=700, D=D, block_size=block, pool=pool, order=1)
            yield torch.bfloat16, options | dict(masks=masks) | forced
    # order 1 that walks the sequence
    walks = itertools.product(
        DTYPES[:2], [32, 64, 128, 256], [64, (64, 16), (128, 32)], [False, True]
    )
    for dtype, D, block, is_causal in walks:
        options = dict(N=461, M=461, D=D, block_size=block, coarse="row", order=1, masks="both")
        yield dtype, options | dict(is_causal=is_causal)
    # many key blocks: wide score tiles
    yield torch.bfloat16, dict(N=200, M=5000, block_size=(32, 16), density=0.1)
    # maps that a cluster of blocks of threads holds, up to 128 and more key blocks, and larger ones
    large = dict(H=2, block_size=(32, 16), coarse="block", order=0, density=0.1, selection="global")
    for N, M in ((2100, 5000), (4200, 2000), (6000, 9000), (16_000, 17_600)):
        for forced in ({}, dict(first_blocks=2, diagonal_blocks=3)):
            yield torch.bfloat16, large | dict(N=N, M=M) | forced
    # more than a row of scores holds: selection as they come, the block-coarse state by itself
    long = dict(B=1, H=2, N=300, block_size=(32, 16), coarse="block", order=0)
    for D, nk in ((64, 1100), (40, 8300), (128, 1100), (128, 2300)):
        for m, forced in ((16, {}), (100, dict(first_blocks=2, diagonal_blocks=3))):
            yield torch.bfloat16, long | dict(M=16 * nk, D=D, blocks_per_row=m) | forced
    for forced in ({}, dict(first_blocks=2, diagonal_blocks=3)):
        options = dict(N=17_600, M=17_600, block_size=(128, 16), is_causal=True, density=0.01)
        yield torch.float16, long | options | forced
    # and of either side more than the coarse part's backward takes at once
    for D, is_causal in itertools.product([64, 128], [False, True]):
        options = dict(N=2140, M=2140, D=D, block_size=(32, 16), coarse="block", order=0)
        yield torch.bfloat16, options | dict(is_causal=is_causal, masks="both")
    # weighted means, and more than two resolutions
    pools = itertools.product(
        DTYPES, ["centred", "sampled"], [0, 1], [32, 64, 80, 128, 256], ["none", "both"]
    )
    for dtype, pool, order, D, masks in pools:
        block = 64 if D == 128 else 32
        options = dict(N=150, M=330, D=D, order=order, block_size=block, masks=masks)
        yield dtype, options | dict(pool=pool)
    # more pooled keys than go with order 1 of the rows, and several heads a block of threads
    for D in (32, 64):
        options = dict(D=D, order=1, masks="both", pool="centred")
        yield torch.bfloat16, options | dict(N=150, M=2200, block_size=32)
        yield torch.bfloat16, options | dict(B=36, N=150, M=1100, block_size=32)
        yield torch.bfloat16, options | dict(B=36, N=150, M=200, block_size=64)
    causal = itertools.product(DTYPES, [0, 1], [32, 64, 128, 256], [32, (32, 64), 64, (128, 16)])
    for dtype, order, D, block in causal:
        options = dict(N=461, M=461, D=D, block_size=block, masks="both", is_causal=True)
        yield dtype, options | dict(order=order, pool="centred")
    levels = itertools.product(DTYPES, FORMS, [False, True], [64, 128])
    for dtype, (coarse, order), is_causal, D in levels:
        options = dict(N=1100, M=1100, D=D, coarse=coarse, order=order, is_causal=is_causal)
        yield (
            dtype,
            options | dict(block_size=32, masks="both", levels=((512, 2), (128, 4))),
        )


def main():
    if not torch.cuda.is_available():
        sys.exit("sanitizer.py: needs a CUDA device")
    shares = [word for word in sys.argv[1:] if "/" in word]
    turn, of = map(int, shares[0].split("/")) if shares else (1, 1)
    wanted, calls = set(sys.argv[1:]) - set(shares), 0

    def called(case):
        names = set(case[1]) | {f"{name}={value}" for name, value in case[1].items()}
        return not wanted or wanted & names

    for dtype, options in itertools.islice(filter(called, cases()), turn - 1, None, of):
        case = Case("cuda", dtype, **options)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = mra.mra_attention(
            *inputs, case.key_mask, case.query_mask, return_lse=True, **case.options
        )
        torch.autograd.grad((out, lse), inputs, (case.grad_out, case.grad_lse))
        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls, forward and backward")


if __name__ == "__main__":
    main()
