"""Calls that have a block form and run as exact attention all the same, because of the config."""

from .config import CAUSAL_POOL, pool_of
from .crossover import BELOW, below
from .layout import fits

__all__ = ["REASONS", "why_exact"]

LAYOUT, POOL = "layout", "pool"
REASONS = (LAYOUT, POOL, BELOW)  # under which such calls are counted


def why_exact(config, exact_below, query, key, is_causal):
    """One of REASONS, or None for a call that MRA attention serves: query (..., N, D), key
    (..., M, D)."""
    if config.layout is not None and not fits(config.layout, query, key, is_causal):
        return LAYOUT
    if is_causal and pool_of(config) not in CAUSAL_POOL:
        return POOL
    return BELOW if below(exact_below, query, key, config) else None
