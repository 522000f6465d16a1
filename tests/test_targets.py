"""Targets of speed-perturbed copies, against the sound itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.features import extract_features
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.manifest import Utterance
from asr_kd.targets import stretch_targets

RATE = 16000


@pytest.fixture
def tones(tmp_path: Path) -> Utterance:
    """Five tones of 300 ms that rise, so that every frame tells which one sounds."""
    samples = np.concatenate([np.sin(2 * np.pi * f * np.arange(int(0.3 * RATE)) / RATE) for f in (300, 700, 1300, 2400, 4200)])
    soundfile.write(tmp_path / "tones.wav", 0.3 * samples, RATE)
    return Utterance("u", len(samples) / RATE, tmp_path / "tones.wav", "s", ("TONES",))


def loudest_tone(features: np.ndarray) -> np.ndarray:
    """Which of the five tones each frame holds, by its loudest filter, numbered in order of appearance."""
    loudest = features.argmax(1)
    return np.searchsorted(np.sort(np.unique(loudest, return_counts=True)[0][np.unique(loudest, return_counts=True)[1] > 10]), loudest)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_states_follow_the_sound(tones: Utterance, tmp_path: Path, speed: float) -> None:
    for name, factor in (("plain", 1.0), ("copy", speed)):
        extract_features([tones], tmp_path / name, cmvn="none", speed=factor)
    plain, copy = FrameStore(tmp_path / "plain"), FrameStore(tmp_path / "copy")
    prefix = f"sp{speed:g}-"
    with FrameWriter(tmp_path / "targets", (), np.int32) as writer:
        writer.append("u", loudest_tone(np.asarray(plain["u"])))
    stretch_targets(FrameStore(tmp_path / "targets"), copy, prefix, tmp_path / "stretched")
    stretched = np.asarray(FrameStore(tmp_path / "stretched")[prefix + "u"])
    heard = loudest_tone(np.asarray(copy[prefix + "u"]))
    assert len(stretched) == copy.length(prefix + "u")
    # within one frame at each of the four changes
    changes = [np.flatnonzero(np.diff(states)) for states in (stretched, heard)]
    assert len(changes[0]) == len(changes[1]) == 4
    assert np.abs(changes[0] - changes[1]).max() <= 1
