"""Ten teachers as one batched product, beside their matrix products alone and beside a loop over ten modules: `python -m tests.benchmarks teachers`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr_kd.ensemble import Ensemble
from asr_kd.frame_data import FrameData
from asr_kd.model import AcousticModel, ModelShape
from asr_kd.precision import precision_context
from tests.benchmarks.measure import best_s, machine, made_up_frames, products_s, random_batches, show, step_operations
from tests.benchmarks.training import trainer_step


def loop_step(shape: ModelShape, members: int, data: FrameData, batch: int) -> Callable[[], None]:
    """One step of each of several modules per call, one after the other, on the same windows."""
    models = [AcousticModel(shape, seed).to(data.device) for seed in range(members)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, fused=True) for model in models]
    frames = random_batches(data, batch, 1, data.device)[0]

    def step() -> None:
        windows, targets = data.windows.gather(frames), data.targets[frames].long()
        for model, optimizer in zip(models, optimizers, strict=True):
            nn.functional.cross_entropy(model(windows).float(), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(shape: ModelShape, members: int, batch: int, precision: str, frames: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Rates in one precision, in frames times teachers."""
    with tempfile.TemporaryDirectory() as temporary:
        data = made_up_frames(Path(temporary), shape, frames, device)
        together = trainer_step(Ensemble(shape, range(members)).to(device), data, None, precision, batch, Path(temporary))
        loop = loop_step(shape, members, data, batch)
        with precision_context(precision, device):
            together_s, loop_s = best_s(together, device, repeats), best_s(loop, device, repeats)
        limit_s = products_s(shape, members, batch, precision, device, repeats)
    rate = members * batch
    return {"precision": precision, "batch_frames": batch, "members": members, "limit_gflops": step_operations(shape, members, batch) / limit_s / 1e9,
            "limit_model_frames_per_s": rate / limit_s, "together_model_frames_per_s": rate / together_s, "together_share_of_limit": limit_s / together_s,
            "loop_model_frames_per_s": rate / loop_s, "together_over_loop": loop_s / together_s}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("members", 10), ("hidden_layers", 4), ("hidden_units", 512), ("states", 1200), ("batch", 1024), ("frames", 120_000), ("repeats", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    shape, device = ModelShape(1040, options.hidden_layers, options.hidden_units, options.states, 0.1), torch.device(options.device)
    rows = [measure(shape, options.members, options.batch, precision, options.frames, options.repeats, device) for precision in options.precisions]
    show([machine(device) | {"shape": shape.__dict__}, *rows])


if __name__ == "__main__":
    main()
