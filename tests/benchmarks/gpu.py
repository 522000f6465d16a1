"""The paper's network (8 x 2560, 14,000 states) on one GPU: `python -m tests.benchmarks gpu`, at most 8 minutes, no network access.

Students with sparse and with compact soft targets, ten teachers trained together, extraction by the ten; then the same at the size of mini.yaml. Each
stands beside the matrix products of the same step alone, measured in the same process. The measured steps run with
`torch.cuda.set_sync_debug_mode("error")`: one that waits for the device fails. After them a pass of EM and one of Viterbi over made-up speech.
What fails is shown, and the rest is measured all the same. Without a GPU nothing is measured; `--device cpu --tiny` runs every path at a size that means
nothing. `--recipe` runs the whole demo on the device afterwards, with 8 minutes of synthetic speech (it needs espeakng-loader): nothing is measured but
that every stage works there. `--recipe HPARAMS --key value ...` runs that recipe instead, mini.yaml for example with its data, and tells its minutes,
stage by stage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asr_kd.ensemble import Ensemble
from asr_kd.frame_data import FrameData
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.aligner import GmmHmm, align_with
from asr_kd.hmm.corpus import Graphs
from asr_kd.hmm.em import expect
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.gmm import GaussianMixtures
from asr_kd.hmm.model import untied_model
from asr_kd.lexicon import Lexicon
from asr_kd.losses import _working_kernels
from asr_kd.model import ModelShape
from asr_kd.precision import precision_context
from asr_kd.soft_targets import SoftTargetRecord, extract
from asr_kd.stage import read_json
from tests.benchmarks.measure import machine, made_up_frames, now, products_s, show, step_operations
from tests.benchmarks.training import soft_target_store, trainer_step

SIZES = {"paper": ModelShape(1040, 8, 2560, 14_000, 0.1), "mini": ModelShape(1040, 4, 512, 1200, 0.1), "tiny": ModelShape(1040, 2, 32, 64, 0.1)}
BUDGET_S = 400.0  # a measurement that begins before may take a minute more


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise when anything inside waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_s(step: Callable[[], None], device: torch.device, duration_s: float) -> float:
    """Mean seconds per step over a stretch of steps that never waits for the device."""
    for _ in range(3):
        step()
    start = now(device)
    step()
    count = max(2, round(duration_s / max(1e-4, now(device) - start)))
    start = now(device)
    with no_waiting(device):
        for _ in range(count):
            step()
    return (now(device) - start) / count


def training(name: str, shape: ModelShape, members: int, batch: int, data: FrameData, folder: Path, duration_s: float, form: str | None) -> dict[str, Any]:
    """Rate of training, with a form of soft targets (and then, as in the recipes, without dropout) or with hard ones."""
    device = data.device
    fused = _working_kernels(device) is not None
    if device.type == "cuda" and not fused:
        raise RuntimeError("the Triton kernels of the losses do not work here (see the warning above); install a C compiler and Python's headers")
    soft_targets = None if form is None else soft_target_store(folder / f"soft-{name}", data, shape, form, "bf16")
    peak_gb(device)  # from here on
    trained = shape if form is None else replace(shape, dropout=0.0)
    step = trainer_step(Ensemble(trained, range(members)).to(device), data, soft_targets, "bf16", batch, folder)
    with precision_context("bf16", device):
        seconds = step_s(step, device, duration_s)
        peak = peak_gb(device)
        del step
        limit_s = products_s(shape, members, batch, "bf16", device)
    operations = step_operations(shape, members, batch)
    figures = {"what": name, "members": members, "batch_frames": batch, "model_frames_per_s": members * batch / seconds,
               "tflops": operations / seconds / 1e12, "limit_tflops": operations / limit_s / 1e12, "share_of_limit": limit_s / seconds}
    return figures | {"fused_loss": fused} | peak


def extraction(name: str, shape: ModelShape, members: int, data: FrameData, folder: Path, form: str) -> dict[str, Any]:
    """Rate at which the teachers' soft targets are written, beside their forward products."""
    device, record = data.device, SoftTargetRecord(2.0, "arithmetic", shape.num_states, "t", "f", "s")
    teachers = Ensemble(shape, range(members)).to(device)
    for turn in ("first", "second"):  # memory is asked for in the first
        start = now(device)
        extract(teachers, data, folder / f"extracted-{turn}-{name}", record, seed=0, device=device, form=form, precision="bf16")  # type: ignore[arg-type]
        seconds = (now(device) - start) / data.num_frames
    with precision_context("bf16", device):
        limit_s = products_s(shape, members, 4096, "bf16", device, backward=False) / 4096
    figures = {"what": name, "members": members, "frames_per_s": 1 / seconds, "limit_frames_per_s": 1 / limit_s, "share_of_limit": limit_s / seconds}
    return figures | peak_gb(device)


