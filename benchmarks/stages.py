"""Time of each stage, from the dispatcher operators, and on CUDA of each kernel.

The operators run whole stages in a row, so a stage is a difference of two runs with the plan given:

    pool     the operator pool on query, key and value, one after the other (inside a call they
             share a launch, so that plan and coarse, which subtract it, read a little low)
    plan     the operator plan, less pooling of query and key
    fine     forward with the plan, coarse="none", order 0
    coarse   forward with the plan and the form's coarse part at order 0, less ``fine`` and the
             pooling that it repeats ("row" runs inside the fine kernel: what it adds there)
    order1   forward with the plan, less the same at order 0
    whole    forward as a user calls it, without a plan

and the same of the operator backward, where pool is that of its recomputation and ``fine`` includes
the column lists. Differences carry the noise of both their runs.
"""

import re

import torch

STAGES = ("pool", "plan", "coarse", "fine", "order1", "whole")

# Kernels of each stage. Coarse form "block" runs those of fine on pooled inputs: float32 in their
# names tells. Those of order 1 are known by what they take.
KERNELS = {
    "pool": "pool moments round_pooled pool_level sample lse weights centre_term "
    "causal_centres causal_weights key_weights_backward centre_grad causal_centre_grad "
    "shift_queries",
    "plan": "plan_row plan_stream plan_map global_scores global_select plan_transpose plan_level",
    "coarse": "delta_and_block_rows block_rows coarse_forward coarse_backward share_sums "
    "backward_pooled cells_forward cells_rows cells_columns levels_forward levels_combine "
    "levels_rows levels_columns spread_levels merge_block_rows split_shares spread_shares "
    "cells_candidates cells_sum",
    "fine": "delta row_sums forward forward_short backward_rows backward_rows_short "
    "backward_rows_wide backward_columns backward_columns_short backward_columns_wide",
    "order1": "round row_weights shift causal_products order1_walk_rows order1_walk_keys "
    "order1_walk_wide",
    "whole": "forward_head reorder",
}


def stage_runs(context, form, which):
    """{run: function} whose times :func:`stages_of` needs."""
    case, ops = context.case, torch.ops.mra_attention
    q, k, v = context.inputs
    bq, bk = case.block_size
    density = case.density
    if density is None and case.blocks_per_row is None:
        density = 1 / 8
    forced = (case.diagonal_blocks, case.first_blocks, case.is_causal, None)
    budget, select = (case.blocks_per_row, density, bq, bk), (form.selection, *forced)
    lists = ops.plan(q, k, None, None, *budget, *select, pool=form.pool)

    def pool_beside(coarse):
        return form.pool if coarse == "row" else "even"

    def forward(coarse, order, rows=lists):
        given = (None, None) if rows is not None else budget[:2]
        rows = rows or (None, None, None)
        return ops.forward(
            q, k, v, None, None, *rows, *given, bq, bk, coarse, order, *select,
            pool=pool_beside(coarse),
        )  # fmt: skip

    def pools(*tensors):
        return [ops.pool(t, None, bq if t is q else bk) for t in tensors]

    pooled = {"none": (), "row": (k, v), "block": (q, k, v)}[form.coarse]
    orders = range(form.order + 1) if form.coarse != "none" else ()
    if which == "forward":
        runs = {
            "pool": lambda: pools(q, k, v),
            "pool qk": lambda: pools(q, k),
            "plan": lambda: ops.plan(q, k, None, None, *budget, *select, pool=form.pool),
            "fine": lambda: forward("none", 0),
            "whole": lambda: forward(form.coarse, form.order, None),
        }
        runs |= {f"order {o}": lambda o=o: forward(form.coarse, o) for o in orders}
    else:
        grad = context.grad_out

        def backward(coarse, order):
            out, lse, share, _, _, _, *means = forward(coarse, order)
            means = [mean if mean.dim() > 1 else None for mean in means]
            rest = (bq, bk, coarse, order, case.is_causal, None, *means)
            saved = (q, k, v, None, None, out, lse, share, *lists)
            return lambda: ops.backward(grad, None, *saved, *rest, pool=pool_beside(coarse))

        runs = {"fine": backward("none", 0), "whole": backward(form.coarse, form.order)}
        runs |= {f"order {o}": backward(form.coarse, o) for o in orders}
    if pooled:
        runs["pool coarse"] = lambda: pools(*pooled)
    return runs


def stages_of(ms, which):
    """{stage: ms} from the median times of the runs."""
    stages = {"pool": ms["pool"] if which == "forward" else ms.get("pool coarse", 0.0)}
    if which == "forward":
        stages["plan"] = ms["plan"] - ms["pool qk"]
    stages["fine"] = ms["fine"]
    if "order 0" in ms:
        stages["coarse"] = ms["order 0"] - ms["fine"] - ms["pool coarse"]
    if "order 1" in ms:
        stages["order1"] = ms["order 1"] - ms["order 0"]
    stages["whole"] = ms["whole"]
    return {name: stages[name] for name in STAGES if name in stages}


def kernels(run):
    """CUDA kernels of one run, by torch's profiler: [{name, stage, us, count}], longest first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = {}
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        entry = found.setdefault(event.name, {"name": event.name[:160], "us": 0.0, "count": 0})
        entry["us"] += event.device_time
        entry["count"] += 1
    for name, entry in found.items():
        entry["stage"] = stage_of_kernel(name)
        entry["us"] = round(entry["us"], 2)
    return sorted(found.values(), key=lambda entry: -entry["us"])


def stage_of_kernel(name):
    """The stage of a kernel of ours, by its name with types; other work is small and between them,
    or order 1 where it has no kernels of its own."""
    if "mra" not in name:
        return "other (ATen)"
    if "Order1" in name:
        return "order1"
    function = re.search(r"(\w+)_kernel\b", name)
    found = [s for s, names in KERNELS.items() if function and function[1] in names.split()]
    return found[0] if found else "other"
