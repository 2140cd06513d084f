"""Which density each head gets, from the errors that it has at some."""

import math

__all__ = ["give_out"]


def give_out(errors, sizes, *, costs=None, weights=None, total=None, target=None):
    """For each head which of ``sizes`` it gets: a list of H indices.

    All heads start with the smallest size. Then the step of a head that takes most off the error
    for its cost, over as many sizes as that is best at, is taken again and again: of those that
    leave the cost at most ``total``, until the error is at most ``target``.

    errors: (len(sizes), H), each column the errors of a head. sizes: ascending.
    costs, weights: of H numbers, what a unit of size of a head costs, 1, and what its error counts,
        1/H. The error is the sum of weight times error, the cost that of cost times size."""
    heads = range(len(errors[0]))
    costs = [1.0] * len(heads) if costs is None else costs
    weights = [1 / len(heads)] * len(heads) if weights is None else weights
    chosen = [0] * len(heads)
    left = math.inf if total is None else total - sizes[0] * sum(costs)

    def best_step(head):
        """(gain for its cost, index) of the head's best step; the gain is 0 without any."""
        at, found = chosen[head], (0.0, 0)
        for to in range(at + 1, len(sizes)):
            cost = costs[head] * (sizes[to] - sizes[at])
            if cost <= left:
                found = max(
                    found, (weights[head] * (errors[at][head] - errors[to][head]) / cost, to)
                )
        return found

    def error():
        return sum(weights[head] * errors[chosen[head]][head] for head in heads)

    while target is None or error() > target:
        head = max(heads, key=lambda head: best_step(head)[0])
        gain, to = best_step(head)
        if gain <= 0:
            break
        left -= costs[head] * (sizes[to] - sizes[chosen[head]])
        chosen[head] = to
    return chosen
