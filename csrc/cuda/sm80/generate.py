"""Writes instances/: one file for each kernel, dtype, padded head_dim. Run after a change."""

from pathlib import Path

KERNELS = {
    "forward": "forward",
    "backward_rows": "backward_rows",
    "backward_columns": "backward_columns",
    "backward_pooled": "backward_columns",
}
TYPES = {"f32": "float", "f16": "__half", "bf16": "__nv_bfloat16"}
PARAMS = {"forward": "ForwardParams"}
HEAD_DIMS = (32, 64, 128, 256)

folder = Path(__file__).parent / "instances"
folder.mkdir(exist_ok=True)
for old in folder.glob("*.cu"):
    old.unlink()
for kernel, header in KERNELS.items():
    params = PARAMS.get(kernel, "BackwardParams")
    for name, ctype in TYPES.items():
        for dim in HEAD_DIMS:
            (folder / f"{kernel}_{name}_{dim}.cu").write_text(f"""// Made by sm80/generate.py.
#include "../{header}.cuh"

namespace mra::cuda {{
template cudaError_t launch_{kernel}<{ctype}, {dim}>(const {params}&, const Device&,
                                                     cudaStream_t);
}}  // namespace mra::cuda
""")
