"""Number formats of training: float32 or bfloat16 matrix products over float32 weights, chosen by a short measurement."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from asr_kd.errors import AsrKdError

PRECISIONS = ("auto", "fp32", "bf16")
_WORTHWHILE = 1.3  # bfloat16 must be this much faster before its rounding is accepted

log = logging.getLogger(__name__)


def matmul_rate(dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int, int], duration_s: float = 0.2) -> float:
    """Floating-point operations per second of a batched matrix product (K, N, in) x (K, in, out) for `shape` (K, N, in, out)."""
    members, rows, inner, outer = shape
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(members, rows, inner, generator=generator, device=device).to(dtype)
    right = torch.randn(members, inner, outer, generator=generator, device=device).to(dtype)
    torch.bmm(left, right)  # the first product pays for set-up
    repeats, start = 0, _now(device)
    while (elapsed := _now(device) - start) < duration_s or not repeats:  # a look at the clock makes a GPU wait
        for _ in range(20 if device.type == "cuda" else 1):
            torch.bmm(left, right)
            repeats += 1
    return 2.0 * members * rows * inner * outer * repeats / elapsed


def choose_precision(requested: str, device: torch.device, shape: tuple[int, int, int, int]) -> str:
    """Give "fp32" or "bf16" for a requested "auto", "fp32" or "bf16".

    "auto" measures both on this device with the network's own shape (K, N, in, out): bfloat16 is six times as fast as
    float32 on a CPU with AMX, two to four times as fast on one with AVX-512's bfloat16 instructions, and slower on one without.

    Raises:
        AsrKdError: unknown name.
    """
    if requested not in PRECISIONS:
        raise AsrKdError(f"precision: {requested!r}, expected one of {', '.join(PRECISIONS)}")
    if requested != "auto":
        return requested
    rates = {name: matmul_rate(dtype, device, shape) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    chosen = "bf16" if rates["bf16"] > _WORTHWHILE * rates["fp32"] else "fp32"
    log.info("precision %s: float32 %.0f GFLOP/s, bfloat16 %.0f GFLOP/s", chosen, rates["fp32"] / 1e9, rates["bf16"] / 1e9)
    return chosen


@contextmanager
def precision_context(precision: str, device: torch.device) -> Iterator[None]:
    """Run matrix products in `precision` ("fp32" or "bf16"); float32 means float32, so TF32 is off inside, and bfloat16 products are summed in float32.

    torch has two settings for TF32 and refuses to mix them: the one is used that the caller uses, by default the older.

    Rounded weights are not cached: they would stay as they were while the optimiser changes the weights.
    """
    matmul = torch.backends.cuda.matmul
    setting, off = _tf32_setting()
    earlier = getattr(matmul, setting), matmul.allow_bf16_reduced_precision_reduction
    setattr(matmul, setting, off)
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = earlier[1]
        setattr(matmul, setting, earlier[0])


def _tf32_setting() -> tuple[str, bool | str]:
    """Name of the setting in `torch.backends.cuda.matmul` that the caller uses, and its value for "off"."""
    try:
        torch.backends.cuda.matmul.allow_tf32  # noqa: B018 (raises where the newer one was used)
    except RuntimeError:
        return "fp32_precision", "ieee"
    return "allow_tf32", False


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
