"""Time and memory of the distillation loss, forward and backward: `python -m tests.benchmarks losses`.

Targets are made beforehand: a row's memory is what forward and backward add to the resident set that holds logits and targets, at
its peak (Linux only), as a multiple of the logits' own size, the gradient (1.0) included. Of logits below 32 MB it may be memory that the process
kept from before, and so not seen. Times are CPU times of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from asr_kd.losses import SparseTargets, distillation_loss
from tests.benchmarks.measure import show

TEMPERATURE = 2.0
TOP_K = 32


def plain_loss(logits: Tensor, soft_targets: Tensor, hard_targets: Tensor) -> Tensor:
    """The same value in the obvious way."""
    soft = functional.cross_entropy(logits / TEMPERATURE, soft_targets)
    return TEMPERATURE**2 * soft + 0.5 * functional.cross_entropy(logits, hard_targets)


def loss_of(form: str, frames: int, classes: int) -> Callable[[Tensor], Tensor]:
    """A function of the logits, its targets made."""
    torch.manual_seed(0)
    hard = torch.randint(classes, (frames,))
    if form == "cross_entropy":
        return lambda logits: functional.cross_entropy(logits, hard)
    if form.startswith("sparse"):
        indices = torch.stack([torch.randperm(classes)[:TOP_K] for _ in range(frames)])
        listed = torch.full((frames, TOP_K), 0.5 / TOP_K if form == "sparse_tail" else 1 / TOP_K)
        sparse = SparseTargets(indices, listed, torch.full((frames,), 0.5) if form == "sparse_tail" else None)
        return lambda logits: distillation_loss(logits, sparse, hard, temperature=TEMPERATURE)
    soft = torch.rand(frames, classes)
    soft /= soft.sum(-1, keepdim=True)
    if form == "plain":
        return lambda logits: plain_loss(logits, soft, hard)
    if form == "dense_soft_only":
        return lambda logits: distillation_loss(logits, soft, temperature=TEMPERATURE)
    if form == "dense_float16":
        half = soft.half()
        del soft
        return lambda logits: distillation_loss(logits, half, hard, temperature=TEMPERATURE)
    return lambda logits: distillation_loss(logits, soft, hard, temperature=TEMPERATURE)


FORMS = ("cross_entropy", "plain", "dense", "dense_soft_only", "dense_float16", "sparse", "sparse_tail")


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since it was last set back) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(form: str, frames: int, classes: int, repeats: int, dtype: torch.dtype) -> dict[str, object]:
    """CPU time of the fastest of `repeats` passes, and what the first pass added to the peak of the resident set."""
    loss = loss_of(form, frames, classes)
    logits = torch.randn(frames, classes).to(dtype).requires_grad_()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to what is held now
    before = resident_mib("VmRSS")
    loss(logits).backward()
    added = (resident_mib("VmHWM") - before) / (logits.nbytes / 2**20)
    times = []
    for _ in range(repeats):
        logits.grad = None
        start = time.process_time()
        loss(logits).backward()
        times.append(time.process_time() - start)
    kind = str(dtype).removeprefix("torch.")
    return {"form": form, "dtype": kind, "frames": frames, "classes": classes, "ms": round(1e3 * min(times), 2), "added_in_logits": round(added, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["512x1200", "2048x1200", "1024x14000"], help="frames x classes")
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the logits")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for form in options.forms:  # code and tables in memory
        loss_of(form, 8, 64)(torch.zeros(8, 64, requires_grad=True)).backward()
    for size in options.sizes:
        frames, classes = (int(number) for number in size.split("x"))
        for form in options.forms:
            show(measure(form, frames, classes, options.repeats, getattr(torch, options.dtype)))


if __name__ == "__main__":
    main()
