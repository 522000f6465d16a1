"""From espeak's clean speech to a recording: resampling, the colour of a channel, background noise. No operation delays the speech."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Waveform = NDArray[np.float64]
Pcm = NDArray[np.int16]

SAMPLE_RATE = 16000
NOISES = ("white", "pink", "babble")
SNR_SPREAD_DB = 2.0  # of one speaker's utterances
PEAK = 0.6


def resample(samples: Waveform | Pcm, rate: int, new_rate: int = SAMPLE_RATE) -> Waveform:
    """Band-limited resampling by the Fourier transform, (N,) -> (round(N * new_rate / rate),).

    The signal is taken as periodic, so it should begin and end in silence.
    """
    divisor = int(np.gcd(rate, new_rate))
    up, down = new_rate // divisor, rate // divisor
    blocks = _fast_size(-(-samples.size // down), 64)  # whole blocks: the ratio of the two lengths is then exact
    spectrum = np.fft.rfft(np.pad(samples.astype(np.float64), (0, blocks * down - samples.size)))
    new_size = blocks * up
    resized = np.zeros(new_size // 2 + 1, complex)
    kept = min(spectrum.size, resized.size)
    resized[:kept] = spectrum[:kept]
    return np.fft.irfft(resized, new_size)[: round(samples.size * new_rate / rate)] * (up / down)


def _fast_size(size: int, multiple: int) -> int:
    """The least multiple that holds `size`: a transform of a size with large prime factors is many times slower."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Room:
    """Where a speaker is recorded: the colour of the channel, the noise, and how loud it is."""

    tilt_db: float
    bump_db: float
    bump_at: float  # 1 is half the sampling rate
    corner_hz: float
    noise: str
    snr_db: float

    @staticmethod
    def draw(snr_db: tuple[float, float], rng: np.random.Generator, colour_db: float = 4.0) -> Room:
        """A random room with up to `colour_db` of tilt and bump, and a ratio of speech to noise between the two of `snr_db`."""
        tilt_db, bump_db = rng.uniform(-colour_db, colour_db, size=2).tolist()
        bump_at, corner_hz, snr = float(rng.uniform(0.05, 0.6)), float(rng.uniform(50, 200)), float(rng.uniform(*snr_db))
        return Room(tilt_db, bump_db, bump_at, corner_hz, NOISES[int(rng.integers(len(NOISES)))], snr)


def colour(samples: Waveform, room: Room) -> Waveform:
    """Filter by the room's smooth response: tilt over the band, bump or dip, high-pass. No phase shift."""
    size = _fast_size(samples.size, 4096)
    frequency = np.linspace(0, 1, size // 2 + 1)  # 1 is half the sampling rate
    bump = room.bump_db * np.exp(-(((frequency - room.bump_at) / 0.15) ** 2))
    corner = room.corner_hz / (SAMPLE_RATE / 2)
    gain = 10 ** ((room.tilt_db * (frequency - 0.5) + bump) / 20) * frequency / np.hypot(frequency, corner)
    return np.fft.irfft(np.fft.rfft(samples, size) * gain, size)[: samples.size]


def noise(kind: str, size: int, babble: Waveform, rng: np.random.Generator) -> Waveform:
    """`size` samples of noise of unit power; babble is cut at a random place from `babble`, which is repeated as need be."""
    if kind == "babble":
        start = int(rng.integers(babble.size))
        drawn = np.take(babble, np.arange(start, start + size), mode="wrap")
    else:
        drawn = rng.standard_normal(_fast_size(size, 4096))
        if kind == "pink":
            frequency = np.arange(drawn.size // 2 + 1) * (SAMPLE_RATE / drawn.size)
            drawn = np.fft.irfft(np.fft.rfft(drawn) / np.sqrt(np.maximum(frequency, 20.0)), drawn.size)
        drawn = drawn[:size]
    return drawn / max(float(np.sqrt(np.mean(drawn**2))), 1e-9)


def record(speech: Waveform, room: Room, babble: Waveform, rng: np.random.Generator) -> Pcm:
    """The speech in `room` with its noise, as 16-bit samples; the ratio (up to `SNR_SPREAD_DB` from the room's) is to the power of the louder half."""
    heard = colour(speech, room)
    frames = heard[: heard.size // 400 * 400].reshape(-1, 400)  # (frames of 25 ms, 400)
    frame_power = (frames**2).mean(1)
    speech_power = float(frame_power[frame_power >= np.median(frame_power)].mean())
    snr_db = room.snr_db + rng.uniform(-SNR_SPREAD_DB, SNR_SPREAD_DB)
    noisy = heard + noise(room.noise, heard.size, babble, rng) * np.sqrt(speech_power / 10 ** (snr_db / 10))
    scaled: Pcm = np.round(noisy * (PEAK * 32767 / np.abs(noisy).max())).astype(np.int16)
    return scaled
