"""Distillation losses for frames and tokens (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2).

Per frame, with z the student's logits over C classes, p the soft targets, y the hard target and T the temperature,

    q    = softmax(z / T)                                                          (eq. 1)
    loss = T^2 * CE(p, q) + hard_weight * CE(y, softmax(z))

    d loss / d z = T * (q - p) + hard_weight * (softmax(z) - onehot(y))            (eq. 2, times T^2)

p is a constant: no gradient flows into soft targets. Axes: B utterances, T frames (or tokens), C classes, K teachers;
N stands for all frames of a batch. Softmax and sums are done in float32 (float64 for float64 logits), under autocast too.

Besides the logits and their gradient nothing of size (N, C) is kept: the frames are worked through in blocks, and the gradient is
made beside the loss, with the same softmax. On CUDA the kernels of `asr_kd.fused_losses` do this where Triton is installed, and
keep no gradient between the passes. This module imports nothing but torch.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Mean = Literal["arithmetic", "geometric"]
Reduction = Literal["mean", "sum", "batch", "batchmean", "none"]

LEAST_TEMPERATURE = 1e-20  # below, float32 has no room for logits over T
REDUCTIONS = ("mean", "sum", "batch", "batchmean", "none")
# Elements (frames x classes) per block: on a CPU a block stays in the cache and is worth a second thread; elsewhere it is an eighth of the batch,
# because a block needs up to six temporaries of its own size and these shall stay below one of size (N, C). Batches below
# MIN_BLOCK_ELEMENTS (4 MB) go as one, their temporaries being small.
CPU_BLOCK_ELEMENTS = 2**19
MIN_BLOCK_ELEMENTS = 2**20
NUM_BLOCKS = 8
FUSED_DEVICES = ("cuda",)
# A length n / num_frames kept in float32 may come back as n + 1e-4 frames; that is not one frame more.
LENGTH_TOLERANCE_FRAMES = 1e-2
# float16 storage rounds away some of the mass; logits or log-probabilities given by mistake are far outside.
MASS_TOLERANCE = 0.1


class SparseTargets(NamedTuple):
    """Soft targets that name `k` classes per frame; everything the frame has beside them is `tail`.

    indices: (..., k) integer class ids; where tail > 0 the k ids of a frame differ, else repeated ids add up.
    probabilities: (..., k) of those classes.
    tail: (...,) mass spread uniformly over the classes not listed: 0 (or None for all frames) where `indices` holds a sample of
        the tail, since a sample carries the tail's mass itself.
    """

    indices: Tensor
    probabilities: Tensor
    tail: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        """`function` applied to each tensor, e.g. `targets.map(lambda t: t.to(device))`."""
        return SparseTargets(function(self.indices), function(self.probabilities), None if self.tail is None else function(self.tail))

    def dense(self, num_classes: int) -> Tensor:
        """The same targets as probabilities (..., num_classes)."""
        k = self.indices.shape[-1]
        shape = (*self.indices.shape[:-1], num_classes)
        unlisted = self.probabilities.new_zeros(shape)
        if self.tail is not None:
            unlisted = (self.tail / max(1, num_classes - k)).unsqueeze(-1).expand(shape).scatter(-1, self.indices.long(), 0.0)
        return unlisted.scatter_add(-1, self.indices.long(), self.probabilities.to(unlisted.dtype))


def average_teachers(logits: Tensor | Iterable[Tensor], temperature: float, mean: Mean = "arithmetic") -> Tensor:
    """Soft targets of an ensemble: mean over teachers of softmax(logits / T), (K, ..., C) -> (..., C); rows sum to 1 (eq. 1).

    "arithmetic" averages the posteriors. "geometric" averages their logarithms and normalises, which is softmax of the mean
    logits over T. `logits` may be an iterable of K tensors (..., C), so that only one teacher's logits are in memory at a time;
    log-probabilities serve as well. A class masked by -inf in one teacher is 0 in its posteriors, and so in a geometric mean.

    Raises ValueError for a temperature that is not positive, another `mean`, or no teachers.

    >>> logits = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()  # two teachers, one frame, two classes
    >>> average_teachers(logits, temperature=1.0)
    tensor([0.7000, 0.3000])
    >>> average_teachers(logits, temperature=1.0, mean="geometric")  # 3 : 1 = sqrt(0.9 * 0.5) : sqrt(0.1 * 0.5)
    tensor([0.7500, 0.2500])
    """
    _check_temperature(temperature)
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"mean is {mean!r}; expected 'arithmetic' or 'geometric'")
    if mean == "arithmetic" and isinstance(logits, Tensor) and (kernels := _averaging_kernels(logits)) is not None:
        return cast(Tensor, kernels.mean_posteriors(logits.flatten(1, -2), temperature)).view(logits.shape[1:])
    total, num_teachers = None, 0
    for member in logits:  # (..., C)
        scaled = _at_least_float32(member) / temperature
        term = scaled if mean == "geometric" else scaled.softmax(-1)
        total = term if total is None else total + term
        num_teachers += 1
    if total is None:
        raise ValueError("no teachers to average; expected logits (K, ..., C) with K >= 1")
    average = total / num_teachers
    return average.softmax(-1) if mean == "geometric" else average


def distillation_loss(
    logits: Tensor,
    soft_targets: Tensor | SparseTargets,
    hard_targets: Tensor | None = None,
    length: Tensor | None = None,
    *,
    temperature: float,
    hard_weight: float = 0.5,
    reduction: Reduction = "mean",
    allowed_len_diff: int = 0,
    kl: bool = False,
    fused: bool = True,
) -> Tensor:
    """T^2 * CE(soft_targets, softmax(logits / T)) + hard_weight * CE(hard_targets, softmax(logits)).

    logits: (B, T, C) or (N, C), any float type; log-probabilities serve as well. A class may be masked by -inf: its gradient is
        finite, and its value too as long as the soft target is 0 there.
    soft_targets: probabilities made at the same temperature, of the shape of `logits`, or SparseTargets. Constants. Unbiased estimates serve as
        well, single ones of which are negative (`asr_kd.compact_targets`), since the loss is linear in them.
    hard_targets: class ids (B, T) or (N,); None where the transfer set has no labels, then the hard term is left out.
    length: (B,) relative lengths in (0, 1] as SpeechBrain's: frame t is valid if t < length * T. Padding changes neither value
        nor gradient, whatever it holds.
    temperature: T > 0, the one that `soft_targets` were made with.
    reduction: "mean": sum over valid frames / number of valid frames, a scalar; "sum": sum over valid frames; "batchmean":
        that sum / B; "batch": the mean over each utterance's own valid frames, (B,); "none": (B, T), 0 at padding. With
        logits (N, C) every row is an utterance of one frame.
    allowed_len_diff: up to so many frames more in logits, soft or hard targets than in the shortest of them are cut off.
    kl: report KL(p, q) instead of CE(p, q), so that the soft term of a perfect student is 0. The gradient is the same. For
        SparseTargets with a sampled tail and other estimates the entropy is that of the sample, and the value is off by the difference.
    fused: on CUDA, use the Triton kernels of `asr_kd.fused_losses` where they can be; False: never.

    Raises ValueError for shapes, lengths, class ids or settings that do not fit; class ids, lengths and the targets' mass are
    looked at on the CPU only, because elsewhere that would wait for the device.

    >>> logits = torch.zeros(1, 2, 4)
    >>> soft_targets = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.0, 1.0, 0.0, 0.0]]])
    >>> distillation_loss(logits, soft_targets, temperature=2.0)  # 4 * log(4)
    tensor(5.5452)
    >>> distillation_loss(logits, soft_targets, torch.tensor([[0, 1]]), temperature=2.0, reduction="none")  # 4.5 * log(4)
    tensor([[6.2383, 6.2383]])
    """
    _check_temperature(temperature)
    _check_hard_weight(hard_weight)
    _check_reduction(reduction)
    logits, soft_targets, hard_targets = _fit_lengths(logits, soft_targets, hard_targets, allowed_len_diff)
    valid = _valid_frames(logits, length)
    if hard_weight == 0:
        hard_targets = None
    rows = _as_rows(soft_targets, hard_targets, valid)
    settings = _Settings(float(temperature), float(hard_weight), kl, fused)
    flat = logits.reshape(-1, logits.shape[-1])
    return _reduce(_losses_of_rows(flat, rows, settings, reduction).reshape(logits.shape[:-1]), valid, reduction)


class DistillationLoss(nn.Module):
    """`distillation_loss` with its settings, for a recipe's YAML: `!new:asr_kd.losses.DistillationLoss`.

    Raises ValueError for settings that do not fit.

    >>> loss = DistillationLoss(temperature=2.0, hard_weight=0.0)
    >>> loss(torch.zeros(3, 4), torch.full((3, 4), 0.25))
    tensor(5.5452)
    """

    def __init__(
        self,
        temperature: float,
        hard_weight: float = 0.5,
        reduction: Reduction = "mean",
        *,
        allowed_len_diff: int = 0,
        kl: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        _check_hard_weight(hard_weight)
        _check_reduction(reduction)
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.reduction: Reduction = reduction
        self.allowed_len_diff = allowed_len_diff
        self.kl = kl
        self.fused = fused

    def forward(
        self, logits: Tensor, soft_targets: Tensor | SparseTargets, hard_targets: Tensor | None = None, length: Tensor | None = None
    ) -> Tensor:
        """Arguments and errors as in `distillation_loss`."""
        return distillation_loss(
            logits,
            soft_targets,
            hard_targets,
            length,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            reduction=self.reduction,
            allowed_len_diff=self.allowed_len_diff,
            kl=self.kl,
            fused=self.fused,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, hard_weight={self.hard_weight}, reduction={self.reduction!r}, kl={self.kl}"


def logit_matching_loss(
    logits: Tensor, teacher_logits: Tensor, length: Tensor | None = None, *, reduction: Reduction = "mean", allowed_len_diff: int = 0
) -> Tensor:
    """Half the variance over classes of (student's - teacher's logits): the limit of T^2 * KL for T -> infinity (eq. 4).

    logits, teacher_logits: (B, T, C) or (N, C); for an ensemble the mean of its members' logits. Both are zero-meaned per frame;
    the gradient is (z - v) / C per frame with z and v zero-meaned. Classes masked by -inf in the teacher are left out.
    length, reduction, allowed_len_diff: as in `distillation_loss`.

    >>> logit_matching_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[10.0, 10.0]]))  # differences -1 and 1 around their mean
    tensor(0.5000)
    """
    _check_reduction(reduction)
    logits, target, _ = _fit_lengths(logits, teacher_logits, None, allowed_len_diff)
    teacher_logits = cast(Tensor, target)
    valid = _valid_frames(logits, length)
    student, teacher = _at_least_float32(logits), _at_least_float32(teacher_logits).detach()
    if valid is not None:
        student, teacher = (z.masked_fill(~valid.unsqueeze(-1), 0) for z in (student, teacher))
    counted = teacher != -math.inf  # (..., C)
    num_classes = counted.sum(-1, keepdim=True)
    difference = torch.where(counted, student - teacher, 0)
    centred = torch.where(counted, difference - difference.sum(-1, keepdim=True) / num_classes, 0)
    losses = centred.square().sum(-1) / (2 * num_classes.squeeze(-1))  # (..., C) -> (...,)
    return _reduce(losses, valid, reduction)


class _Settings(NamedTuple):
    temperature: float
    hard_weight: float
    kl: bool
    fused: bool


class _Rows(NamedTuple):
    """The targets of N frames."""

    probabilities: Tensor  # (N, C), or (N, k) of the classes in `indices`
    indices: Tensor | None  # (N, k)
    tail: Tensor | None  # (N,)
    hard: Tensor | None  # (N,)
    valid: Tensor | None  # (N,) False at padding

    def map(self, function: Callable[[Tensor], Tensor]) -> _Rows:
        return _Rows(*(None if field is None else function(field) for field in self))  # type: ignore[arg-type]

    def block(self, block: slice) -> _Rows:
        rows = self.map(lambda t: t[block])
        unpadded = rows.valid is not None and rows.valid.device.type == "cpu" and bool(rows.valid.all())
        return rows._replace(valid=None) if unpadded else rows  # spares the masking


def _losses_of_rows(logits: Tensor, rows: _Rows, settings: _Settings, reduction: Reduction) -> Tensor:
    """Losses (N,) of N frames, differentiable."""
    if torch.compiler.is_compiling() or any(map(_is_wrapped, (logits, *rows))) or forward_ad._current_level >= 0:
        return _row_losses(logits, rows, settings)  # a compiler fuses it itself; torch.func and forward mode differentiate it
    weight = _expected_weight(rows, reduction) if logits.requires_grad and torch.is_grad_enabled() else None
    return cast(Tensor, _RowLosses.apply(logits, *rows, settings, weight))  # type: ignore[no-untyped-call]


def _expected_weight(rows: _Rows, reduction: Reduction) -> float:
    """What the backward pass will most likely multiply the gradient of each frame's loss by; 1 where that is not known without waiting for a device."""
    if reduction != "mean":
        return 1.0
    if rows.valid is None:
        return 1 / max(1, len(rows.probabilities))
    return 1 / max(1, int(rows.valid.sum())) if rows.valid.device.type == "cpu" else 1.0


