"""Audio of any length in bounded memory: cut at quiet places into segments that are decoded one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from asr_kd.audio import audio_duration_s, resample
from asr_kd.errors import AsrKdError

MAX_SEGMENT_S = 40.0
"""Longer audio is cut; LibriSpeech's utterances are shorter than this."""
MIN_SEGMENT_S = 15.0
QUIET_S = 0.2
_STEP_S = 0.01
_BLOCK_S = 10.0

log = logging.getLogger(__name__)


def read_segments(path: Path | str, sample_rate: int = 16000) -> Iterator[NDArray[np.float32]]:
    """Yield the audio of a file in order, mono, resampled, (N,) each; a file of up to `MAX_SEGMENT_S` is one segment.

    Longer files are cut, between `MIN_SEGMENT_S` and `MAX_SEGMENT_S` after the last cut, in the middle of the `QUIET_S`
    with the least energy. At most a segment and a block of `_BLOCK_S` are in memory.

    Raises:
        AsrKdError: the file is missing, unreadable, below `asr_kd.audio.MIN_SAMPLE_RATE`, holds no samples, or NaN.
    """
    audio_duration_s(path)  # says what is wrong with a file that cannot be opened
    try:
        with soundfile.SoundFile(path) as file:
            for segment in _cut(_blocks(path, file), file.samplerate):
                yield resample(segment, file.samplerate, sample_rate)
    except (OSError, soundfile.SoundFileError) as error:
        reason = str(error).split(": ", 1)[-1].rstrip(". ")
        raise AsrKdError(f"{path}: not readable as audio to its end ({reason}); replace the file") from error


def tell_low_rate(path: Path | str, sample_rate: int) -> None:
    """Warn where a file holds less than the model has learnt to hear."""
    rate = soundfile.info(str(path)).samplerate
    if rate < sample_rate:
        log.warning("%s: %d Hz, the model was trained at %d Hz; expect more errors", path, rate, sample_rate)


def _blocks(path: Path | str, file: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    while len(channels := file.read(int(_BLOCK_S * file.samplerate), dtype="float32", always_2d=True)):  # (N, channels)
        if not np.isfinite(channels).all():
            raise AsrKdError(f"{path}: NaN or infinity among the samples; replace the file")
        yield channels.mean(axis=1, dtype=np.float32)


def _cut(blocks: Iterator[NDArray[np.float32]], rate: int) -> Iterator[NDArray[np.float32]]:
    earliest, latest = int(MIN_SEGMENT_S * rate), int(MAX_SEGMENT_S * rate)
    waiting = np.zeros(0, np.float32)
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        while len(waiting) > latest:
            end = earliest + quietest_sample(waiting[earliest:latest], rate)
            yield waiting[:end]
            waiting = waiting[end:]
    if len(waiting):
        yield waiting


def quietest_sample(samples: NDArray[np.float32], rate: int) -> int:
    """Middle of the `QUIET_S` with the least energy in (N,) samples; the first such if several are equal."""
    step = max(1, int(_STEP_S * rate))
    width = max(1, round(QUIET_S / _STEP_S))
    energies = np.square(samples[:len(samples) // step * step].reshape(-1, step), dtype=np.float64).sum(1)  # (N / step,)
    sums = np.convolve(energies, np.ones(width), mode="valid")
    return int((np.argmin(sums) + width / 2) * step)
