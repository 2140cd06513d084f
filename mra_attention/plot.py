"""A plan as a picture. Needs matplotlib, which nothing else here does."""

__all__ = ["plot_plan"]


def plot_plan(plan, batch=0, head=0, ax=None):
    """Draws one head's plan: dark where a pair of blocks is exact. Returns the matplotlib axes.

    batch, head: which one, IndexError outside the plan. ax: axes to draw on, made when None."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plotting a plan needs matplotlib: pip install matplotlib") from error
    if not (0 <= batch < plan.B and 0 <= head < plan.H):
        raise IndexError(
            f"batch, head: got ({batch}, {head}), expected a head of a plan with B={plan.B}, "
            f"H={plan.H}"
        )
    dense = plan.to_dense()[batch, head].cpu()
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 4))
    # Axes in tokens, so that a plan lies over an attention map of the same head.
    ax.imshow(
        dense.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto",
        extent=(0, plan.nk * plan.block_size[1], plan.nq * plan.block_size[0], 0),
    )  # fmt: skip
    N, M = plan.lengths
    ax.set_xlim(0, M)
    ax.set_ylim(N, 0)
    order = "" if plan.layout is None else f", in patches of {plan.layout}"
    ax.set_xlabel(f"key{order}")
    ax.set_ylabel(f"query{order}")
    share = dense.float().mean().item()
    ax.set_title(f"batch {batch}, head {head}: {share:.1%} of the blocks exact")
    return ax
