"""Streamed training on a corpus larger than memory: does memory stay flat, does the rate hold? `python -m tests.benchmarks scale`.

Features, state ids and soft targets of a synthetic split of 1,000 hours are sparse files: their bytes are made by the system as they are
read, everything else is as with real ones. The student's rate, part after part, stands beside its rate on a small split in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asr_kd.compact_targets import find_compact_code
from asr_kd.ensemble import Ensemble
from asr_kd.frame_data import StreamedFrames
from asr_kd.frames import FRAMES, INDEX, FrameStore
from asr_kd.model import ModelShape
from asr_kd.precision import precision_context
from asr_kd.schedule import ScheduleSettings
from asr_kd.soft_targets import COMPACT_CODE, SoftTargetRecord, SoftTargetStore
from asr_kd.stage import write_json
from asr_kd.training import TrainingSettings, _Trainer
from tests.benchmarks.measure import UTTERANCE_FRAMES, best_s, machine, made_up_frames, products_s, show
from tests.benchmarks.training import soft_target_store, trainer_step

RECORD = SoftTargetRecord(2.0, "arithmetic", 1200, "t", "f", "s")
CPU = torch.device("cpu")


def sparse_store(folder: Path, utterances: int, frame_shape: tuple[int, ...], dtype: str, attributes: dict[str, object]) -> FrameStore:
    """A frame store of zeros that takes no room on the disk."""
    folder.mkdir()
    np.lib.format.open_memmap(folder / FRAMES, "w+", dtype, (utterances * UTTERANCE_FRAMES, *frame_shape))
    write_json(folder / INDEX, {"utt_ids": [f"u{u}" for u in range(utterances)], "lengths": [UTTERANCE_FRAMES] * utterances, "attributes": attributes})
    return FrameStore(folder)


def memory_gb() -> dict[str, float]:
    """Resident memory of this process: all of it, and what of it is its own rather than pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(lines[key].split()[0]) / 1e6 for name, key in (("resident_gb", "VmRSS"), ("own_gb", "RssAnon"))}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per part of the epoch, after one for the corpus in memory."""
    shape = ModelShape(1040, options.hidden_layers, options.hidden_units, RECORD.num_states, 0.1)
    small = made_up_frames(folder / "small", shape, 200_000, CPU)
    step = trainer_step(Ensemble(shape, [0]), small, soft_target_store(folder / "small_soft", small, shape, "compact", "fp32"), options.precision,
                        options.batch, folder)
    with precision_context(options.precision, CPU):
        in_memory = options.batch / best_s(lambda: [step() for _ in range(10)], CPU, 3) * 10
    limit = options.batch / products_s(shape, 1, options.batch, options.precision, CPU)
    rows: list[dict[str, Any]] = [{"in_memory_frames_per_s": in_memory, "limit_frames_per_s": limit, **memory_gb()}]
    del small

    start, utterances = time.monotonic(), round(options.hours * 360_000 / UTTERANCE_FRAMES)
    attributes: dict[str, object] = {**RECORD.__dict__, "form": "compact"}
    features = sparse_store(folder / "features", utterances, (40,), "<f2", {})
    targets = sparse_store(folder / "targets", utterances, (), "<i4", {})
    sparse_store(folder / "soft", utterances, (64,), "<i2", attributes)
    posteriors = torch.randn(2000, RECORD.num_states, generator=torch.Generator().manual_seed(0)).softmax(1)
    find_compact_code(posteriors, 128, torch.Generator().manual_seed(0)).save(folder / "soft" / COMPACT_CODE)
    data = StreamedFrames(features, targets, features.utt_ids, 20, 5, CPU, part_frames=options.part_frames)
    soft_targets = SoftTargetStore(folder / "soft", data, RECORD, CPU)
    heldout = made_up_frames(folder / "heldout", shape, 2400, CPU, seed=1)
    settings = TrainingSettings(ScheduleSettings(), batch_frames=options.batch, precision=options.precision)
    trainer = _Trainer(Ensemble(shape, [0]), data, heldout, folder, settings, 0, soft_targets)  # type: ignore[arg-type]
    rows.append({"hours": data.num_frames / 360_000, "opened_in_s": time.monotonic() - start, **memory_gb()})
    with precision_context(options.precision, CPU):
        part, begun, frames = None, time.monotonic(), 0
        for batch in trainer._batches():
            if trainer.part is not part:
                if part is not None:
                    seconds = time.monotonic() - begun
                    rows.append({"part": len(rows) - 1, "frames": frames, "frames_per_s": frames / seconds, "over_in_memory": frames / seconds / in_memory,
                                 **memory_gb()})
                if len(rows) > options.parts + 1:
                    break
                part, begun, frames = trainer.part, time.monotonic(), 0
            trainer._step(batch)
            trainer.step += 1
            frames += len(batch)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = (("hidden_layers", 4), ("hidden_units", 512), ("batch", 1024), ("parts", 4), ("part_frames", 2**19))
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--hours", type=float, default=1000.0)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        show([machine(CPU), *measure(options, Path(folder))])


if __name__ == "__main__":
    main()
