"""Multi-resolution attention (MRA) for PyTorch: exact where it matters, pooled everywhere else."""

# _load registers the operators; flops, sharding and transforms what torch asks about them.
# transformers imports Hugging Face's package only when it is used.
from . import _load, crossover, flops, sdpa, sharding, transformers  # noqa: F401
from .calibration import calibrate
from .config import MRAConfig
from .functional import make_plan, mra_attention
from .info import info
from .modules import MRAMultiheadAttention
from .plan import Plan
from .points import order_points
from .replace import replace_attention
from .sdpa import mra_sdpa, replace_sdpa

__all__ = [
    "MRAConfig",
    "MRAMultiheadAttention",
    "Plan",
    "calibrate",
    "info",
    "make_plan",
    "mra_attention",
    "mra_sdpa",
    "order_points",
    "replace_attention",
    "replace_sdpa",
]
