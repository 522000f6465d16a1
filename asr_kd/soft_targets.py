"""Soft targets: the teachers' mean tempered posteriors by frame, from a store (dense, compact or sparse) or computed on the fly.

All forms have one interface, `targets.batch(frame_indices)`, in the frame numbering of the training data: the frames of an ordered
list of utterances, one after the other. A store is joined with that list by utterance id, so neither shuffling nor another batch
size, order or choice of utterances can pair a frame with another frame's targets.

Forms of the store: "dense" is exact to float16, at 2 S bytes per frame. "compact" and "sparse" (128 bytes) are unbiased. The noise of "compact" is small
at every temperature: the one to take. "sparse" is the fastest to read and never of size (B, S), but above T = 2 its noise outweighs that of the hard targets.

Averaged posteriors cannot be re-tempered; what they were made with is written into the store and compared whenever it is opened.
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd import sparse_targets
from asr_kd.compact_targets import CompactCode, check_compact_size, find_compact_code
from asr_kd.distributed import by_first_process, rank, total_over_processes, world_size
from asr_kd.errors import AsrKdError
from asr_kd.frame_data import StreamedFrames, load_ahead
from asr_kd.frames import FrameStore
from asr_kd.losses import Mean, SparseTargets, average_teachers
from asr_kd.precision import precision_context
from asr_kd.progress import progress
from asr_kd.resumable_frames import PROGRESS, ResumableFrameWriter

Form = Literal["dense", "compact", "sparse"]
Encoder = Callable[[Tensor, Tensor], Tensor]  # posteriors (n, S), uniform numbers (n, 2) -> stored frames (n, width)

COMPACT_CODE = "compact.safetensors"
STORED_BYTES = 128  # per frame in the compact and sparse forms, unless asked for otherwise
SAMPLE_FRAMES = 8192  # frames that the compact form's code is found from,
SAMPLE_ELEMENTS = 2**26  # and at most so many probabilities
# Teachers x frames x states in one forward pass, and at most so many frames: 256 MB in float32 on a CPU, where more frames are no faster; 2 GB
# in bfloat16 on a GPU, since every pass rounds all weights anew
LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**30}
FRAMES_AT_ONCE = {"cpu": 1024, "cuda": 8192}
CACHED_ELEMENTS = 2**18  # frames x states that a CPU averages at a time, so that they stay in its cache: 3.7 times as fast as all at once


class WindowSource(Protocol):
    """What is needed of `asr_kd.features.Windows`."""

    def gather(self, frame_indices: Tensor) -> Tensor: ...


class Numbering(Protocol):
    """Utterances in some order, and the first frame number of each, (U + 1,) with the number of frames."""

    @property
    def utt_ids(self) -> Sequence[str]: ...

    @property
    def offsets(self) -> NDArray[np.int64]: ...


class NumberedFrames(Numbering, Protocol):
    """What is needed of `asr_kd.frame_data.FrameData`; its hard targets are not, so frames without labels serve as well."""

    @property
    def windows(self) -> WindowSource: ...


@dataclass(frozen=True)
class StoredOrder:
    """A `Numbering`: that of a store."""

    utt_ids: list[str]
    offsets: NDArray[np.int64]


class Teachers(Protocol):
    """What is needed of `asr_kd.ensemble.Ensemble`: windows (N, input_dim) -> logits (K, N, S) without dropout."""

    def __len__(self) -> int: ...

    def __call__(self, inputs: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class SoftTargetRecord:
    """What soft targets were made with; targets made with anything else are refused.

    Attributes:
        temperature: T of softmax(logits / T).
        mean: "arithmetic" or "geometric" mean over the teachers.
        num_states: S.
        teachers, features, states: fingerprints of the teachers' stage, the features' stages and the state inventory.
    """

    temperature: float
    mean: Mean
    num_states: int
    teachers: str
    features: str
    states: str

    def check(self, found: dict[str, object], folder: Path) -> None:
        """Raise `AsrKdError` unless `found`, the record in `folder`, is this one."""
        reasons = {"temperature": "averaged posteriors cannot be re-tempered", "teachers": "the teachers were trained again since",
                   "features": "the features were computed again since", "states": "the state inventory is another one"}
        for item in fields(self):
            wanted, got = getattr(self, item.name), found.get(item.name)
            if got != wanted:
                reason = f" ({reasons[item.name]})" if item.name in reasons else ""
                raise AsrKdError(f"{folder}: soft targets with {item.name} {got}, expected {wanted}{reason}; "
                                 f"run the soft_targets stage again with {item.name} {wanted}, or give a folder that was made so")


def extract(teachers: Teachers, frames: NumberedFrames, folder: Path | str, record: SoftTargetRecord, *, seed: int, device: torch.device,
            form: Form = "compact", bytes_per_frame: int = STORED_BYTES, precision: str = "fp32") -> None:
    """Write the soft targets of all `frames` to `folder`; an extraction that was cut off goes on after its last chunk.

    Of several processes each writes its share of the utterances to a folder of its own, `shard{rank}of{processes}`. Memory use does not
    depend on the number of frames. What is drawn for a frame of the compact and sparse forms depends on `seed` and the utterance alone.

    Args:
        form: "dense" is float16 (N, S), "compact" `asr_kd.compact_targets`, "sparse" `asr_kd.sparse_targets`.
        bytes_per_frame: size of a compact or sparse record.
        device: where the teachers are and records are computed.
        precision: "fp32" or "bf16" of the teachers' matrix products.

    Raises:
        AsrKdError: teachers of another number of states, NaN in their output, an impossible size of record, or the disk is full.
    """
    _check_size(form, bytes_per_frame, record.num_states)
    width, dtype = (record.num_states, "<f2") if form == "dense" else (bytes_per_frame // 2, "<i2")
    attributes: dict[str, object] = {**asdict(record), "form": form, "seed": seed, "precision": precision}
    own = _own_utterances(frames.offsets)
    first = int(frames.offsets[own.start])
    by_first_process(partial(_remove_other_shards, Path(folder)))
    writer = ResumableFrameWriter(_shard(Path(folder)), frames.utt_ids[own], frames.offsets[own.start:own.stop + 1] - first, width, dtype, attributes)
    progress_bar = progress(desc=f"soft targets, T = {record.temperature:g}", total=sum(writer.lengths), unit="frames")
    with precision_context(precision, device), torch.inference_mode(), progress_bar as bar:
        encode = _encoder(teachers, frames, record, form, bytes_per_frame, Path(folder), total_over_processes(writer.frames_done)[0] > 0, seed, device)
        bar.update(writer.frames_done)
        chunks = [(first + start, first + end) for start, end in writer.chunks_left()]
        for (start, end), (run, numbers) in zip(chunks, load_ahead([partial(_run, frames, *chunk) for chunk in chunks]), strict=True):
            uniforms = torch.empty(end - start, 0) if form == "dense" else torch.from_numpy(_uniforms(seed, frames, start, end)).to(device)
            block = np.empty((end - start, width), dtype)
            for rows, posteriors in _teacher_posteriors(teachers, run, numbers, record, device):
                block[rows] = encode(posteriors, uniforms[rows]).cpu().numpy()
            writer.append(block)
            bar.update(end - start)
    writer.finish()


class SoftTargetStore:
    """Soft targets that `extract` wrote, in the numbering of `utt_ids` and `offsets`; `store[utt_id]` gives those of one utterance.

    A recipe of one's own reads them by `SoftTargetStore.open` (docs/soft_targets.md).

    Args:
        frames: utterances and first frame numbers of the training data; all of them must be in the store, in any order.
        expected: what the targets must have been made with.
        device: where `batch` gives its tensors. Off the CPU small forms are kept there, so that no batch waits for the host.

    Attributes:
        utt_ids: utterances in order.
        temperature: that they were made at.
        form: "dense", "compact" or "sparse".
        bytes_per_frame: on disk.

    Raises:
        AsrKdError: unfinished or damaged store, targets made with something else, an utterance missing or of another length.
    """

    def __init__(self, folder: Path | str, frames: Numbering, expected: SoftTargetRecord, device: torch.device) -> None:
        self._shards = [FrameStore(shard) for shard in _written_shards(Path(folder))]
        for shard in self._shards:
            expected.check(shard.attributes, shard.folder)
        self.temperature = expected.temperature
        self.form: object = self._shards[0].attributes["form"]
        self.bytes_per_frame = self._shards[0].frames.dtype.itemsize * self._shards[0].frames.shape[1]
        self._device = device
        self._code = CompactCode.load(Path(folder) / COMPACT_CODE).to(device) if self.form == "compact" else None
        self._shard_of = {utt_id: number for number, shard in enumerate(self._shards) for utt_id in shard}
        self._number(frames, on_device=device.type != "cpu" and self.form != "dense")

    @classmethod
    def open(cls, folder: Path | str, temperature: float, device: torch.device | str = "cpu") -> SoftTargetStore:
        """All soft targets in a folder, whatever teachers and features they are of, in stored order.

        Raises:
            AsrKdError: unfinished or damaged store, or targets of another temperature: averaged posteriors cannot be re-tempered.
        """
        shards = [FrameStore(shard) for shard in _written_shards(Path(folder))]
        found: dict[str, Any] = {item.name: shards[0].attributes.get(item.name) for item in fields(SoftTargetRecord)}
        lengths = np.concatenate([np.diff(shard.offsets) for shard in shards])
        order = StoredOrder([utt_id for shard in shards for utt_id in shard], np.concatenate([[0], np.cumsum(lengths)]))
        return cls(folder, order, SoftTargetRecord(**(found | {"temperature": temperature})), torch.device(device))

    def __contains__(self, utt_id: object) -> bool:
        return utt_id in self._position

    def __getitem__(self, utt_id: str) -> Tensor | SparseTargets:
        """Targets of the T frames of an utterance, as `batch` gives them: (T, S), or sparse targets (T, k); `KeyError` where it has none."""
        u = self._position[utt_id]
        return self.batch(torch.arange(self._offsets[u], self._offsets[u + 1]))

    def _number(self, frames: Numbering, on_device: bool) -> None:
        """Take on another numbering; `on_device` keeps all its records in memory from the first batch on."""
        self.utt_ids = list(frames.utt_ids)
        self._position = {utt_id: u for u, utt_id in enumerate(self.utt_ids)}
        self._offsets = np.asarray(frames.offsets, dtype=np.int64)
        self._utterance_shard, first_rows = _places(self._shards, self._shard_of, frames.utt_ids, self._offsets)
        self._shift = first_rows - self._offsets[:-1]  # (U,) from frame number to row of the shard
        self._records: Tensor | None = None
        self._on_device = on_device

    def _load(self) -> None:
        """Take all records of the numbering to the device."""
        places = zip(self._utterance_shard, self._shift + self._offsets[:-1], np.diff(self._offsets), strict=True)
        pieces = [self._shards[n].frames[row:row + length] for n, row, length in places]
        self._records = torch.from_numpy(np.concatenate(pieces)).to(self._device)

    def of(self, frames: Numbering) -> SoftTargetStore:
        """The same targets in the numbering of other `frames`, some of the utterances, whose records are read into memory.

        Raises:
            AsrKdError: an utterance that is not in the store, or of another length.
        """
        part = copy.copy(self)
        part._number(frames, on_device=self.form != "dense")
        if part._on_device:
            part._load()
        for shard in self._shards:
            shard.release()
        return part

    def batch(self, frame_indices: Tensor) -> Tensor | SparseTargets:
        """Targets of frames (B,): float32 (B, S), or sparse targets; every frame's sum to 1. In the compact form single ones may be negative."""
        if self._on_device and self._records is None:  # not before: streamed training asks only for parts of the frames
            self._load()
        stored = self._read(frame_indices) if self._records is None else self._records[frame_indices]
        if self._code is not None:
            return self._code.decode(stored)
        if self.form == "sparse":
            return sparse_targets.decode(stored)
        posteriors = stored.float()
        return posteriors / posteriors.sum(1, keepdim=True)  # float16 rounds away up to 1e-3 of the mass

    def _read(self, frame_indices: Tensor) -> Tensor:
        """Records (B, width) of frames, from the disk."""
        numbers = frame_indices.cpu().numpy()
        utterances = np.searchsorted(self._offsets, numbers, side="right") - 1
        rows, shards = numbers + self._shift[utterances], self._utterance_shard[utterances]
        if len(self._shards) == 1:
            return torch.from_numpy(self._shards[0].frames[rows]).to(self._device)
        stored = np.empty((len(rows), *self._shards[0].frames.shape[1:]), self._shards[0].frames.dtype)
        for n in np.unique(shards):
            stored[shards == n] = self._shards[n].frames[rows[shards == n]]
        return torch.from_numpy(stored).to(self._device)


