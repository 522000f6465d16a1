"""A student's training end to end beside the machine's matrix products and beside the plain SpeechBrain way: `python -m tests.benchmarks training`.

Ours: windows cut from stored features, forward, loss with soft targets from the store, backward, clipping, optimiser; as in the recipes
a student has no dropout, a network that learns from hard targets has. The limit: the matrix products of that step alone, in the same
precision and process. The plain way: SpeechBrain's Fbank with context inside the loop, padded batches of utterances, its nll_loss,
Adam, with and without dropout; a step over the same number of frames.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr_kd.ensemble import Ensemble
from asr_kd.frame_data import FrameData
from asr_kd.model import AcousticModel, ModelShape
from asr_kd.precision import precision_context
from asr_kd.schedule import ScheduleSettings
from asr_kd.soft_targets import SoftTargetRecord, SoftTargetStore, extract
from asr_kd.training import SoftTargets, TrainingSettings, _Trainer
from tests.benchmarks.measure import best_s, machine, made_up_frames, products_s, random_batches, show, step_operations


def trainer_step(networks: Ensemble, data: FrameData, soft_targets: SoftTargets | None, precision: str, batch: int, folder: Path) -> Callable[[], None]:
    """One step of training per call, on a new batch each time."""
    settings = TrainingSettings(ScheduleSettings(), batch_frames=batch, precision=precision)
    trainer = _Trainer(networks, data, data, folder, settings, 0, soft_targets)
    batches = random_batches(data, batch, 32, data.device)

    def step() -> None:
        trainer._step(batches[trainer.step % len(batches)])
        trainer.step += 1

    return step


def plain_step(shape: ModelShape, batch: int, precision: str) -> tuple[Callable[[], None], int]:
    """One step of the plain SpeechBrain way per call, and its number of valid frames."""
    from speechbrain.lobes.features import Fbank
    from speechbrain.nnet.losses import nll_loss

    generator = torch.Generator().manual_seed(0)
    utterances = max(1, round(batch / 1200))
    num_frames = [batch // utterances - 40 * u for u in range(utterances)]  # of unlike length, so that something is padded
    waveforms = torch.randn(utterances, max(num_frames) * 160, generator=generator)
    length = torch.tensor([frames / max(num_frames) for frames in num_frames])
    fbank = Fbank(context=True, left_frames=20, right_frames=5, n_mels=40)
    model = AcousticModel(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    log_softmax = nn.LogSoftmax(-1)

    def step() -> None:
        features = fbank(waveforms)  # (B, T, input_dim)
        targets = torch.zeros(features.shape[:2], dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(features)
        nll_loss(log_softmax(logits.float()), targets, length).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(num_frames)


def soft_target_store(folder: Path, data: FrameData, shape: ModelShape, form: str, precision: str) -> SoftTargetStore:
    """Soft targets of two untrained teachers: what they say does not matter to the time they take."""
    record = SoftTargetRecord(2.0, "arithmetic", shape.num_states, "t", "f", "s")
    small = ModelShape(shape.input_dim, 1, 64, shape.num_states)
    extract(Ensemble(small, range(2)).to(data.device), data, folder, record, seed=0, device=data.device, form=form, precision=precision)  # type: ignore[arg-type]
    return SoftTargetStore(folder, data, record, data.device)


def measure(shape: ModelShape, batch: int, precision: str, frames: int, repeats: int, form: str) -> dict[str, Any]:
    """Rates in one precision."""
    device = torch.device("cpu")
    operations = step_operations(shape, 1, batch)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = made_up_frames(folder, shape, frames, device)
        store = soft_target_store(folder / "soft", data, shape, form, precision)
        soft = trainer_step(Ensemble(replace(shape, dropout=0.0), [0]), data, store, precision, batch, folder)
        hard = trainer_step(Ensemble(shape, [0]), data, None, precision, batch, folder)
        plain = {dropout: plain_step(replace(shape, dropout=dropout), batch, precision) for dropout in (0.0, shape.dropout)}
        with precision_context(precision, device):
            seconds = {name: best_s(step, device, repeats) for name, step in (("soft", soft), ("hard", hard))}
        limit_s = products_s(shape, 1, batch, precision, device, repeats)
        plain_rates = {dropout: frames / best_s(step, device, repeats) for dropout, (step, frames) in plain.items()}
    return {"precision": precision, "batch_frames": batch, "limit_gflops": operations / limit_s / 1e9, "limit_frames_per_s": batch / limit_s,
            "student_frames_per_s": batch / seconds["soft"], "student_share_of_limit": limit_s / seconds["soft"],
            "hard_targets_frames_per_s": batch / seconds["hard"], "hard_targets_share_of_limit": limit_s / seconds["hard"],
            "plain_speechbrain_frames_per_s": plain_rates[0.0], "plain_speechbrain_with_dropout_frames_per_s": plain_rates[shape.dropout]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden_layers", 4), ("hidden_units", 512), ("states", 1200), ("batch", 1024), ("frames", 120_000), ("repeats", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--form", default="compact", choices=["compact", "sparse", "dense"])
    options = parser.parse_args(arguments)
    shape = ModelShape(1040, options.hidden_layers, options.hidden_units, options.states, 0.1)
    rows = {precision: measure(shape, options.batch, precision, options.frames, options.repeats, options.form) for precision in ("fp32", "bf16")}
    summary = {f"{name}_bf16_over_plain_{precision}": rows["bf16"][f"{name}_frames_per_s"] / row[f"{plain}_frames_per_s"]
               for name, plain in (("student", "plain_speechbrain"), ("hard_targets", "plain_speechbrain_with_dropout")) for precision, row in rows.items()}
    show([machine(torch.device("cpu")) | {"shape": shape.__dict__, "soft_targets": options.form}, *rows.values(), summary])


if __name__ == "__main__":
    main()
