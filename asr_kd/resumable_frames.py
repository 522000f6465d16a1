"""Write a frame store of known layout in chunks, so that a run that is cut off goes on after its last whole chunk."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import DTypeLike, NDArray

from asr_kd.errors import AsrKdError
from asr_kd.frames import FRAMES, INDEX
from asr_kd.stage import fingerprint, read_json, write_json

PROGRESS = "progress.json"
CHUNK_FRAMES = 16384
SYNC_S = 10.0  # a chunk takes a GPU milliseconds, a disk tens of them to be sure of it


class ResumableFrameWriter:
    """Write the frames of a fixed list of utterances; `asr_kd.frames.FrameStore` reads the folder after `finish`.

    for start, end in writer.chunks_left(): writer.append(frames of start..end-1)
    writer.finish()

    Chunks are forced to the disk and noted as done every `SYNC_S` seconds, and the last one when `append` returns; what was not noted is done
    again after a kill. Chunks hold whole utterances, 16384 frames or a little more.

    Args:
        folder: created if missing. What a run of the same arguments left there is continued, anything else is written anew.
        utt_ids: in the order in which the frames come.
        offsets: (U + 1,) first frame number of each utterance.
        frame_width: values per frame.
        attributes: JSON-able notes kept in the index.

    Raises:
        AsrKdError: duplicate utterance id, or the disk is full or too small for all frames.
    """

    def __init__(self, folder: Path | str, utt_ids: Sequence[str], offsets: NDArray[np.int64], frame_width: int, dtype: DTypeLike,
                 attributes: dict[str, object]) -> None:
        self.folder, self.attributes, self.frame_width, self.dtype = Path(folder), attributes, frame_width, np.dtype(dtype)
        self.utt_ids, self.lengths = list(utt_ids), [int(length) for length in np.diff(offsets)]
        self.ends = chunk_ends(offsets)
        self.done = 0
        self._noted = time.monotonic()
        self._part = self.folder / f".{FRAMES}.part-0"
        self._layout = fingerprint([attributes, self.utt_ids, self.lengths, frame_width, self.dtype.str])
        self._header = _npy_header((int(offsets[-1]), frame_width), self.dtype)
        if len(set(self.utt_ids)) < len(self.utt_ids):
            twice = next(utt_id for u, utt_id in enumerate(self.utt_ids) if utt_id in self.utt_ids[:u])
            raise AsrKdError(f"{twice}: listed twice for {self.folder}; utterance ids must be unique across the splits read together")
        self._guard(self._start)

    @property
    def frames_done(self) -> int:
        """Frames that need not be written any more."""
        return int(self.ends[self.done - 1]) if self.done else 0

    def chunks_left(self) -> list[tuple[int, int]]:
        """First frame number and one past the last of each chunk that is still to be written, in order."""
        starts = [0, *self.ends][:len(self.ends)]  # a process without an utterance has no chunk
        return list(zip(starts[self.done:], self.ends[self.done:], strict=True))

    def append(self, frames: NDArray[np.generic]) -> None:
        """Write the next chunk, (n, frame_width)."""
        expected = (self.ends[self.done] - self.frames_done, self.frame_width)
        if frames.shape != expected or frames.dtype != self.dtype:
            raise ValueError(f"chunk {self.done}: {frames.dtype} {frames.shape}, expected {self.dtype} {expected}")
        self._guard(lambda: self._write(frames))

    def finish(self) -> None:
        """Make the store readable."""
        if self.done < len(self.ends):
            raise ValueError(f"{self.folder}: {self.done} of {len(self.ends)} chunks were written")
        self._guard(self._publish)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / PROGRESS).is_file():
            noted = read_json(self.folder / PROGRESS)
            is_whole = noted["chunks"] == len(self.ends) and (self.folder / FRAMES).is_file()
            if noted["layout"] == self._layout and (self._part.is_file() or is_whole):
                self.done = noted["chunks"]
                return
        needed, free = len(self._header) + sum(self.lengths) * self._frame_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise AsrKdError(f"{self.folder}: {needed / 1e9:.2f} GB to be written, {free / 1e9:.2f} GB free; free space or choose another output_folder")
        (self.folder / INDEX).unlink(missing_ok=True)
        self._part.write_bytes(self._header)
        self._note()

    @property
    def _frame_bytes(self) -> int:
        return self.frame_width * self.dtype.itemsize

    def _write(self, frames: NDArray[np.generic]) -> None:
        with open(self._part, "rb+") as file:
            file.seek(len(self._header) + self.frames_done * self._frame_bytes)  # what a kill left half-written behind it is overwritten
            file.write(frames.tobytes())
            self.done += 1
            if self.done < len(self.ends) and time.monotonic() - self._noted < SYNC_S:
                return
            file.flush()
            os.fsync(file.fileno())
        self._note()

    def _note(self) -> None:
        write_json(self.folder / PROGRESS, {"layout": self._layout, "chunks": self.done})
        self._noted = time.monotonic()

    def _publish(self) -> None:
        if self._part.is_file():  # it is not where an earlier run came so far
            os.replace(self._part, self.folder / FRAMES)
        write_json(self.folder / INDEX, {"utt_ids": self.utt_ids, "lengths": self.lengths, "attributes": self.attributes})

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise AsrKdError(f"{self.folder}: could not be written ({error.strerror or error}); free space or choose another output_folder") from error


def chunk_ends(offsets: NDArray[np.int64]) -> list[int]:
    """One past the last frame number of each chunk: the first utterance end at or after every 16384 frames, and the last.

    >>> chunk_ends(np.array([0, 10_000, 20_000, 60_000, 70_000]))
    [20000, 60000, 70000]
    """
    ends: list[int] = []
    start = 0
    for end in offsets[1:].tolist():
        if end - start >= CHUNK_FRAMES:
            ends.append(end)
            start = end
    return ends if start == offsets[-1] else [*ends, int(offsets[-1])]


def _npy_header(shape: tuple[int, int], dtype: np.dtype[np.generic]) -> bytes:
    header = io.BytesIO()
    npy_format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()