class OnTheFlyTargets:
    """The same interface without a store: the teachers run on every batch. No disk, but K forward passes in every epoch.

    What the teachers give is not looked at here: NaN becomes a loss that is not finite, which training reports.
    """

    def __init__(self, teachers: Teachers, frames: NumberedFrames, temperature: float, mean: Mean = "arithmetic") -> None:
        self.temperature = temperature
        self._teachers, self._windows, self._mean = teachers, frames.windows, mean

    @torch.no_grad()
    def batch(self, frame_indices: Tensor) -> Tensor:
        """Targets of frames (B,): float32 probabilities (B, S)."""
        return _averaged(self._teachers(self._windows.gather(frame_indices)), self.temperature, self._mean)

    def of(self, frames: NumberedFrames) -> OnTheFlyTargets:
        """The same targets in the numbering of other `frames`."""
        return OnTheFlyTargets(self._teachers, frames, self.temperature, self._mean)


def _shard(folder: Path) -> Path:
    """Where this process writes: alone, the folder itself."""
    return folder if world_size() == 1 else folder / f"shard{rank()}of{world_size()}"


def _own_utterances(offsets: NDArray[np.int64]) -> slice:
    """This process's utterances: a run with about as many frames as any other process's."""
    edges = np.searchsorted(offsets, offsets[-1] * np.arange(world_size() + 1) / world_size())
    return slice(int(edges[rank()]), int(edges[rank() + 1]))


