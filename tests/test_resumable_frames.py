"""Frames written in chunks: what is noted, what a kill costs, how much memory it takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from asr_kd import resumable_frames
from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore
from asr_kd.resumable_frames import ResumableFrameWriter


def test_duplicate_utterance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"^b: listed twice"):
        ResumableFrameWriter(tmp_path, ["a", "b", "b"], np.array([0, 1, 2, 3]), 4, "<i2", {})


def test_chunks_that_are_not_yet_noted_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is waited for every few seconds, not for every chunk."""
    clock = [0.0]
    monkeypatch.setattr(resumable_frames.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(resumable_frames, "CHUNK_FRAMES", 2)
    data = np.arange(16, dtype="<i2").reshape(16, 1)

    def writer() -> ResumableFrameWriter:
        return ResumableFrameWriter(tmp_path, list("abcdefgh"), np.arange(0, 17, 2), 1, "<i2", {})

    first = writer()
    for (start, end), seconds in zip(first.chunks_left()[:6], (1.0, 4.0, 11.0, 12.0, 13.0, 14.0), strict=True):
        clock[0] = seconds
        first.append(data[start:end])
    again = writer()  # as after a kill
    assert again.frames_done == 6
    for start, end in again.chunks_left():
        again.append(data[start:end])
    assert writer().chunks_left() == []
    again.finish()
    np.testing.assert_array_equal(FrameStore(tmp_path).frames, data)


def test_a_process_without_an_utterance_has_nothing_to_write(tmp_path: Path) -> None:
    writer = ResumableFrameWriter(tmp_path, [], np.array([0]), 4, "<i2", {})
    assert writer.chunks_left() == []
    writer.finish()
    assert FrameStore(tmp_path).frames.shape == (0, 4)


def test_writing_takes_the_memory_of_one_chunk(tmp_path: Path) -> None:
    """2 chunks or 30 chunks of 2.5 MB, the same peak."""

    def peak_bytes(num_chunks: int) -> int:
        offsets = np.arange(0, 20_000 * num_chunks + 1, 20_000)
        tracemalloc.start()
        writer = ResumableFrameWriter(tmp_path / str(num_chunks), [str(u) for u in range(num_chunks)], offsets, 64, "<i2", {})
        for start, end in writer.chunks_left():
            writer.append(np.zeros((end - start, 64), "<i2"))
        writer.finish()
        FrameStore(tmp_path / str(num_chunks))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert 2_500_000 < peak_bytes(30) < 1.1 * peak_bytes(2)
