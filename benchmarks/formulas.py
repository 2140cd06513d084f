"""Operations and bytes that a case needs: counted from the mathematics, not from an implementation.

Operations by stage: ``mra_attention/flops.py``, which also feeds torch's FlopCounterMode.

Exact attention is 4 D N M forward and 10 D N M backward (half of it when causal), so that five
products of the backward include the scores made again. Other work done twice counts once.

Bytes are the fewest that must move: every input read once and every output written once.
``forward``: q, k, v, out, lse. ``backward``: forward, then q, k, v, out, grad_out, lse, dq, dk, dv.
"""

import dataclasses

from mra_attention import flops

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
    return flops.stage_flops(
        case.B, case.H, case.Hk, case.N, case.M, case.D, case.budgets(), case.block_size[1],
        form.coarse, form.order, which, pool=form.pool,
    )  # fmt: skip


def exact_pairs(case):
    """(query, key) pairs of one head inside selected pairs of blocks; a pair of blocks that the
    diagonal crosses counts whole."""
    return flops.exact_pairs(case.budgets(), case.M, case.block_size[1])


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