def _remove_other_shards(folder: Path) -> None:
    """Remove what a run of another number of processes left."""
    for left in folder.glob("shard*"):
        if world_size() == 1 or not left.name.endswith(f"of{world_size()}"):
            shutil.rmtree(left)
    if world_size() > 1:
        (folder / PROGRESS).unlink(missing_ok=True)


def _written_shards(folder: Path) -> list[Path]:
    """Folders of a store's shards; the folder itself where one process wrote it."""
    shards = sorted(folder.glob("shard*"))
    for shard in shards:
        expected = int(shard.name.rpartition("of")[2])
        if len(shards) != expected:
            raise AsrKdError(f"{folder}: {len(shards)} shards, expected {expected}; run the soft_targets stage again")
    return shards or [folder]


def _places(shards: Sequence[FrameStore], shard_of: Mapping[str, int], utt_ids: Sequence[str],
            offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard of each utterance, and the row of its first frame there, both (U,)."""
    numbers = np.array([shard_of.get(utt_id, 0) for utt_id in utt_ids], dtype=np.int64)
    spans = np.array([shards[n].span(utt_id) for n, utt_id in zip(numbers, utt_ids, strict=True)], dtype=np.int64).reshape(-1, 2)
    lengths = spans[:, 1] - spans[:, 0]
    wrong = np.flatnonzero(lengths != np.diff(offsets))
    if len(wrong):
        u = wrong[0]
        raise AsrKdError(f"{utt_ids[u]}: {lengths[u]} soft targets in {shards[0].folder} for {np.diff(offsets)[u]} frames of features; "
                         "run the soft_targets stage again")
    return numbers, spans[:, 0]


def _check_size(form: Form, bytes_per_frame: int, num_states: int) -> None:
    if form == "compact":
        check_compact_size(bytes_per_frame, num_states)
    elif form == "sparse":
        sparse_targets.check_record_size(bytes_per_frame, num_states)


def _encoder(teachers: Teachers, frames: NumberedFrames, record: SoftTargetRecord, form: Form, bytes_per_frame: int, folder: Path, has_begun: bool,
             seed: int, device: torch.device) -> Encoder:
    """What turns posteriors into stored frames; the first process finds it out for all."""
    if form == "dense":
        return lambda posteriors, uniforms: posteriors.half()
    if form == "sparse":
        return lambda posteriors, uniforms: sparse_targets.encode(posteriors, uniforms, bytes_per_frame)

    def find() -> None:
        generator = torch.Generator().manual_seed(seed)
        num_frames = min(SAMPLE_FRAMES, SAMPLE_ELEMENTS // record.num_states)
        sample = torch.randint(int(frames.offsets[-1]), (num_frames,), generator=generator)
        posteriors = torch.cat([part for _, part in _teacher_posteriors(teachers, frames, sample, record, device)])
        find_compact_code(posteriors, bytes_per_frame, generator).save(folder / COMPACT_CODE)

    if not has_begun:
        by_first_process(find)
    code = CompactCode.load(folder / COMPACT_CODE).to(device)
    return code.encode


def _run(frames: NumberedFrames, start: int, end: int) -> tuple[NumberedFrames, Tensor]:
    """Frames that hold those numbered `start` to `end` - 1, in memory where they come from the disk, and the numbers (end - start,) that these have there."""
    if isinstance(frames, StreamedFrames):
        return frames.run(start, end), torch.arange(end - start)
    return frames, torch.arange(start, end)


def _teacher_posteriors(teachers: Teachers, frames: NumberedFrames, frame_indices: Tensor, record: SoftTargetRecord,
                        device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Soft targets (n, S) of frames (N,) in passes of bounded size, each with its place among the N."""
    frames_at_once, logits_at_once = (limits.get(device.type, limits["cpu"]) for limits in (FRAMES_AT_ONCE, LOGITS_AT_ONCE))
    most = max(1, min(frames_at_once, logits_at_once // (len(teachers) * record.num_states)))
    passes = max(1, math.ceil(len(frame_indices) / most))
    step = max(1, math.ceil(len(frame_indices) / passes))  # all alike: a short last one would cost a GPU as much
    for start in range(0, len(frame_indices), step):
        rows = slice(start, min(start + step, len(frame_indices)))
        logits = teachers(frames.windows.gather(frame_indices[rows]))  # (K, n, S)
        if logits.shape[2] != record.num_states:
            raise AsrKdError(f"teachers of {logits.shape[2]} states, expected {record.num_states}; train the teachers again on these targets")
        posteriors = _averaged(logits, record.temperature, record.mean)
        finite = posteriors.sum(1).isfinite()
        if not bool(finite.all()):
            bad = int(frame_indices[rows][~finite.cpu()][0])
            u = int(np.searchsorted(frames.offsets, bad, side="right")) - 1
            raise AsrKdError(f"{frames.utt_ids[u]}: the teachers give NaN at frame {bad - frames.offsets[u]}; "
                             "check this utterance's features, and the teachers' training log for divergence")
        yield rows, posteriors


def _averaged(logits: Tensor, temperature: float, mean: Mean) -> Tensor:
    """`average_teachers`, on a CPU some frames at a time."""
    rows = max(1, CACHED_ELEMENTS // logits.shape[2]) if logits.device.type == "cpu" else logits.shape[1]
    if rows >= logits.shape[1]:
        return average_teachers(logits, temperature, mean)
    return torch.cat([average_teachers(block, temperature, mean) for block in torch.split(logits, rows, 1)])


def _uniforms(seed: int, frames: NumberedFrames, start: int, end: int) -> NDArray[np.float32]:
    """Uniform numbers (n, 2) of frames start..end-1, which begin and end with an utterance."""
    first, last = np.searchsorted(frames.offsets, [start, end])
    draws = []
    for utt_id, length in zip(frames.utt_ids[first:last], np.diff(frames.offsets[first:last + 1]).tolist(), strict=True):
        digest = hashlib.sha256(f"{seed} {utt_id}".encode()).digest()
        draws.append(np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random((length, 2), dtype=np.float32))
    return np.concatenate(draws)
