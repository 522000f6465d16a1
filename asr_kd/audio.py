"""Read any audio file that soundfile knows as mono float32 samples at one sample rate."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torchaudio.transforms import Resample

from asr_kd.errors import AsrKdError

MIN_SAMPLE_RATE = 1000
"""Hz; a header with less is damaged."""
UNKNOWN_LENGTH = 2**40
"""Samples; libsndfile gives a number far above this where a header does not say how many there are."""
_UNREADABLE = (OSError, TypeError, ValueError, soundfile.SoundFileError)  # TypeError: headerless audio, .raw


def read_audio(path: Path | str, sample_rate: int = 16000, speed: float = 1.0) -> NDArray[np.float32]:
    """Samples in [-1, 1], (N,), channels averaged, resampled to `sample_rate`.

    Args:
        path: WAV, FLAC, Ogg Vorbis or Opus, ... at any sample rate, mono or not.
        sample_rate: of the result, Hz.
        speed: 0.9 plays slower and deeper (N / 0.9 samples), as `sox speed` and Kaldi's speed perturbation do.

    Raises:
        AsrKdError: the file is missing, unreadable, below `MIN_SAMPLE_RATE`, holds no samples, or NaN.
    """
    try:
        channels, file_rate = soundfile.read(path, dtype="float32", always_2d=True)  # (N, channels)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    _check_header(path, len(channels), file_rate)
    samples: NDArray[np.float32] = channels.mean(axis=1, dtype=np.float32) if channels.shape[1] > 1 else channels[:, 0]  # (N,)
    if not np.isfinite(samples).all():
        raise AsrKdError(f"{path}: NaN or infinity among the samples; replace the file or leave the utterance out")
    return resample(samples, round(file_rate * speed), sample_rate)


def audio_duration_s(path: Path | str) -> float:
    """Duration by the file's header.

    Raises:
        AsrKdError: the file is missing, unreadable, below `MIN_SAMPLE_RATE`, or holds no samples.
    """
    try:
        header = soundfile.info(str(path))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    _check_header(path, header.frames, header.samplerate)
    return float(header.frames / header.samplerate)


def resample(samples: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """Band-limited resampling (windowed sinc), (N,) -> (ceil(N * to_rate / from_rate),).

    A ratio of rates without small factors is replaced by the nearest with a denominator up to 2000, off by at most 2.5 parts in 10^4:
    the kernel of 16001 to 16000 Hz would take a gigabyte.
    """
    ratio = Fraction(from_rate, to_rate).limit_denominator(2000)
    if ratio == 1:
        return np.ascontiguousarray(samples)
    with torch.no_grad():
        resampled = _resampler(ratio.numerator, ratio.denominator)(torch.from_numpy(np.ascontiguousarray(samples)))
    return np.asarray(resampled.numpy(), dtype=np.float32)


@lru_cache(maxsize=16)
def _resampler(from_rate: int, to_rate: int) -> torch.nn.Module:
    """The kernel of a pair of rates is made once."""
    module: torch.nn.Module = Resample(from_rate, to_rate)
    return module


def _check_header(path: Path | str, num_samples: int, sample_rate: int) -> None:
    if num_samples >= UNKNOWN_LENGTH:
        raise AsrKdError(f"{path}: its header does not say how many samples it holds, as when it was written into a pipe; write it anew to a file")
    if num_samples <= 0:
        raise AsrKdError(f"{path}: no samples; replace the file or leave the utterance out")
    if sample_rate < MIN_SAMPLE_RATE:
        raise AsrKdError(f"{path}: sample rate {sample_rate} Hz, expected {MIN_SAMPLE_RATE} Hz or more; replace the file or leave the utterance out")


def _unreadable(path: Path | str, error: Exception) -> AsrKdError:
    if not Path(path).is_file():
        return AsrKdError(f"{path}: no such audio file; check the path")
    try:
        _check_header(path, (header := soundfile.info(str(path))).frames, header.samplerate)
    except AsrKdError as cause:
        return cause
    except _UNREADABLE:
        pass
    reason = str(error).split(": ", 1)[-1].rstrip(". ")
    return AsrKdError(f"{path}: not readable as audio ({reason}); replace the file or leave the utterance out")
