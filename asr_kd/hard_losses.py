"""Cross-entropy with hard targets for K stacked networks: loss, gradient and accuracy in one pass over the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from asr_kd.losses import SparseTargets, distillation_loss, row_blocks

_CPU_BLOCK_ELEMENTS = 2**18  # a block and its temporary stay in the second-level cache


def hard_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats and number of correct frames of each member, (K, B, S) and (B,) -> (K,) and (K,).

    On a CPU the memory of `logits` is overwritten with their gradient: they must not be used afterwards. At 1,200 states that is
    three passes less over the largest tensor of a training step than `torch.nn.functional.cross_entropy` and an argmax take.
    Elsewhere it is the distillation loss of targets that are certain, whose kernels leave nothing of the logits' size but their gradient.
    """
    if logits.device.type != "cpu":
        return certain_losses(logits, targets), count_correct(logits.detach(), targets)
    losses, correct = _HardLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses, correct


def certain_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each member, (K, B, S) and (B,) -> (K,), as the loss of sparse soft targets that list one state."""
    members, num_frames, num_states = logits.shape
    ids = targets.repeat(members)[:, None]  # (K * B, 1)
    certain = SparseTargets(ids, torch.ones(ids.shape, device=logits.device))
    losses = distillation_loss(logits.reshape(-1, num_states), certain, temperature=1.0, hard_weight=0.0, reduction="none")
    return losses.view(members, num_frames).mean(1)


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Frames whose target has the largest logit, (..., B, S) and (B,) -> (...,); a maximum is much cheaper than an argmax.

    A tie counts as correct: in bfloat16 that adds half a per cent, so decisions are not made on it.
    """
    of_target = logits.gather(-1, targets.expand(logits.shape[:-1])[..., None])[..., 0]  # (..., B)
    return (of_target >= logits.amax(-1)).sum(-1)


class _HardLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        members, num_frames, num_states = logits.shape
        rows, ids = logits.detach().view(-1, num_states), targets.repeat(members)[:, None]
        parts = [_block(rows[block], ids[block], num_frames) for block in row_blocks(rows, _CPU_BLOCK_ELEMENTS)]
        losses, correct = (torch.cat(part).view(members, num_frames) for part in zip(*parts, strict=True))
        ctx.gradient = logits.detach()
        ctx.mark_non_differentiable(counts := correct.sum(1))
        return losses.mean(1), counts

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        weights = gradients[0]
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("hard_losses: a second backward pass, expected one, as its memory is used again; call hard_losses anew")
        if weights.device.type == "cpu" and bool((weights == 1.0).all()):
            return gradient, None
        return gradient.mul_(weights[:, None, None]), None


def _block(logits: Tensor, ids: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Losses and correctness of some rows, (n, S) and (n, 1) -> (n,) and (n,); leaves (softmax(z) - onehot(y)) / B in `logits`."""
    scores = logits.float()
    top, of_target = scores.amax(1, keepdim=True), scores.gather(1, ids)
    exponentials = (scores - top).mul_(1 / math.log(2)).exp2_()  # torch's exp takes three times as long as its exp2
    total = exponentials.sum(1, keepdim=True)
    gradient = exponentials.mul_((total * num_frames).reciprocal())
    logits.copy_(gradient.scatter_add_(1, ids, torch.full_like(of_target, -1.0 / num_frames)))
    return (total.log() + top - of_target)[:, 0], (of_target >= top)[:, 0]
