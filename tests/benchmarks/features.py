"""How fast features are: filterbanks beside torchaudio's and (where installed) kaldi-native-fbank's, a whole split from audio to store, windows per second.

    python -m tests.benchmarks features SPLIT --data_folder DATA_FOLDER

Times are of one thread's CPU clock, so that other work on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from asr_kd.audio import read_audio
from asr_kd.features import BATCH_UTTERANCES, Windows, extract_features, fbank
from asr_kd.frames import FrameStore
from asr_kd.manifest import load_split
from tests.benchmarks.measure import show


def best_cpu_s(*works: Callable[[], object], repeats: int = 12) -> list[float]:
    """Least CPU time of each of several things, done in turn so that a slow minute of the machine slows all of them, after one to warm up."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for own, work in zip(times, works, strict=True):
            start = time.process_time()
            work()
            own.append(time.process_time() - start)
    return [min(own[1:]) for own in times]


def native_fbank(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kaldi's own C++ filterbank, as kaldi-native-fbank wraps it: (N,) -> (T, 40)."""
    native: Any = importlib.import_module("kaldi_native_fbank")
    settings = native.FbankOptions()
    settings.frame_opts.dither, settings.mel_opts.num_bins = 0.0, 40
    computer = native.OnlineFbank(settings)
    computer.accept_waveform(16000, waveform)
    computer.input_finished()
    return np.stack([computer.get_frame(t) for t in range(computer.num_frames_ready)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split")
    parser.add_argument("--data_folder", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    utterances, _ = load_split(options.split, options.data_folder)
    waveforms = [read_audio(utterance.wav) for utterance in utterances[:64]]
    batches = [waveforms[start:start + BATCH_UTTERANCES] for start in range(0, len(waveforms), BATCH_UTTERANCES)]
    has_native = importlib.util.find_spec("kaldi_native_fbank") is not None
    ours_s, theirs_s, *native_s = best_cpu_s(
        lambda: [fbank(batch) for batch in batches],
        lambda: [torchaudio.compliance.kaldi.fbank(torch.from_numpy(waveform)[None], num_mel_bins=40) for waveform in waveforms],
        *([lambda: [native_fbank(waveform) for waveform in waveforms]] if has_native else []))
    figures: dict[str, float] = {"fbank_times_real_time": sum(map(len, waveforms)) / 16000 / ours_s, "faster_than_torchaudio": theirs_s / ours_s}
    if has_native:
        figures["faster_than_kaldi_native_fbank"] = native_s[0] / ours_s
        pairs = [(native_fbank(waveform), ours.numpy()) for waveform, ours in zip(waveforms[:BATCH_UTTERANCES], fbank(batches[0]), strict=True)]
        figures["largest_difference_to_kaldi_native_fbank"] = max(float(np.abs(native - ours).max()) for native, ours in pairs)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.monotonic(), time.process_time()
        extract_features(utterances, Path(folder), num_jobs=1)
        figures |= {"split_hours": sum(u.duration_s for u in utterances) / 3600, "split_wall_s": time.monotonic() - wall,
                    "split_cpu_s": time.process_time() - cpu}
        store = FrameStore(folder)
        for dtype in (torch.float16, torch.float32):
            windows = Windows(store, dtype=dtype)
            frame_indices = torch.randint(windows.num_frames, (16, 512), generator=torch.Generator().manual_seed(0))
            (gather_s,) = best_cpu_s(lambda windows=windows, frame_indices=frame_indices: [windows.gather(batch) for batch in frame_indices])
            figures[f"windows_per_s_{dtype}"] = frame_indices.numel() / gather_s
    figures["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    show(figures)


if __name__ == "__main__":
    main()
