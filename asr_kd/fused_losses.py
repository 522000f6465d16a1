"""The loss of `asr_kd.losses`, its gradient and the mean of teachers' posteriors as Triton kernels, one program per frame.

`row_losses` and `row_gradients` take and return what `asr_kd.losses._losses_and_gradient`, their reference, does at once (weighted gradients).
Softmax and sums are done in float32. Nothing of size (N, C) exists beside input and result: the classes of a frame are worked
through in blocks with a running maximum (Milakov & Gimelshein 2018, arXiv 1805.02867). The loss takes one pass over the classes, the
gradient two. Of sparse targets these passes know the tail alone; the k listed classes are gathered and mended afterwards. The mean keeps a
frame's classes in registers, so each teacher's logits are read once.

Importing this module needs Triton; `asr_kd.losses` does so with the first logits on a CUDA device.
"""

# Inside the kernels there are Triton's values, which have no static types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

if TYPE_CHECKING:
    from asr_kd.losses import _Rows, _Settings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_LISTED = 128  # each listed class is compared with each other one
MAX_BLOCK = 4096
MAX_AVERAGED = 16384  # classes in registers
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def supports(logits: Tensor, rows: _Rows) -> bool:
    """Whether the kernels take logits (N, C) of this type and targets of this form."""
    return logits.dtype in DTYPES and logits.numel() > 0 and (rows.indices is None or 0 < rows.indices.shape[-1] <= MAX_LISTED)


def row_losses(logits: Tensor, rows: _Rows, settings: _Settings) -> Tensor:
    """Losses of N frames, (N, C) -> (N,) float32, 0 at padding; NaN where a class id is out of range."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _launch(_loss_kernel, losses, logits, rows, settings, KL=settings.kl)
    return losses


def row_gradients(logits: Tensor, rows: _Rows, settings: _Settings, weights: Tensor) -> Tensor:
    """Gradient (N, C) of sum(weights * losses) in the logits' type, rounded once; weights: (N,)."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch(_gradient_kernel, gradient, logits, rows, settings, weights_ptr=weights.contiguous())
    return gradient


def supports_mean(logits: Tensor) -> bool:
    """Whether `mean_posteriors` takes logits (K, N, C) of this type and size."""
    return logits.dtype in DTYPES and logits.numel() > 0 and logits.shape[2] <= MAX_AVERAGED


def mean_posteriors(logits: Tensor, temperature: float) -> Tensor:
    """Mean over teachers of softmax(logits / T), (K, N, C) -> (N, C) float32."""
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    num_teachers, num_rows, num_classes = logits.shape
    means = torch.empty(num_rows, num_classes, dtype=torch.float32, device=logits.device)
    block = triton.next_power_of_2(num_classes)
    with torch.cuda.device_of(logits):
        _mean_kernel[(num_rows,)](
            means,
            logits,
            logits.stride(0),
            logits.stride(1),
            temperature,
            NUM_TEACHERS=num_teachers,
            NUM_CLASSES=num_classes,
            BLOCK=block,
            num_warps=16 if block > 8192 else 8 if block > 1024 else 4,
        )
    return means


def _launch(kernel: Any, result: Tensor, logits: Tensor, rows: _Rows, settings: _Settings, **arguments: Any) -> None:
    num_rows, num_classes = logits.shape
    logits, soft = (t if t.stride(-1) == 1 else t.contiguous() for t in (logits, rows.probabilities))
    indices, tail, hard, valid = (None if t is None else t.contiguous() for t in rows[1:])
    block = min(MAX_BLOCK, triton.next_power_of_2(num_classes))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        kernel[(num_rows,)](
            result,
            logits,
            soft,
            indices,
            tail,
            hard,
            valid,
            logits.stride(0),
            soft.stride(0),
            settings.temperature,
            settings.hard_weight,
            **arguments,
            NUM_CLASSES=num_classes,
            NUM_LISTED=0 if indices is None else indices.shape[-1],
            LISTED_BLOCK=1 if indices is None else triton.next_power_of_2(indices.shape[-1]),
            BLOCK=block,
            num_warps=8 if block == MAX_BLOCK else 4,
        )