def measurements(size: str, members: int, batch: int, frames: int, duration_s: float, device: torch.device,
                 folder: Path) -> list[Callable[[], dict[str, Any]]]:
    """Everything that is measured at a size."""
    shape = SIZES[size]
    data = made_up_frames(folder, shape, frames, device)
    return [lambda: training(f"{size} student, sparse targets", shape, 1, batch, data, folder, duration_s, "sparse"),
            lambda: training(f"{size} student, compact targets", shape, 1, batch, data, folder, duration_s, "compact"),
            lambda: training(f"{size} teachers", shape, members, batch, data, folder, duration_s, None),
            lambda: extraction(f"{size} extraction, sparse", shape, members, data, folder, "sparse")]


def alignment(hours: float, gaussians_per_state: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """Hours of speech per second in a pass of EM and in one of Viterbi with Gaussian mixtures of 120 states, utterances of 12 s and 30 words."""
    rng = np.random.default_rng(0)
    phones = ("SIL", *(f"P{number}" for number in range(39)))
    lexicon = Lexicon({f"W{word}": (tuple(rng.choice(phones[1:], 5).tolist()),) for word in range(200)})
    with FrameWriter(folder / "features", (40,), np.float16) as writer:
        for number in range(max(2, round(hours * 300))):
            writer.append(f"u{number}", rng.standard_normal((1200, 40)).astype(np.float16))
    store = joined(FrameStore(folder / "features"))
    words = {f"u{number}": tuple(rng.choice(list(lexicon), 30).tolist()) for number in range(max(2, round(hours * 300)))}
    hmm, size = untied_model(phones), gaussians_per_state
    means = torch.randn(hmm.num_states * size, 39, generator=torch.Generator().manual_seed(0))
    mixtures = GaussianMixtures(torch.full((len(means),), 1 / size), means, torch.ones_like(means), np.arange(0, len(means) + 1, size))
    model, graphs = GmmHmm(hmm, mixtures), Graphs(words, lexicon, phones)
    frontend = Frontend.of(store, dict.fromkeys(words, "s"), list(words), device)
    seconds = {}
    with precision_context("fp32", device):
        for name in ("first", "viterbi"):  # the first time graphs are built as well
            start = now(device)
            found = align_with(model, frontend, graphs, list(words))
            seconds[name] = now(device) - start
        start = now(device)
        expect(model, frontend, {utt_id: own.codes for utt_id, own in found.items() if own is not None})
        seconds["em"] = now(device) - start
    return {"what": "alignment", "states": hmm.num_states, "gaussians": len(means), "hours": len(words) / 300,
            **{f"{name}_hours_per_s": len(words) / 300 / seconds[name] for name in ("viterbi", "em")}} | peak_gb(device)


def recipe(device: torch.device, hparams: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Minutes that a recipe takes on the device, whole and by stage; the demo ("") at a small size."""
    from asr_kd.experiment import DEMO_HPARAMS, run  # the decoder's libraries, which nothing else here needs

    start = time.monotonic()
    small = ["--synthetic_minutes", "{train: 8, test: 2}", "--num_teachers", "3", "--num_states", "180"]
    with tempfile.TemporaryDirectory() as folder:
        run(hparams or DEMO_HPARAMS, ["--output_folder", folder, "--device", str(device), *(overrides if hparams else small)])
        stages = read_json(Path(folder) / "results.json")["stages"]
    return {"what": hparams or "the demo with 8 minutes of speech", "minutes": (time.monotonic() - start) / 60, "stages_s": stages}


def peak_gb(device: torch.device) -> dict[str, float]:
    """Peak of the GPU's memory since it was last asked for."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_gb": peak}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="run every path at a size that means nothing")
    parser.add_argument("--recipe", nargs="?", const="", metavar="HPARAMS", help="run a recipe on the device as well, a small demo by default")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--duration_s", type=float, default=15.0, help="of each measurement")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not options.recipe:
        parser.error(f"unknown argument {overrides[0]!r}; settings belong to --recipe HPARAMS")
    if options.device == "cuda" and not torch.cuda.is_available():
        show({"gpu": "not measured: torch finds no CUDA device"})
        return
    device = torch.device(options.device)
    batch, frames, duration_s = (64, 2400, 0.01) if options.tiny else (options.batch, 240_000, options.duration_s)
    show(machine(device))
    start, failed = time.monotonic(), 0
    for size in ("tiny",) if options.tiny else ("paper", "mini"):
        with tempfile.TemporaryDirectory() as folder:
            for measurement in measurements(size, options.members, batch, frames, duration_s, device, Path(folder)):
                failed += shown(measurement, start)
    with tempfile.TemporaryDirectory() as folder:
        failed += shown(lambda: alignment(*((0.005, 2) if options.tiny else (4.0, 64)), device, Path(folder)), start)
    if options.recipe is not None:
        failed += shown(lambda: recipe(device, options.recipe, overrides), None)
    if failed:
        sys.exit(1)


def shown(measurement: Callable[[], dict[str, Any]], start: float | None) -> bool:
    """Show what a measurement found, or how it failed, unless the time since `start` is over; tell whether it failed."""
    if start is not None and time.monotonic() - start > BUDGET_S:
        show({"what": f"not measured, {BUDGET_S:g} s are over"})
        return False
    try:
        show(measurement())
    except Exception as error:  # the others are measured all the same
        traceback.print_exc()
        show({"error": repr(error)})
        return True
    return False


if __name__ == "__main__":
    main()
