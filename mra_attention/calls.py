"""Calls that other people's code made: how many MRA attention served, how many exact attention,
and what it is told once."""

import collections
import warnings

from ._constant import constant

__all__ = ["count", "stats", "warn_once"]

_counts = collections.defaultdict(collections.Counter)
_warned = set()


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


@constant  # as above; not functools.cache, which tracing looks through
def warn_once(text):
    """Warns with ``text`` the first time in this process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)
