"""What soft targets cost: time to write and read them, and frame accuracy of students that learn from their small forms.

    python -m tests.benchmarks soft_targets speed                 one network shape; rates beside the forward passes and the training step
    python -m tests.benchmarks soft_targets corpus --features F --targets A --dev_features F2 --dev_targets A2
    python -m tests.benchmarks soft_targets corpus --states 14000 --features ...     the same speech, its states divided by their neighbouring phones
    python -m tests.benchmarks soft_targets simulation            14,000 simulated states

All but the first train one student per form (dense, compact, sparse, truncated to the top k at equal bytes) and temperature from the same seed and
batches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.ensemble import Ensemble
from asr_kd.frame_data import FrameData, input_statistics, load_frame_data
from asr_kd.frames import FrameStore
from asr_kd.hmm.align import SEGMENTS
from asr_kd.hmm.model import SIL, STATES_PER_PHONE
from asr_kd.losses import SparseTargets, distillation_loss
from asr_kd.model import ModelShape
from asr_kd.precision import choose_precision, matmul_rate, precision_context
from asr_kd.schedule import ScheduleSettings
from asr_kd.soft_targets import NumberedFrames, SoftTargetRecord, SoftTargetStore, Teachers, extract
from asr_kd.training import SoftTargets, TrainingSettings, train
from tests.benchmarks.measure import show

CPU = torch.device("cpu")


class Truncated:
    """The bad example: top k of the dense targets, made to sum to 1, four bytes per entry."""

    def __init__(self, dense: SoftTargets, bytes_per_frame: int) -> None:
        self.temperature, self.dense, self.k = dense.temperature, dense, bytes_per_frame // 4

    def batch(self, frame_indices: Tensor) -> SparseTargets:
        posteriors = self.dense.batch(frame_indices)
        assert isinstance(posteriors, Tensor)
        top, ids = posteriors.topk(self.k)
        return SparseTargets(ids, top / top.sum(1, keepdim=True))


class Table:
    """Frames whose input is one row of an array, as utterances of 500 frames."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs, self.num_frames = inputs, len(inputs)
        self.offsets = np.append(np.arange(0, len(inputs), 500), len(inputs)).astype(np.int64)
        self.utt_ids = [f"u{u}" for u in range(len(self.offsets) - 1)]

    def gather(self, frame_indices: Tensor) -> Tensor:
        return self.inputs[frame_indices]


class MixtureTeacher:
    """Exact posteriors of a simulated corpus: states in groups (phones), two Gaussians of unit variance per state, as logits (1, N, S)."""

    def __init__(self, num_states: int, num_groups: int, dim: int, group_scale: float, state_scale: float, generator: torch.Generator) -> None:
        group = torch.arange(num_states) * num_groups // num_states
        centres = group_scale * torch.randn(2, num_groups, dim, generator=generator)
        self.means = centres[:, group] + state_scale * torch.randn(2, num_states, dim, generator=generator)  # (2, S, dim)

    def __len__(self) -> int:
        return 1

    def __call__(self, inputs: Tensor, /) -> Tensor:
        scores = inputs @ self.means.transpose(1, 2) - 0.5 * self.means.square().sum(2)[:, None]  # (2, N, S)
        return torch.logaddexp(scores[0], scores[1])[None]

    def sample(self, num_frames: int, generator: torch.Generator) -> FrameData:
        """Inputs (N, dim) with their states (N,)."""
        states = torch.randint(self.means.shape[1], (num_frames,), generator=generator)
        component = torch.randint(2, (num_frames,), generator=generator)
        means = self.means[component, states]
        return FrameData(Table(means + torch.randn(means.shape, generator=generator)), states.int())


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Shortest wall time of one call: the least disturbed by what else the machine does."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Extraction beside its forward passes, reading beside the student's step."""
    shape = ModelShape(1040, options.hidden_layers, options.hidden_units, options.states)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(options.states, (options.frames,), generator=generator)
    frames = FrameData(Table(torch.randn(options.frames, 1040, generator=generator)), states.int())
    teachers, record = Ensemble(shape, range(10)), SoftTargetRecord(2.0, "arithmetic", options.states, "t", "f", "s")
    batch = torch.randperm(options.frames, generator=generator)[:options.batch]
    product = (len(teachers), options.batch, shape.hidden_units, shape.hidden_units)
    precision = choose_precision(options.precision, CPU, product)
    with precision_context(precision, CPU), torch.no_grad():
        forward = seconds(lambda: teachers(frames.windows.gather(batch)), 5) / len(batch)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "shape": shape.__dict__, "batch_frames": options.batch, "precision": precision,
                              "matmul_gflops": matmul_rate(dtype, CPU, product) / 1e9,
                              "ten_teachers_forward_frames_per_s": 1 / forward}
    student = Ensemble(shape, [0])
    with tempfile.TemporaryDirectory() as folder:
        for form in ("dense", "compact", "sparse"):
            start = time.perf_counter()
            extract(teachers, frames, Path(folder) / form, record, seed=0, device=CPU, form=form, bytes_per_frame=options.bytes_per_frame,
                    precision=precision)
            extraction_s = time.perf_counter() - start
            store = SoftTargetStore(Path(folder) / form, frames, record, CPU)
            with precision_context(precision, CPU):
                step_s = seconds(lambda store=store: student_step(student, frames, store, batch), 7)
                read_s = seconds(lambda store=store: store.batch(batch), 20)
            result[form] = {"bytes_per_frame": store.bytes_per_frame, "extraction_frames_per_s": options.frames / extraction_s,
                            "extraction_share_of_forward_rate": forward * options.frames / extraction_s, "read_ms": 1e3 * read_s,
                            "student_step_ms": 1e3 * step_s, "read_share_of_step": read_s / step_s}
    return result


