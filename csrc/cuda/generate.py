"""Writes sm80/instances/ and sm90/instances/: one file for each kernel, dtype and padded head_dim.

Run after a change: python csrc/cuda/generate.py
"""

from pathlib import Path

TYPES = {"f32": "float", "f16": "__half", "bf16": "__nv_bfloat16"}
SM80 = {
    "forward": "forward",
    "backward_rows": "backward_rows",
    "backward_columns": "backward_columns",
    "backward_pooled": "backward_columns",
    "cells_forward": "cells_forward",
    "cells_rows": "cells_rows",
    "cells_candidates": "cells_candidates",
    "cells_columns": "cells_columns",
}
SM90 = {
    "forward": "forward",
    "backward_rows": "backward_rows",
    "backward_columns": "backward_columns",
    "backward_pooled": "backward_pooled",
    "forward_short": "forward_short",
    "backward_rows_short": "backward_rows_short",
    "backward_columns_short": "backward_columns_short",
}
# Beyond 128 columns, to 256.
SM90_WIDE = {
    "forward": "forward",
    "backward_rows_wide": "backward_rows_wide",
    "backward_columns_wide": "backward_columns_wide",
    "backward_pooled": "backward_pooled",
}
# Of order 1: head_dim is their one argument.
SM90_ORDER1 = {
    "moments": "Moments",
    "order1_delta": "Order1Delta",
    "order1_rows": "Order1Rows",
    "order1_keys": "Order1Keys",
    "order1_walk_rows": "WalkRows",
    "order1_walk_keys": "WalkKeys",
}
# Of the coarse part, likewise.
SM90_COARSE = {
    "coarse_forward": "CoarseForwardParams",
    "coarse_backward": "CoarseBackwardParams",
}
# Of order 1, up to 64 columns.
SM90_ORDER1_64 = {
    "backward_columns_order1": "ColumnsOrder1",
    "backward_pooled_order1": "PooledOrder1",
}
# Of which the dtype is the one argument.
SM90_TYPES = {"order1_walk_wide": "WalkWide"}
# Short heads: the dtypes of each form.
SM90_HEAD = {
    "state": ("f16", "bf16"),
    "row": ("f16", "bf16"),
    "order1": ("f16", "bf16"),
    "centred": ("bf16", "f16"),
    "sampled": ("bf16", "f16"),
}


def instance(namespace, header, name, arguments, params):
    return f"""// Made by csrc/cuda/generate.py.
#include "../{header}.cuh"

namespace {namespace} {{
template cudaError_t launch_{name}<{arguments}>(const {params}&, const Device&, cudaStream_t);
}}  // namespace {namespace}
"""


def params_of(kernel):
    """The struct that an attention kernel takes."""
    if kernel.startswith("cells"):
        return "CellsForward" if kernel == "cells_forward" else "CellsBackward"
    return "ForwardParams" if kernel.startswith("forward") else "BackwardParams"


def write(folder, files):
    folder = Path(__file__).parent / folder / "instances"
    folder.mkdir(exist_ok=True)
    (folder / ".clang-format").write_text("# Made by csrc/cuda/generate.py.\nDisableFormat: true\n")
    for old in folder.glob("*.cu"):
        if old.stem not in files:
            old.unlink()
    for name, text in files.items():
        file = folder / f"{name}.cu"
        if not file.exists() or file.read_text() != text:  # else it would be compiled again
            file.write_text(text)


def attention(namespace, kernels, types, dims):
    """The files of kernels over dtypes and head dims."""
    return {
        f"{kernel}_{short}_{dim}": instance(
            namespace,
            header,
            kernel,
            f"{TYPES[short]}, {dim}",
            params_of(kernel),
        )
        for kernel, header in kernels.items()
        for short in types
        for dim in dims
    }


write("sm80", attention("mra::cuda", SM80, ("f32", "f16", "bf16"), (32, 64, 128, 256)))
write(
    "sm90",
    attention("mra::cuda::sm90", SM90, ("f16", "bf16"), (64, 128))
    | attention("mra::cuda::sm90", SM90_WIDE, ("f16", "bf16"), (192, 256))
    | {
        f"{kernel}_{dim}": instance("mra::cuda::sm90", kernel, kernel, str(dim), params)
        for kernel, params in (SM90_ORDER1 | SM90_COARSE).items()
        for dim in (64, 128)
    }
    | {
        f"{kernel}_64": instance("mra::cuda::sm90", kernel, kernel, "64", params)
        for kernel, params in SM90_ORDER1_64.items()
    }
    | {
        f"{kernel}_{short}": instance("mra::cuda::sm90", kernel, kernel, TYPES[short], params)
        for kernel, params in SM90_TYPES.items()
        for short in ("f16", "bf16")
    }
    | {
        f"forward_head_{form}_{short}_{dim}": instance(
            "mra::cuda::sm90",
            "forward_head",
            "forward_head",
            f"{TYPES[short]}, {dim}, HeadForm::{form}",
            "HeadParams",
        )
        for form, types in SM90_HEAD.items()
        for short in types
        for dim in (32, 64)
    },
)
