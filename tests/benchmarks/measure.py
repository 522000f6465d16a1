"""What the benchmarks share: the machine's own rate of matrix products, times, and how figures are shown."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.features import Windows
from asr_kd.frame_data import FrameData, load_frame_data
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.model import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UTTERANCE_FRAMES = 1200  # LibriSpeech's mean is 12 s


def best_s(work: Callable[[], Any], device: torch.device, repeats: int, calls: int = 1) -> float:
    """Shortest time of one call, after one to warm up: the least disturbed by what else the machine does.

    Args:
        calls: so many in a row are timed together, so that waiting for a GPU does not count.
    """
    work()
    times = []
    for _ in range(repeats):
        start = now(device)
        for _ in range(calls):
            work()
        times.append((now(device) - start) / calls)
    return min(times)


def now(device: torch.device) -> float:
    """Seconds, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def products_s(shape: ModelShape, members: int, batch: int, precision: str, device: torch.device, repeats: int = 5, backward: bool = True) -> float:
    """Seconds of nothing but the matrix products of one step: forward, gradient of the weights, gradient of the inputs but the network's."""
    total, calls = 0.0, 1 if device.type == "cpu" else 20
    for layer, (fan_in, fan_out) in enumerate(shape.layer_dims):
        left = torch.randn(members, batch, fan_in, device=device).to(DTYPES[precision])
        weight = torch.randn(members, fan_in, fan_out, device=device).to(DTYPES[precision])
        total += best_s(lambda left=left, weight=weight: torch.bmm(left, weight), device, repeats, calls)
        if backward:
            gradient = torch.randn(members, batch, fan_out, device=device).to(DTYPES[precision])
            total += best_s(lambda left=left, gradient=gradient: torch.bmm(left.transpose(1, 2), gradient), device, repeats, calls)
            if layer:
                total += best_s(lambda gradient=gradient, weight=weight: torch.bmm(gradient, weight.transpose(1, 2)), device, repeats, calls)
    return total


def step_operations(shape: ModelShape, members: int, batch: int) -> float:
    """Floating-point operations of the products of one step."""
    fan_in, fan_out = shape.layer_dims[0]
    return 2.0 * members * batch * (3 * shape.num_weights - fan_in * fan_out)


def made_up_frames(folder: Path, shape: ModelShape, num_frames: int, device: torch.device, seed: int = 0, num_mels: int = 40) -> FrameData:
    """Noise with random states, stored and read as features and targets are."""
    rng = np.random.default_rng(seed)
    utterances = max(1, num_frames // UTTERANCE_FRAMES)
    with FrameWriter(folder / "features", (num_mels,), np.float16) as features, FrameWriter(folder / "targets", (), np.int32) as targets:
        for u in range(utterances):
            features.append(f"{seed}-{u}", rng.standard_normal((UTTERANCE_FRAMES, num_mels), dtype=np.float32))
            targets.append(f"{seed}-{u}", rng.integers(shape.num_states, size=UTTERANCE_FRAMES))
    context = shape.input_dim // num_mels
    left = 20 * context // 26
    return load_frame_data(FrameStore(folder / "features"), FrameStore(folder / "targets"), [f"{seed}-{u}" for u in range(utterances)], left,
                           context - 1 - left, device)


def random_batches(frames: Windows | FrameData, batch: int, count: int, device: torch.device) -> list[Tensor]:
    """Frame numbers of some batches, on the device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(frames.num_frames, (batch,), generator=generator).to(device) for _ in range(count)]


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on."""
    model = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor())
    flags = next((line for line in _cpu_lines() if line.startswith("flags")), "").split()
    return {"cpu": model, "cpu_flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
            "threads": torch.get_num_threads(), "torch": torch.__version__} | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def show(rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Print figures: as JSON, and as a table first where a person looks."""
    rows = [rows] if isinstance(rows, Mapping) else list(rows)
    if sys.stdout.isatty():
        for row in rows:
            width = max(map(len, row))
            print("\n".join(f"{name:{width}}  {_short(value)}" for name, value in row.items()), end="\n\n")
    for row in rows:
        print(json.dumps({name: _rounded(value) for name, value in row.items()}), flush=True)


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(own) for name, own in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