class _RowLosses(torch.autograd.Function):
    """Losses of N frames; where a gradient is wanted it is made beside them, with the same softmax, and handed out by the first backward pass.

    It is kept times the weight that is expected for it (None: it is not wanted), in the type that is handed out where that has float32's range.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> Tensor:
        rows, ctx.settings, ctx.weight = _Rows(*args[:-2]), args[-2], args[-1]
        ctx.save_for_backward(logits, *rows)
        if logits.device.type == "cpu":
            _check_values(rows, logits.shape[-1])
        ctx.kernels, ctx.gradient = _fused_kernels(logits, rows, ctx.settings), None
        if ctx.kernels is not None:
            return cast(Tensor, ctx.kernels.row_losses(logits, rows, ctx.settings))
        if ctx.weight is None:
            return torch.cat([_row_losses(logits[block], rows.block(block), ctx.settings) for block in _blocks(logits)])
        losses, ctx.gradient = _losses_and_gradients(logits, rows, ctx.settings, ctx.weight)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, *fields = ctx.saved_tensors
        rows, (weights,), again = _Rows(*fields), grad_outputs, torch.is_grad_enabled()
        others = (None,) * (len(_Rows._fields) + 2)
        if again:  # create_graph: a form that autograd can differentiate again
            return torch.autograd.grad(_row_losses(logits, rows, ctx.settings), logits, weights, create_graph=True)[0], *others
        many = torch._C._functorch.is_legacy_batchedtensor(weights) or _is_wrapped(weights)  # several backward passes at once (is_grads_batched)
        if ctx.kernels is not None and not many:
            return ctx.kernels.row_gradients(logits, rows, ctx.settings, weights), *others
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second backward pass over the same graph, or none by the kernels
            gradient = _losses_and_gradients(logits, rows, ctx.settings, ctx.weight)[1]
        if not many and weights.device.type == "cpu" and bool((weights == ctx.weight).all()):
            return gradient.to(logits.dtype), *others
        weights = (weights if rows.valid is None else weights.masked_fill(~rows.valid, 0)).div(ctx.weight).unsqueeze(-1)
        if many:
            return (gradient * weights).to(logits.dtype), *others
        for block in _blocks(gradient):  # which of bfloat16 times float32 makes float32 temporaries
            gradient[block].mul_(weights[block])
        return gradient.to(logits.dtype), *others


def _losses_and_gradients(logits: Tensor, rows: _Rows, settings: _Settings, weight: float) -> tuple[Tensor, Tensor]:
    """Losses (N,) and `weight` times the gradient (N, C) of their sum, in bfloat16 for bfloat16 logits, by blocks."""
    dtype, blocks = torch.promote_types(logits.dtype, torch.float32), _blocks(logits)
    kept = logits.new_empty(logits.shape, dtype=torch.bfloat16 if logits.dtype == torch.bfloat16 else dtype)
    scratch = None if kept.dtype == dtype else logits.new_empty(logits[blocks[0]].shape, dtype=dtype)  # one for all, so that it stays in the cache
    losses = []
    for block in blocks:
        gradient = kept[block] if scratch is None else scratch[:len(kept[block])]
        losses.append(_losses_and_gradient(logits[block], rows.block(block), settings, gradient, weight))
        if scratch is not None:
            kept[block] = gradient
    return torch.cat(losses), kept


def _fused_kernels(logits: Tensor, rows: _Rows, settings: _Settings) -> ModuleType | None:
    """`asr_kd.fused_losses` if it can take this; None for the plain form."""
    if not settings.fused or logits.device.type not in FUSED_DEVICES or _is_wrapped(logits):
        return None
    kernels = _working_kernels(logits.device)
    return kernels if kernels is not None and kernels.supports(logits, rows) else None


def _averaging_kernels(logits: Tensor) -> ModuleType | None:
    """`asr_kd.fused_losses` if it can average these teachers' posteriors (K, ..., C), of which no gradient is wanted; None for the plain form."""
    if logits.device.type not in FUSED_DEVICES or logits.dim() < 3 or torch.compiler.is_compiling() or _is_wrapped(logits):
        return None
    if (logits.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        return None
    kernels = _working_kernels(logits.device)
    return kernels if kernels is not None and kernels.supports_mean(logits.flatten(1, -2)) else None


@functools.cache
def _working_kernels(device: torch.device) -> ModuleType | None:
    """`asr_kd.fused_losses` if Triton is installed and its kernels, on this device, agree with the plain form on a small case."""
    try:
        from asr_kd import fused_losses
    except ImportError:
        return None
    logits = torch.arange(6.0, device=device).view(2, 3)
    posteriors, hard, weights = logits.softmax(-1), logits.argmin(-1), torch.ones(2, device=device)
    indices, tail = posteriors.argsort()[:, 1:], posteriors.amin(-1)
    settings = _Settings(2.0, 0.5, True, True)
    try:
        certain = _Rows(torch.ones(2, 1, device=device), hard[:, None], None, None, None)
        for rows in (_Rows(posteriors, None, None, hard, None), _Rows(posteriors.gather(1, indices), indices, tail, hard, None), certain):
            gradient = torch.empty_like(logits)
            torch.testing.assert_close(fused_losses.row_losses(logits, rows, settings), _losses_and_gradient(logits, rows, settings, gradient))
            torch.testing.assert_close(fused_losses.row_gradients(logits, rows, settings, weights), gradient)
        torch.testing.assert_close(fused_losses.mean_posteriors(logits[:, None], 2.0), (logits / 2).softmax(-1).mean(0, keepdim=True))
    except Exception as error:  # no C compiler, a device that Triton does not know, ...
        warnings.warn(f"asr_kd.fused_losses does not work on {device}, the plain form is used: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return fused_losses


def _blocks(logits: Tensor) -> list[slice]:
    return row_blocks(logits, CPU_BLOCK_ELEMENTS if logits.device.type == "cpu" else max(MIN_BLOCK_ELEMENTS, logits.numel() // NUM_BLOCKS))


def row_blocks(rows: Tensor, elements: int) -> list[slice]:
    """Rows (N, C) in blocks of equal size (but the last), of about so many elements each: at most half as many again."""
    step = max(1, -(-len(rows) // max(1, round(rows.numel() / elements))))
    return [slice(start, start + step) for start in range(0, max(1, len(rows)), step)]


def _row_losses(logits: Tensor, rows: _Rows, settings: _Settings) -> Tensor:
    """(N, C) -> (N,), 0 at padding; made of ordinary operations, so that autograd and compilers can take it as it is."""
    temperature, hard_weight, kl, _ = settings
    logits, rows = _without_padding(logits, rows)
    log_q = (logits * (1 / temperature)).log_softmax(-1)
    soft = _soft_cross_entropy(log_q, rows)
    if kl:
        soft = soft - _entropy(rows, logits.shape[-1])
    losses = temperature**2 * soft
    if rows.hard is not None:
        log_posteriors = log_q if temperature == 1 else logits.log_softmax(-1)
        losses = losses - hard_weight * log_posteriors.gather(-1, rows.hard.unsqueeze(-1)).squeeze(-1)
    return losses if rows.valid is None else losses.masked_fill(~rows.valid, 0)


def _losses_and_gradient(logits: Tensor, rows: _Rows, settings: _Settings, gradient: Tensor, weight: float = 1.0) -> Tensor:
    """(N, C) -> (N,); also fills `gradient` (N, C): `weight` times T * (mass * q - p) + hard_weight * (softmax(z) - onehot(y)). Works in place."""
    temperature, hard_weight, kl, _ = settings
    logits, rows = _without_padding(logits, rows)
    p, mass = rows.probabilities, rows.probabilities.sum(-1)
    top = logits.amax(-1, keepdim=True)
    tempered = (logits - top).mul_(1 / (math.log(2) * temperature))  # logarithms to base 2: torch's exp2 takes a third of the time of its exp
    exponentials = torch.exp2(tempered, out=gradient)
    total = exponentials.sum(-1)
    least = torch.finfo(total.dtype).min
    tempered.clamp_(min=least)  # 0 * -inf = 0
    posteriors = (tempered * temperature).exp2_() if rows.hard is not None and temperature not in (1, 2) else None
    num_unlisted, each = 0, None
    if rows.indices is None:
        score = tempered.mul_(p).sum(-1)
    else:
        score = (p * tempered.gather(-1, rows.indices)).sum(-1)
        if rows.tail is not None:
            num_unlisted = logits.shape[-1] - rows.indices.shape[-1]
            each = _each_unlisted(rows.tail, num_unlisted)
            unlisted = tempered.scatter_(-1, rows.indices, 0.0).sum(-1).clamp_(min=least)  # of several masked classes: -inf
            score += each.squeeze(-1) * unlisted
            mass = mass + each.squeeze(-1) * num_unlisted
    soft = mass * total.log() - math.log(2) * score
    losses = temperature**2 * (soft - _entropy(rows, logits.shape[-1]) if kl else soft)
    of_soft, of_hard = weight * temperature, weight * hard_weight  # what the gradients of the two terms are multiplied by
    factor = (of_soft * mass / total).unsqueeze(-1)  # weight * T * mass * q is this times the exponentials
    if rows.hard is None:
        gradient.mul_(factor)
    else:
        hard = rows.hard.unsqueeze(-1)
        if temperature == 1:
            hard_total = total
            gradient.mul_(factor + (of_hard / hard_total).unsqueeze(-1))
        elif posteriors is None:  # at T = 2, where exp(z) is the square of exp(z / 2)
            hard_total = torch.linalg.vector_norm(exponentials, dim=-1).square()
            gradient.mul_(torch.mul(exponentials, (of_hard / hard_total).unsqueeze(-1), out=tempered).add_(factor))
        else:
            hard_total = posteriors.sum(-1)
            gradient.mul_(factor).add_(posteriors.mul_((of_hard / hard_total).unsqueeze(-1)))
        losses += hard_weight * (hard_total.log() + (top - logits.gather(-1, hard)).squeeze(-1))
        gradient.scatter_add_(-1, hard, gradient.new_full(hard.shape, -of_hard))
    if rows.indices is None:
        gradient.sub_(p, alpha=of_soft)
    elif each is None:
        gradient.scatter_add_(-1, rows.indices, -of_soft * p)
    else:
        gradient.sub_(of_soft * each).scatter_add_(-1, rows.indices, of_soft * (each - p))
    if rows.valid is not None:
        gradient.masked_fill_(~rows.valid.unsqueeze(-1), 0)
        losses.masked_fill_(~rows.valid, 0)
    return losses


def _soft_cross_entropy(log_q: Tensor, rows: _Rows) -> Tensor:
    """-sum over classes of p * log_q, (N, C) -> (N,), where 0 * -inf = 0."""
    if rows.indices is None:
        return -_weighted(rows.probabilities, log_q).sum(-1)
    cross_entropy = -_weighted(rows.probabilities, log_q.gather(-1, rows.indices)).sum(-1)
    if rows.tail is None:
        return cross_entropy
    each = _each_unlisted(rows.tail, log_q.shape[-1] - rows.indices.shape[-1])
    unlisted = log_q.scatter(-1, rows.indices, 0.0).sum(-1, keepdim=True)
    return cross_entropy - _weighted(each, unlisted).squeeze(-1)


def _entropy(rows: _Rows, num_classes: int) -> Tensor:
    """-sum over classes of p * log p, (N,); of estimates the negative ones are left out."""
    probabilities = rows.probabilities.clamp(min=0)
    listed = -torch.xlogy(probabilities, probabilities).sum(-1)
    if rows.indices is None or rows.tail is None:
        return listed
    num_unlisted = num_classes - rows.indices.shape[-1]
    each = _each_unlisted(rows.tail, num_unlisted)
    return listed - num_unlisted * torch.xlogy(each, each).squeeze(-1)


def _each_unlisted(tail: Tensor, num_unlisted: int) -> Tensor:
    """Probability of each class that is not listed, (N,) -> (N, 1)."""
    return tail.unsqueeze(-1) / max(1, num_unlisted)


def _weighted(weights: Tensor, log_q: Tensor) -> Tensor:
    """weights * log_q with 0 * -inf = 0: -inf is taken as the lowest finite number (comparing the weights with 0 costs six times as much)."""
    return weights * log_q.clamp(min=torch.finfo(log_q.dtype).min)


def _without_padding(logits: Tensor, rows: _Rows) -> tuple[Tensor, _Rows]:
    """Computing types; zeros in place of padding, so that nothing in it (NaN, class ids out of range) can reach value or gradient."""
    logits = _at_least_float32(logits)
    rows = rows.map(lambda t: t.to(logits.dtype) if t.is_floating_point() else t if t.dtype == torch.bool else t.long())
    if rows.valid is None:
        return logits, rows
    padding = ~rows.valid
    filled = rows._replace(valid=None).map(lambda t: t.masked_fill(padding if t.dim() == 1 else padding.unsqueeze(-1), 0))
    return logits.masked_fill(padding.unsqueeze(-1), 0), filled._replace(valid=rows.valid)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _as_rows(soft_targets: Tensor | SparseTargets, hard_targets: Tensor | None, valid: Tensor | None) -> _Rows:
    """(B, T, ...) or (N, ...) -> (N, ...)"""
    hard = None if hard_targets is None else hard_targets.reshape(-1)
    mask = None if valid is None else valid.reshape(-1)
    if isinstance(soft_targets, Tensor):
        return _Rows(soft_targets.detach().flatten(0, -2), None, None, hard, mask)
    indices, probabilities, tail = soft_targets
    tail = None if tail is None else tail.detach().reshape(-1)
    return _Rows(probabilities.detach().flatten(0, -2), indices.flatten(0, -2), tail, hard, mask)


def _reduce(losses: Tensor, valid: Tensor | None, reduction: Reduction) -> Tensor:
    """(B, T) or (N,) -> as in `distillation_loss`."""
    if reduction == "none":
        return losses
    utterances = losses.unsqueeze(-1) if losses.dim() == 1 else losses  # (B, T)
    if reduction == "sum":
        return utterances.sum()
    if reduction == "batchmean":
        return utterances.sum() / utterances.shape[0]
    if valid is None:
        return utterances.mean() if reduction == "mean" else utterances.mean(1)
    if reduction == "mean":
        return utterances.sum() / valid.sum()
    return utterances.sum(1) / valid.sum(1)


def _fit_lengths(
    logits: Tensor, soft_targets: Tensor | SparseTargets, hard_targets: Tensor | None, allowed_len_diff: int
) -> tuple[Tensor, Tensor | SparseTargets, Tensor | None]:
    """Checks shapes against each other and cuts all to the shortest, where the difference is allowed."""
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}; expected floats (B, T, C) or (N, C)")
    axes, num_classes = logits.dim() - 1, logits.shape[-1]
    named = {"logits": logits, **_named_soft_targets(soft_targets, num_classes, axes)}
    if hard_targets is not None:
        if hard_targets.is_floating_point() or hard_targets.dtype == torch.bool or hard_targets.dim() != axes:
            raise ValueError(f"hard targets are {hard_targets.dtype} {tuple(hard_targets.shape)}; expected class ids for logits {tuple(logits.shape)}")
        named["hard targets"] = hard_targets
    for name, tensor in named.items():
        if axes == 2 and tensor.shape[0] != logits.shape[0]:
            raise ValueError(f"{name} hold {tensor.shape[0]} utterances, logits {logits.shape[0]}; give both the same batch")
    lengths = {name: tensor.shape[axes - 1] for name, tensor in named.items()}
    shortest, longest = min(lengths.values()), max(lengths.values())
    if longest - shortest > allowed_len_diff:
        held = ", ".join(f"{length} in {name}" for name, length in lengths.items())
        raise ValueError(f"frames differ: {held}; allowed_len_diff is {allowed_len_diff}; make the targets anew or allow the difference")
    if longest == shortest:
        return logits, soft_targets, hard_targets

    def cut(tensor: Tensor) -> Tensor:
        return tensor.narrow(axes - 1, 0, shortest)

    soft = cut(soft_targets) if isinstance(soft_targets, Tensor) else soft_targets.map(cut)
    return cut(logits), soft, None if hard_targets is None else cut(hard_targets)


def _named_soft_targets(soft_targets: Tensor | SparseTargets, num_classes: int, axes: int) -> dict[str, Tensor]:
    """One tensor that has the soft targets' leading axes, under the name that messages give it."""
    if isinstance(soft_targets, Tensor):
        if soft_targets.dim() != axes + 1 or soft_targets.shape[-1] != num_classes:
            raise ValueError(f"soft targets are {tuple(soft_targets.shape)}; expected {axes + 1} axes with {num_classes} classes as the logits")
        return {"soft targets": soft_targets}
    if not isinstance(soft_targets, SparseTargets):
        raise ValueError(f"soft targets are {type(soft_targets).__name__}; expected a torch.Tensor or SparseTargets")
    indices, probabilities, tail = soft_targets
    if indices.is_floating_point() or indices.dim() != axes + 1 or indices.shape[-1] > num_classes:
        raise ValueError(f"sparse indices are {indices.dtype} {tuple(indices.shape)}; expected class ids with {axes + 1} axes, at most {num_classes} a frame")
    if probabilities.shape != indices.shape or (tail is not None and tail.shape != indices.shape[:-1]):
        tail_shape = None if tail is None else tuple(tail.shape)
        raise ValueError(f"sparse targets do not fit: indices {tuple(indices.shape)}, probabilities {tuple(probabilities.shape)}, tail {tail_shape}")
    return {"sparse targets": indices}


def _valid_frames(logits: Tensor, length: Tensor | None) -> Tensor | None:
    """(B, T) bool, False at padding; None where nothing is padded."""
    if length is None:
        return None
    if logits.dim() != 3 or length.shape != logits.shape[:1]:
        raise ValueError(f"length is {tuple(length.shape)} for logits {tuple(logits.shape)}; expected (B,) with logits (B, T, C)")
    frames = length.float() * logits.shape[1]
    if _can_look_at(frames) and not bool(((length > 0) & (length <= 1 + 1e-6)).all()):
        raise ValueError(f"length holds {length.min():g} to {length.max():g}; expected relative lengths in (0, 1], not frames")
    frames = (frames.to(logits.device) - LENGTH_TOLERANCE_FRAMES).clamp(min=0.5)  # however short, one frame is valid
    return torch.arange(logits.shape[1], device=logits.device) < frames.unsqueeze(-1)


def _can_look_at(tensor: Tensor) -> bool:
    """Whether a value can decide something in Python: not in a compiler or a torch.func transform, not without waiting for a device."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return not _is_wrapped(tensor)


def _is_wrapped(tensor: Tensor | None) -> bool:
    """Whether a torch.func transform is looking at this tensor."""
    return tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _check_values(rows: _Rows, num_classes: int) -> None:
    """Class ids in range; soft targets that sum to one, or to less where they are sparse, as what is left out may be dropped. Padding is left out."""
    for name, ids in (("hard targets", rows.hard), ("sparse indices", rows.indices)):
        if ids is not None:
            held = ids if rows.valid is None else ids[rows.valid]
            if held.numel() and not 0 <= int(held.min()) <= int(held.max()) < num_classes:
                raise ValueError(f"{name} hold class ids {int(held.min())} to {int(held.max())}; expected 0 to {num_classes - 1}")
    mass = rows.probabilities.sum(-1, dtype=torch.promote_types(rows.probabilities.dtype, torch.float32))
    mass = mass if rows.tail is None else mass + rows.tail
    least = 1 - MASS_TOLERANCE if rows.indices is None else 0
    wrong = ~((least <= mass) & (mass <= 1 + MASS_TOLERANCE))
    wrong = wrong if rows.valid is None else wrong & rows.valid
    if bool(wrong.any()):
        frame = int(wrong.nonzero()[0])
        raise ValueError(f"soft targets of frame {frame} of {len(mass)} sum to {mass[frame]:g}; expected probabilities, softmax(logits / T)")


def _check_temperature(temperature: float) -> None:
    # not math.isfinite, which stops a compiler that has a symbol for the number
    if isinstance(temperature, str | None) or not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; expected a finite number > 0, at least {LEAST_TEMPERATURE:g}")


def _check_hard_weight(hard_weight: float) -> None:
    if isinstance(hard_weight, str | None) or not 0 <= hard_weight < math.inf:
        raise ValueError(f"hard_weight is {hard_weight!r}; expected a finite number >= 0")


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
