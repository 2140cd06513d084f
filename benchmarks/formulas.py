"""Operations and bytes that a case needs: counted from the mathematics, not from an implementation.

A multiplication and the addition of its result are two operations. ``P`` is the number of exact
(query, key) pairs of a head, ``Q`` that of its unselected (query, key block) pairs and ``R``
that of its unselected (query block, key block) pairs. Per query head, or key head where marked k:

    stage     forward                                backward
    pool      D N, 2 D M k                           2 D M k
    plan      2 D (existing pairs of blocks)         nothing: the selection is a constant
    fine      4 D P                                  10 D P
    coarse    row: 4 D Q; block: 2 D R (its scores   row: 10 D Q; block: 10 D R + 2 D N
              are the plan's)
    order 1   4 D² M k (C, Sigma) + 4 D² N (q C,     8 D² N (dq, dC, dSigma) + 6 D² M k
              q Sigma q)

Exact attention is 4 D N M forward and 10 D N M backward (half of it when causal), so that five
products of the backward include the scores made again. Other work done twice counts once.

Bytes are the fewest that must move: every input read once and every output written once.
``forward``: q, k, v, out, lse. ``backward``: forward, then q, k, v, out, grad_out, lse, dq, dk, dv.
"""

import dataclasses

# Measured on the device: matrix products in bf16 (operations/s) and a copy (bytes/s).
CEILINGS = {"NVIDIA H200": (805e12, 4.27e12)}


@dataclasses.dataclass(frozen=True)
class Work:
    flops: int
    bytes: int

    def floor_ms(self, device_name):
        """The time that no version goes much below on a device with known ceilings, or None."""
        if device_name not in CEILINGS:
            return None
        rate, bandwidth = CEILINGS[device_name]
        return 1e3 * max(self.flops / rate, self.bytes / bandwidth)


def exact_work(case, which, keys=None):
    """Work of exact attention on ``keys`` (all when None) keys for each query."""
    keys = case.M if keys is None else keys
    pairs = case.B * case.H * case.N * keys
    if case.is_causal:
        pairs //= 2
    return Work((4 if which == "forward" else 14) * case.D * pairs, _bytes(case, which, keys))


def sparse_work(case, which):
    """Work of attention to the exact pairs alone, the list given for free."""
    pairs = case.B * case.H * exact_pairs(case)
    return Work((4 if which == "forward" else 14) * case.D * pairs, _bytes(case, which, case.M))


def mra_work(case, form, which):
    """Work of MRA attention end to end: pooling, selection and coarse part included."""
    stages = mra_stages(case, form, "forward")
    if which == "backward":
        back = mra_stages(case, form, "backward")
        stages = {name: stages[name] + back[name] for name in stages}
    return Work(sum(stages.values()), _bytes(case, which, case.M))


def mra_stages(case, form, which):
    """Operations by stage, of ``which`` alone: "backward" here is without the forward."""
    heads, key_heads = case.B * case.H, case.B * case.Hk
    N, M, D = case.N, case.M, case.D
    pairs = exact_pairs(case)
    rows = case.budgets()
    row_coarse = sum(queries * (seen - taken) for queries, taken, seen in rows)
    block_coarse = sum(seen - taken for _, taken, seen in rows)
    forward = which == "forward"
    stages = {"pool": key_heads * 2 * D * M + (heads * D * N if forward else 0)}
    stages["plan"] = heads * 2 * D * sum(seen for _, _, seen in rows) if forward else 0
    if form.coarse == "row":
        coarse = (4 if forward else 10) * D * row_coarse
    elif form.coarse == "block":
        coarse = 2 * D * block_coarse if forward else 10 * D * block_coarse + 2 * D * N
    else:
        coarse = 0
    stages["coarse"] = heads * coarse
    stages["fine"] = heads * (4 if forward else 10) * D * pairs
    stages["order1"] = 0
    if form.order == 1 and form.coarse != "none":
        per_query, per_key = (4, 4) if forward else (8, 6)
        stages["order1"] = D * D * (heads * per_query * N + key_heads * per_key * M)
    return stages


def exact_pairs(case):
    """(query, key) pairs of one head inside selected pairs of blocks; a pair of blocks that the
    diagonal crosses counts whole."""
    bk = case.block_size[1]
    return sum(queries * min(taken * bk, case.M) for queries, taken, _ in case.budgets())


def equal_keys(case):
    """Keys for each query that make dense attention as many pairs as the plan: "equal pairs"."""
    return max(1, round(exact_pairs(case) / case.N))


def _bytes(case, which, keys):
    size = 4 if case.dtype == "fp32" else 2
    query = case.B * case.H * case.N * case.D * size
    key = case.B * case.Hk * keys * case.D * size
    lse = 4 * case.B * case.H * case.N
    forward = 2 * query + 2 * key + lse
    if which == "forward":
        return forward
    return forward + 4 * query + 4 * key + lse


def output_bytes(case, which, keys=None):
    """Bytes of what a call returns: out, and with the backward dq, dk, dv."""
    size = 4 if case.dtype == "fp32" else 2
    query = case.B * case.H * case.N * case.D * size
    key = case.B * case.Hk * (case.M if keys is None else keys) * case.D * size
    return query if which == "forward" else 2 * query + 2 * key
