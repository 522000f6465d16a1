"""One contiguous array of frames with an utterance index, memory-mapped: features, targets and soft targets are kept so."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import DTypeLike, NDArray

from asr_kd.errors import AsrKdError
from asr_kd.stage import read_json, write_json

INDEX = "index.json"
FRAMES = "frames.npy"


class FrameStore:
    """Read a folder that `FrameWriter` wrote: `store[utt_id]` is that utterance's (T, ...) slice of one memory-mapped array.

    Attributes:
        frames: (N_frames, ...) memory-mapped, read-only.
        utt_ids: utterances in stored order.
        offsets: (U + 1,) int64; utterance u is `frames[offsets[u]:offsets[u + 1]]`.
        attributes: what the writer noted (frame shift, temperature, ...).

    Raises:
        AsrKdError: a file is missing, or index and array disagree.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / INDEX)
        try:
            self.frames: NDArray[np.generic] = np.load(self.folder / FRAMES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise AsrKdError(f"{self.folder / FRAMES}: not readable ({error}); run the stage that writes it again") from error
        try:
            self.utt_ids: list[str] = list(index["utt_ids"])
            self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(index["lengths"], dtype=np.int64)]).astype(np.int64)
            self.attributes: dict[str, object] = dict(index["attributes"])
        except (KeyError, TypeError, ValueError) as error:
            raise AsrKdError(f"{self.folder / INDEX}: not an index of frames ({error}); run the stage that writes it again") from error
        self._position = {utt_id: u for u, utt_id in enumerate(self.utt_ids)}
        if self.offsets[-1] != len(self.frames) or len(self.offsets) != len(self.utt_ids) + 1:
            raise AsrKdError(f"{self.folder}: index of {self.offsets[-1]} frames beside an array of {len(self.frames)}; run the stage that writes it again")

    def __len__(self) -> int:
        return len(self.utt_ids)

    def __contains__(self, utt_id: object) -> bool:
        return utt_id in self._position

    def __iter__(self) -> Iterator[str]:
        return iter(self.utt_ids)

    def __getitem__(self, utt_id: str) -> NDArray[np.generic]:
        start, end = self.span(utt_id)
        return self.frames[start:end]

    def span(self, utt_id: str) -> tuple[int, int]:
        """First frame and one past the last frame of an utterance in `frames`."""
        try:
            u = self._position[utt_id]
        except KeyError:
            raise AsrKdError(f"{utt_id}: not in {self.folder} ({len(self)} utterances); run the stage that writes it again") from None
        return int(self.offsets[u]), int(self.offsets[u + 1])

    def length(self, utt_id: str) -> int:
        """Number of frames of an utterance."""
        start, end = self.span(utt_id)
        return end - start

    def release(self) -> None:
        """Let the system have the memory back that holds what was read; reading it again maps it again."""
        mapped = getattr(self.frames, "_mmap", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


class FrameWriter:
    """Append utterances to a new frame folder; it becomes readable only when the `with` block ends without an error.

    Memory use does not depend on the number of frames.

    Args:
        folder: created if missing; an earlier store in it is replaced when the block ends.
        frame_shape: shape of one frame, e.g. `(40,)` for log-mel, `()` for state ids.
        dtype: stored type.
        attributes: JSON-able notes kept in the index.

    Raises:
        AsrKdError: duplicate utterance id, wrong frame shape, NaN or infinity in the frames, or the disk is full.
    """

    def __init__(self, folder: Path | str, frame_shape: tuple[int, ...], dtype: DTypeLike, attributes: dict[str, object] | None = None) -> None:
        self.folder = Path(folder)
        self.frame_shape = frame_shape
        self.dtype = np.dtype(dtype)
        self.attributes = attributes or {}
        self._lengths: dict[str, int] = {}
        self._part = self.folder / f".{FRAMES}.part-{os.getpid()}"

    def __enter__(self) -> FrameWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in [*self.folder.glob(f".{FRAMES}.part-*"), *self.folder.glob(f".{INDEX}.part-*")]:  # by a run that was killed
                left.unlink()
            self._file = open(self._part, "wb")
            self._file.write(self._header(0))
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def append(self, utt_id: str, frames: NDArray[np.generic]) -> None:
        """Add one utterance, (T, *frame_shape)."""
        if utt_id in self._lengths:
            raise AsrKdError(f"{utt_id}: already written to {self.folder}; utterance ids must be unique across the splits read together")
        if frames.shape[1:] != self.frame_shape:
            raise AsrKdError(f"{utt_id}: frames of shape {frames.shape[1:]}, expected {self.frame_shape}; check the feature settings")
        stored = np.ascontiguousarray(frames, dtype=self.dtype)
        if stored.dtype.kind == "f" and not np.isfinite(stored).all():
            bad = int(np.argwhere(~np.isfinite(stored))[0][0])
            raise AsrKdError(f"{utt_id}: NaN or infinity at frame {bad}; check the audio file or leave the utterance out")
        try:
            self._file.write(stored.tobytes())
        except OSError as error:
            raise self._cannot_write(error) from error
        self._lengths[utt_id] = len(stored)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as os_error:
            raise self._cannot_write(os_error) from os_error
        finally:
            with suppress(OSError):  # what could not be written is tried again on closing
                self._file.close()
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._file.seek(0)
        self._file.write(self._header(sum(self._lengths.values())))
        self._file.flush()
        os.fsync(self._file.fileno())
        (self.folder / INDEX).unlink(missing_ok=True)
        os.replace(self._part, self.folder / FRAMES)
        write_json(self.folder / INDEX, {"utt_ids": list(self._lengths), "lengths": list(self._lengths.values()), "attributes": self.attributes})

    def _header(self, num_frames: int) -> bytes:
        """A .npy version 1 header of 256 bytes whatever the number of frames, so that it can be rewritten in place."""
        shape = (num_frames, *self.frame_shape)
        body = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape!r}, }}"
        return b"\x93NUMPY\x01\x00" + (246).to_bytes(2, "little") + body.ljust(245).encode("latin1") + b"\n"

    def _cannot_write(self, error: OSError) -> AsrKdError:
        return AsrKdError(f"{self.folder}: could not be written ({error.strerror or error}); free space or choose another output_folder")