@triton.jit
def _loss_kernel(
    loss_ptr,
    logits_ptr,
    soft_ptr,
    index_ptr,
    tail_ptr,
    hard_ptr,
    valid_ptr,
    logits_stride,
    soft_stride,
    temperature,
    hard_weight,
    KL: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    NUM_LISTED: tl.constexpr,
    LISTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One frame's loss."""
    row = tl.program_id(0).to(tl.int64)
    if valid_ptr is not None:  # noqa: SIM102 (decided by the compiler)
        if tl.load(valid_ptr + row) == 0:
            tl.store(loss_ptr + row, 0.0)
            return
    logits_ptr += row * logits_stride
    soft_ptr += row * soft_stride
    each = _each_unlisted(tail_ptr, row, NUM_CLASSES, NUM_LISTED)
    top, soft_sum, hard_sum, mass, score, negative_entropy = _sums(logits_ptr, soft_ptr, index_ptr, temperature, NUM_CLASSES, BLOCK)
    if index_ptr is not None:  # classes listed twice add up in the loss; the entropy is that of the list, as in the reference
        ids, p, used, in_range = _listed(soft_ptr, index_ptr, row, NUM_CLASSES, NUM_LISTED, LISTED_BLOCK)
        z = tl.load(logits_ptr + ids, mask=in_range, other=float("-inf")).to(tl.float32)
        finite = z > float("-inf")
        exponents = tl.where(finite, tl.maximum((z - top) / temperature, LOWEST), 0.0)
        num_masked = NUM_CLASSES - mass - tl.sum(tl.where(in_range & (z == float("-inf")), 1.0, 0.0), 0)  # of the unlisted classes
        unlisted = score - tl.sum(exponents, 0) + tl.where(num_masked > 0, LOWEST, 0.0)
        score = tl.sum(p * tl.where(finite, exponents, LOWEST), 0) + tl.where(each == 0, 0.0, each * unlisted)
        mass = tl.sum(p, 0) + each * (NUM_CLASSES - NUM_LISTED)
        mass = tl.where(tl.max(tl.where(used & ~in_range, 1, 0), 0) == 0, mass, float("nan"))
        negative_entropy = tl.sum(_p_log_p(p), 0) + (NUM_CLASSES - NUM_LISTED) * _p_log_p(each)
    soft_loss = mass * tl.log(soft_sum) - score
    if KL:
        soft_loss += negative_entropy
    loss = temperature * temperature * soft_loss
    if hard_ptr is not None:
        hard = tl.load(hard_ptr + row)
        in_range = (hard >= 0) & (hard < NUM_CLASSES)
        logit = tl.load(logits_ptr + hard, mask=in_range, other=float("nan")).to(tl.float32)
        loss += hard_weight * (tl.log(hard_sum) - (logit - top))
    tl.store(loss_ptr + row, loss)


@triton.jit
def _gradient_kernel(
    gradient_ptr,
    logits_ptr,
    soft_ptr,
    index_ptr,
    tail_ptr,
    hard_ptr,
    valid_ptr,
    logits_stride,
    soft_stride,
    temperature,
    hard_weight,
    weights_ptr,
    NUM_CLASSES: tl.constexpr,
    NUM_LISTED: tl.constexpr,
    LISTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One frame of weights * (T * (mass * q - p) + hard_weight * (softmax(z) - onehot(y)))."""
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * NUM_CLASSES
    if valid_ptr is not None:  # noqa: SIM102 (decided by the compiler)
        if tl.load(valid_ptr + row) == 0:
            for start in range(0, NUM_CLASSES, BLOCK):
                classes = start + tl.arange(0, BLOCK)
                tl.store(gradient_ptr + classes, tl.zeros([BLOCK], tl.float32), mask=classes < NUM_CLASSES)
            return
    logits_ptr += row * logits_stride
    soft_ptr += row * soft_stride
    each = _each_unlisted(tail_ptr, row, NUM_CLASSES, NUM_LISTED)
    top, soft_sum, hard_sum, mass, _, _ = _sums(logits_ptr, soft_ptr, index_ptr, temperature, NUM_CLASSES, BLOCK)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    if index_ptr is not None:
        ids, p, _, in_range = _listed(soft_ptr, index_ptr, row, NUM_CLASSES, NUM_LISTED, LISTED_BLOCK)
        mass = tl.sum(p, 0) + each * (NUM_CLASSES - NUM_LISTED)
    for start in range(0, NUM_CLASSES, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        inside = classes < NUM_CLASSES
        shifted = tl.load(logits_ptr + classes, mask=inside, other=float("-inf")).to(tl.float32) - top
        block_p = each if index_ptr is not None else tl.load(soft_ptr + classes, mask=inside, other=0.0).to(tl.float32)
        gradient = _gradient(shifted, classes, block_p, mass / soft_sum, hard_sum, hard_ptr, row, temperature, hard_weight)
        tl.store(gradient_ptr + classes, weight * gradient, mask=inside)
    if index_ptr is not None:
        tl.debug_barrier()  # what follows overwrites what other threads of the program have written
        p = tl.sum(tl.where(ids[:, None] == ids[None, :], p[None, :], 0.0), 1)  # classes listed twice add up
        shifted = tl.load(logits_ptr + ids, mask=in_range, other=float("-inf")).to(tl.float32) - top
        gradient = _gradient(shifted, ids, p, mass / soft_sum, hard_sum, hard_ptr, row, temperature, hard_weight)
        tl.store(gradient_ptr + ids, weight * gradient, mask=in_range)


@triton.jit
def _mean_kernel(
    means_ptr,
    logits_ptr,
    teacher_stride,
    frame_stride,
    temperature,
    NUM_TEACHERS: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One frame's mean of softmax(z / T)."""
    row = tl.program_id(0).to(tl.int64)
    classes = tl.arange(0, BLOCK)
    inside = classes < NUM_CLASSES
    logits_ptr += row * frame_stride
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(NUM_TEACHERS):
        z = tl.load(logits_ptr + classes, mask=inside, other=float("-inf")).to(tl.float32)
        exponentials = tl.exp((z - tl.max(z, 0)) / temperature)
        total += exponentials / tl.sum(exponentials, 0)
        logits_ptr += teacher_stride
    tl.store(means_ptr + row * NUM_CLASSES + classes, total / NUM_TEACHERS, mask=inside)


@triton.jit
def _gradient(shifted, classes, p, soft_factor, hard_sum, hard_ptr, row, temperature, hard_weight):
    """T * (mass * q - p) + hard_weight * (softmax(z) - onehot(y)) of some classes; soft_factor is mass / sum of exp((z - top) / T)."""
    gradient = temperature * (soft_factor * tl.exp(shifted / temperature) - p)
    if hard_ptr is not None:
        posteriors = tl.exp(shifted) / hard_sum
        gradient += hard_weight * tl.where(classes == tl.load(hard_ptr + row), posteriors - 1, posteriors)
    return gradient


@triton.jit
def _sums(logits_ptr, soft_ptr, index_ptr, temperature, NUM_CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """One pass over a frame: the largest logit, sum of exp((z - top) / T), of exp(z - top), of p, of p * (z - top) / T, of p * log p.

    For sparse targets p is 1 where a class is not masked, 0 where it is. The last sums only move away from 0 as the maximum grows, so that
    nothing cancels.
    """
    top = float("-inf")
    soft_sum = 0.0
    hard_sum = 0.0
    mass = 0.0
    score = 0.0
    negative_entropy = 0.0
    for start in range(0, NUM_CLASSES, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + classes, mask=classes < NUM_CLASSES, other=float("-inf")).to(tl.float32)
        if index_ptr is None:  # noqa: SIM108 (decided by the compiler)
            p = tl.load(soft_ptr + classes, mask=classes < NUM_CLASSES, other=0.0).to(tl.float32)
        else:
            p = tl.where(z > float("-inf"), 1.0, 0.0)
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # all classes so far are masked
        drop = tl.where(top == float("-inf"), 0.0, top - shift)
        soft_sum = soft_sum * tl.exp(drop / temperature) + tl.sum(tl.exp((z - shift) / temperature), 0)
        hard_sum = hard_sum * tl.exp(drop) + tl.sum(tl.exp(z - shift), 0)
        score += mass * tl.maximum(drop / temperature, LOWEST) + tl.sum(p * tl.maximum((z - shift) / temperature, LOWEST), 0)  # 0 * -inf = 0
        mass += tl.sum(p, 0)
        negative_entropy += tl.sum(_p_log_p(p), 0)
        top = new_top
    return top, tl.where(soft_sum > 0, soft_sum, float("nan")), hard_sum, mass, score, negative_entropy


@triton.jit
def _listed(soft_ptr, index_ptr, row, NUM_CLASSES: tl.constexpr, NUM_LISTED: tl.constexpr, LISTED_BLOCK: tl.constexpr):
    """Ids and probabilities of the listed classes, which places of the block are used, and which ids are those of classes."""
    places = tl.arange(0, LISTED_BLOCK)
    used = places < NUM_LISTED
    ids = tl.load(index_ptr + row * NUM_LISTED + places, mask=used, other=0)
    in_range = used & (ids >= 0) & (ids < NUM_CLASSES)
    p = tl.load(soft_ptr + places, mask=in_range, other=0.0).to(tl.float32)
    return tl.where(in_range, ids, 0).to(tl.int32), p, used, in_range


@triton.jit
def _each_unlisted(tail_ptr, row, NUM_CLASSES: tl.constexpr, NUM_LISTED: tl.constexpr):
    """Probability of each class that is not listed."""
    each = 0.0
    if tail_ptr is not None:
        each = tl.load(tail_ptr + row).to(tl.float32) / tl.maximum(NUM_CLASSES - NUM_LISTED, 1)
    return each


@triton.jit
def _p_log_p(p):
    return tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
