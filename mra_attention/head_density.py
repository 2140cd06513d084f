"""Which density each head gets, from the errors that it has at some."""

__all__ = ["give_out"]


def give_out(errors, sizes, *, costs=None, weights=None, total=None, target=None):
    """For each head which of ``sizes`` it gets: a list of H indices.

    All heads start with the smallest size. Then steps are taken along the lower convex hull of each
    head's errors, those that take most off for their cost first, as long as all of it costs at most
    ``total``, until the error is at most ``target``.

    errors: (len(sizes), H), each column the errors of a head. sizes: ascending.
    costs, weights: of H numbers, what a unit of size of a head costs, 1, and what its error counts,
        1/H. The error is the sum of weight times error, the cost that of cost times size."""
    heads = len(errors[0])
    costs = [1.0] * heads if costs is None else costs
    weights = [1 / heads] * heads if weights is None else weights
    steps = []
    for head in range(heads):
        column = [float(row[head]) for row in errors]
        for at, to in _hull(column, sizes):
            gain, cost = weights[head] * (column[at] - column[to]), sizes[to] - sizes[at]
            cost *= costs[head]
            steps.append((gain / cost, gain, cost, head, at, to))
    chosen = [0] * heads
    spent = sizes[0] * sum(costs)
    error = sum(w * float(e) for w, e in zip(weights, errors[0], strict=True))
    for _, gain, cost, head, at, to in sorted(steps, key=lambda step: -step[0]):
        if target is not None and error <= target:
            break
        if chosen[head] == at and (total is None or spent + cost <= total):
            chosen[head], spent, error = to, spent + cost, error - gain
    return chosen


def _hull(column, sizes):
    """Steps (from, to) down the lower convex hull of a head's errors."""
    at = 0
    while at + 1 < len(sizes):
        slopes = [
            ((column[at] - column[i]) / (sizes[i] - sizes[at]), i)
            for i in range(at + 1, len(sizes))
        ]
        slope, to = max(slopes)
        if slope <= 0:
            return
        yield at, to
        at = to
