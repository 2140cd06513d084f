"""The masks of ``nn.MultiheadAttention``: checked, and in the forms that attention takes."""

import torch

from . import transforms

__all__ = ["additive_mask", "check_mask", "takes_part", "weighs"]

# A float key_padding_mask is 0 or -inf; finite stand-ins for -inf are this or less.
MASKED = -1e4


def check_mask(name, mask, shapes):
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or not (
        mask.dtype == torch.bool or mask.is_floating_point()
    ):
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"{name}: got {kind}, expected a bool or floating tensor")
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}"
        )


def takes_part(key_padding_mask):
    """nn's mask (True or -inf: ignore) as ours (True: takes part)."""
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    return key_padding_mask > MASKED


def weighs(key_padding_mask):
    """Whether a float mask has values that neither keep nor drop a key: a bias on its scores.

    On the CPU the answer is a bool. On another device looking would wait for it: there such a mask
    fails in the device's queue, as an index out of range does, and the answer is False. Inside of
    a traced program nobody looks."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return False
    traced = torch.compiler.is_compiling() or transforms.active()
    if traced or type(key_padding_mask) is not torch.Tensor or key_padding_mask.is_meta:
        return False
    plain = ((key_padding_mask == 0) | (key_padding_mask <= MASKED)).all()
    if key_padding_mask.device.type == "cpu":
        return not plain
    torch._assert_async(
        plain,
        "key_padding_mask: got values other than 0 and -inf, expected a bool mask or these two; a "
        "bias on the scores belongs in attn_mask",
    )
    return False


def additive_mask(q, M, key_padding_mask, attn_mask, is_causal):
    """nn's masks as one float mask that broadcasts to (B, H, N, M); None without any."""
    if attn_mask is None and is_causal:
        attn_mask = torch.ones(q.shape[2], M, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    total = None
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        mask = mask.to(q.dtype)
        total = mask if total is None else total + mask
    return total
