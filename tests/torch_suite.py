"""PyTorch's own tests, run with MRAMultiheadAttention in the place of nn.MultiheadAttention.

    python tests/torch_suite.py PYTORCH/test

PYTORCH is a source tree of PyTorch (tried with v2.6.0); its tests need ``hypothesis`` and
``expecttest``. Every module made by one of these tests selects every block, so that each test asks
what it asked before. NOT_APPLICABLE lists the tests that hold torch's module to something ours does
not promise, with the reason; the run fails when another test fails, and when one of these passes.
"""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

# File: names of the tests that have to do with attention modules.
FILES = {
    "nn/test_multihead_attention.py": "",
    "test_transformers.py": "TestTransformers and not SDPA",
    "test_nn.py": "ransformer or ultihead",
}

FUSED = "asks whether torch's fused layer was called; ours never is"
SCRIPT = "torch.jit.script, which ours doesn't take"
ERRORS = "the same calls are refused, as a ValueError or TypeError that names the argument"
NOT_APPLICABLE = {
    # In both the module lends its parameters to F.multi_head_attention_forward, by way of the
    # private flag that ours clears to keep the fused layer away.
    "test_multihead_attention_average_attn_weights_False": "calls torch's function, not the module",
    "test_multihead_attention_average_attn_weights_True": "calls torch's function, not the module",
    "test_multihead_attn_invalid_shape": ERRORS,
    "test_multihead_attn_fast_path_invalid_shape": ERRORS,
    "test_transformer_args_check": ERRORS,
    "test_multihead_attn_nested_tensor_outside_fast_path": "wants nested input refused",
    "test_TransformerEncoderLayer_empty_cpu": "wants nested input refused by an AssertionError",
    "test_multihead_attn_fast_path_query_and_bias_have_different_dtypes_cpu_float64": (
        "a half bias beside double input: torch's strides happen to take a product that promotes"
    ),
    "test_multihead_self_attn_two_masks_fast_path_mock_cpu": FUSED,
    "test_disable_fastpath_cpu": FUSED,
    "test_mask_check_fastpath_cpu": FUSED,
    "test_transformerencoderlayer_cpu_float32": "wants the fused layer's NaN of no keys",
    "test_transformer_bias_is_none_cpu": "the text of a warning about the fused layer",
    "test_train_with_is_causal_cpu": "wants is_causal refused without a mask; ours needs none",
    "test_script_encoder_subclass_cpu": SCRIPT,
    "test_script_mha_in_proj_weight_none_cpu": SCRIPT,
    "test_transformerencoderlayer_subclass_cpu": SCRIPT,
    "test_transformerencoderlayer_subclass_model_cpu": SCRIPT,
}


def pytest_configure(config):
    """As a plugin of the runs below: ours in torch's place, before a test file is imported."""
    import torch
    from torch.nn.modules import activation, transformer
    from torch.testing._internal import common_cuda, common_mkldnn, common_nn

    from mra_attention import MRAConfig, MRAMultiheadAttention

    class EveryBlock(MRAMultiheadAttention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, config=MRAConfig(density=1.0, block_size=16), **kwargs)

    for module in (activation, transformer, torch.nn, torch.nn.modules):
        module.MultiheadAttention = EveryBlock
    # What the test files of an older torch import from it, and these tests don't need.
    for module, name, value in (
        (common_nn, "new_module_tests", []),
        (common_cuda, "tf32_is_not_fp32", lambda: True),
        (common_mkldnn, "bf32_on_and_off", lambda *a, **k: lambda test: test),
    ):
        if not hasattr(module, name):
            setattr(module, name, value)
    helper = types.ModuleType("test_cpp_extensions_open_device_registration")
    helper.generate_faked_module = helper.remove_build_path = None
    sys.modules.setdefault(helper.__name__, helper)


def main(folder):
    here = Path(__file__).resolve()
    path = os.pathsep.join(
        [str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    results = {}
    for file, names in FILES.items():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", here.stem, "-p", "no:cacheprovider", "-q", "-rA",
             file, "-k", names],
            cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        found = re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\S+)", run.stdout, re.MULTILINE)
        if not found:
            sys.exit(run.stdout + run.stderr)
        results.update((name, result) for result, name in found)
        print(f"{file}: {run.stdout.splitlines()[-1]}")
    failed = {name for name, result in results.items() if result != "PASSED"}
    for name in sorted(failed):
        print(f"  {name}: {NOT_APPLICABLE.get(name, 'NOT EXPECTED')}")
    passed = sorted(NOT_APPLICABLE.keys() - failed)
    for name in passed:
        print(f"  {name}: passed, or was not run: NOT EXPECTED")
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed of {len(results)}")
    return 1 if passed or failed - NOT_APPLICABLE.keys() else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