def student_step(student: Ensemble, frames: FrameData, soft_targets: SoftTargets, batch: Tensor) -> None:
    """Windows, forward, loss and backward pass of one batch."""
    logits = student(frames.windows.gather(batch))[0]
    distillation_loss(logits, soft_targets.batch(batch), frames.targets[batch].long(), temperature=2.0).backward()
    student.zero_grad()


def compare_forms(teachers: Teachers, data: FrameData, dev: FrameData, shape: ModelShape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One student per temperature, form and seed."""
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for temperature in options.temperatures:
            record = SoftTargetRecord(temperature, "arithmetic", shape.num_states, "t", "f", "s")
            dense = stored(teachers, data, Path(scratch) / "dense", record, "dense", options.bytes_per_frame)
            for form in options.forms:
                targets: SoftTargets = dense
                if form == "truncated":
                    targets = Truncated(dense, options.bytes_per_frame)
                elif form != "dense":
                    targets = stored(teachers, data, Path(scratch) / f"{form}{temperature}", record, form, options.bytes_per_frame)
                accuracies = [student_accuracy(data, dev, shape, targets, seed, options) for seed in options.seeds]
                rows.append({"temperature": temperature, "form": form, "bytes_per_frame": dense.bytes_per_frame if form == "dense" else options.bytes_per_frame,
                             "frame_accuracy": accuracies, **noise(dense, targets, shape.num_states)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(Path(scratch) / "dense")  # over 14,000 states the largest
    return rows


def stored(teachers: Teachers, frames: NumberedFrames, folder: Path, record: SoftTargetRecord, form: Any, bytes_per_frame: int) -> SoftTargetStore:
    extract(teachers, frames, folder, record, seed=0, device=CPU, form=form, bytes_per_frame=bytes_per_frame)
    return SoftTargetStore(folder, frames, record, CPU)


def noise(dense: SoftTargets, other: SoftTargets, num_states: int) -> dict[str, float]:
    """Mean squared distance per frame to the dense targets, and of the mean over 2000 frames (what stays when frames are averaged: bias)."""
    batch = torch.arange(2000)
    reference, found = dense.batch(batch), other.batch(batch)
    assert isinstance(reference, Tensor)
    error = (found.dense(num_states) if isinstance(found, SparseTargets) else found) - reference
    return {"squared_error": float(error.square().sum(1).mean()), "squared_error_of_mean": float(error.mean(0).square().sum())}


def student_accuracy(data: FrameData, dev: FrameData, shape: ModelShape, soft_targets: SoftTargets | None, seed: int,
                     options: argparse.Namespace) -> float:
    """Frame accuracy on `dev` after training as long as the options say."""
    settings = TrainingSettings(ScheduleSettings(options.learning_rate, options.epochs, halve_below=-1.0), options.batch, evaluations_per_epoch=1,
                                heldout_frames=options.dev_frames, precision=options.precision)
    student = Ensemble(shape, [seed])
    student.set_input_statistics(*input_statistics(data, options.num_features, 0))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        return train(student, data, dev, folder, settings, seed=seed, soft_targets=soft_targets).curves[-1]["heldout_accuracy"][0]


def simulation(options: argparse.Namespace) -> dict[str, Any]:
    """Students of exact posteriors over many simulated states."""
    generator = torch.Generator().manual_seed(0)
    teacher = MixtureTeacher(options.states, options.states // 100, options.num_features, options.group_scale, options.state_scale, generator)
    data, dev = (teacher.sample(num_frames, generator) for num_frames in (options.frames, options.dev_frames))
    shape = ModelShape(options.num_features, options.hidden_layers, options.hidden_units, options.states)
    best = torch.cat([teacher(part)[0].argmax(1) for part in dev.windows.gather(torch.arange(dev.num_frames)).split(500)])
    return {"teacher_frame_accuracy": float((best == dev.targets).float().mean()), "shape": shape.__dict__, "frames": data.num_frames, "epochs": options.epochs,
            "students": compare_forms(teacher, data, dev, shape, options)}


def corpus(options: argparse.Namespace) -> dict[str, Any]:
    """Students of a few small teachers on real features and alignments."""
    features, targets = FrameStore(options.features), FrameStore(options.targets)
    dev_features, dev_targets = FrameStore(options.dev_features), FrameStore(options.dev_targets)
    data = load_frame_data(features, targets, first_utterances(targets, options.frames), 20, 5, CPU)
    dev = load_frame_data(dev_features, dev_targets, first_utterances(dev_targets, options.dev_frames), 20, 5, CPU)
    num_states = int(targets.frames.max()) + 1
    if options.states:
        places = [contexts_of(store, frames.utt_ids) for store, frames in ((targets, data), (dev_targets, dev))]
        data, dev = (replace(frames, targets=own) for frames, own in zip((data, dev), divided(*places, num_states, options.states), strict=True))
        num_states = options.states
    shape = ModelShape(1040, options.hidden_layers, options.hidden_units, num_states, 0.1)
    teachers = Ensemble(shape, range(1000, 1000 + options.teachers))
    teachers.set_input_statistics(*input_statistics(data, options.num_features, 0))
    settings = TrainingSettings(ScheduleSettings(options.learning_rate, options.teacher_epochs, halve_below=-1.0), options.batch, evaluations_per_epoch=1,
                                heldout_frames=options.dev_frames, precision=options.precision)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        members = train(teachers, data, dev, folder, settings, seed=1000).curves[-1]["heldout_accuracy"]
    control = student_accuracy(data, dev, shape, None, options.seeds[0], options)
    return {"teachers_frame_accuracy": members, "hard_targets_frame_accuracy": control, "shape": shape.__dict__, "frames": data.num_frames,
            "dev_frames": dev.num_frames, "epochs": options.epochs, "students": compare_forms(teachers, data, dev, shape, options)}


def contexts_of(targets: FrameStore, utt_ids: Sequence[str]) -> NDArray[np.int32]:
    """State, left phone and right phone of every frame of these utterances, (N, 3); beyond the first and last phone is phone 0."""
    segments, parts = FrameStore(targets.folder / SEGMENTS), []
    for utt_id in utt_ids:
        states, phones = targets[utt_id], segments[utt_id][:, 0]
        # every phone is passed through state by state; the states of silence are one
        place = np.repeat(np.arange(len(phones)), np.where(phones == SIL, 1, STATES_PER_PHONE))[np.cumsum(np.diff(states, prepend=states[0]) != 0)]
        around = np.pad(phones, 1)
        parts.append(np.stack([states, around[place], around[place + 2]], 1))
    return np.concatenate(parts)


def divided(train: NDArray[np.int32], dev: NDArray[np.int32], num_states: int, num_wanted: int) -> tuple[Tensor, Tensor]:
    """States by context, (N,) and (N',): the most frequent contexts of the training frames are states of their own, up to `num_wanted` in all."""
    contexts, number, counts = np.unique(train, axis=0, return_inverse=True, return_counts=True)
    chosen = np.argsort(-counts, kind="stable")[:num_wanted - num_states]
    own = contexts[:, 0].copy()
    own[chosen] = num_states + np.arange(len(chosen))
    name = {tuple(context): state for context, state in zip(contexts.tolist(), own.tolist(), strict=True)}
    of_dev = [name.get(tuple(context), context[0]) for context in dev.tolist()]
    return torch.from_numpy(own[number.reshape(-1)]), torch.tensor(of_dev, dtype=torch.int32)


def first_utterances(store: FrameStore, num_frames: int) -> list[str]:
    """Every n-th utterance of a store, so that about `num_frames` frames of all its speakers are taken."""
    step = max(1, int(store.offsets[-1]) // num_frames)
    return store.utt_ids[::step]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(required=True)
    defaults: dict[str, dict[str, Any]] = {
        "speed": {"run": speed, "states": 1200, "hidden_layers": 4, "hidden_units": 512, "batch": 1024, "frames": 100_000,
                  "bytes_per_frame": 128, "precision": "auto"},
        "simulation": {"run": simulation, "states": 14_000, "num_features": 24, "group_scale": 0.9, "state_scale": 0.7, "frames": 200_000, "dev_frames": 20_000,
                       "hidden_layers": 2, "hidden_units": 128, "epochs": 3.0, "batch": 256, "learning_rate": 2e-3, "bytes_per_frame": 128,
                       "precision": "auto"},
        "corpus": {"run": corpus, "num_features": 40, "frames": 500_000, "dev_frames": 100_000, "teachers": 3,
                   "hidden_layers": 2, "hidden_units": 256, "teacher_epochs": 3.0, "states": 0,
                   "epochs": 5.0, "batch": 512, "learning_rate": 1e-3, "bytes_per_frame": 128, "precision": "auto"},
    }
    for name, values in defaults.items():
        mode = modes.add_parser(name)
        mode.set_defaults(run=values.pop("run"))
        for option, value in values.items():
            mode.add_argument(f"--{option}", type=type(value), default=value)
        mode.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 5.0])
        mode.add_argument("--forms", nargs="+", default=["dense", "compact", "sparse", "truncated"])
        mode.add_argument("--seeds", type=int, nargs="+", default=[0])
        mode.add_argument("--scratch", type=Path, default=None)
        for option in ("features", "targets", "dev_features", "dev_targets") if name == "corpus" else ():
            mode.add_argument(f"--{option}", type=Path, required=True)
    options = parser.parse_args(arguments)
    show(options.run(options))


if __name__ == "__main__":
    main()
