"""Calls that other people's code made: how many MRA attention served, how many exact attention."""

import collections

from ._constant import constant

__all__ = ["count", "stats"]

_counts = collections.defaultdict(collections.Counter)


@constant  # while a program is traced: run once, leave no guard
def count(caller, reason=None):
    """One more call of ``caller``, served by MRA, or by exact attention for a ``reason``."""
    _counts[caller]["mra" if reason is None else f"exact: {reason}"] += 1


def stats(caller, reset=False):
    """The counts of ``caller``: a dict of "mra" and, for exact ones, "exact: <reason>"."""
    counts = dict(_counts[caller])
    if reset:
        _counts[caller].clear()
    return counts
