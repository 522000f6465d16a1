"""Frames for training: windows of features beside the state id of their centre frame, joined by utterance id.

`FrameData` holds all frames in memory, on the device. `StreamedFrames` reads them from the stores, an epoch in parts of several chunks:
chunks are shuffled over the epoch, frames within a part, so memory does not depend on the amount of speech, and the disk is read in runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.errors import AsrKdError
from asr_kd.features import Windows, check_present, store_of_each
from asr_kd.frames import FrameStore

CHUNK_FRAMES = 2**15  # read from the disk in one run: 3 MB
PART_FRAMES = 2**22  # in memory together, and once more while the next ones are read: 0.4 GB each
_SPEED_PREFIX = re.compile(r"^sp[0-9.]+-")


Loaded = TypeVar("Loaded")


class WindowSource(Protocol):
    """What training needs of `asr_kd.features.Windows`: any object with these will do."""

    utt_ids: list[str]
    offsets: NDArray[np.int64]
    num_frames: int

    def gather(self, frame_indices: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FrameData:
    """All frames of some utterances, in the numbering of their windows.

    Attributes:
        windows: frame numbers (B,) -> windows (B, input_dim).
        targets: (N,) int32 state ids on the training device.
        original_ids: (U,) the utterance that each is a speed variant of; by default as `original_ids` finds without stores.
    """

    windows: WindowSource
    targets: Tensor
    original_ids: Sequence[str] | None = None

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def num_frames(self) -> int:
        return self.windows.num_frames

    @property
    def utt_ids(self) -> list[str]:
        return self.windows.utt_ids

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(U + 1,) first frame number of each utterance, and the number of frames."""
        return self.windows.offsets

    def parts(self, seed: int, epoch: int) -> list[Part]:
        """The frames of an epoch as one part."""
        frames = epoch_frames(self, seed, epoch)
        return [Part(len(frames), lambda: (self, frames))]

    def utterances_of(self, frame_indices: Tensor) -> list[str]:
        """Sorted ids of the utterances that own these frames."""
        positions = np.searchsorted(self.offsets, frame_indices.cpu().numpy(), side="right") - 1
        return sorted({self.utt_ids[position] for position in positions})

    def check_targets(self, num_states: int) -> None:
        """Raise AsrKdError when a state id lies outside 0 .. num_states - 1."""
        bad = torch.nonzero((self.targets < 0) | (self.targets >= num_states))
        if len(bad):
            frame = int(bad[0])
            utt_id = self.utterances_of(bad[0])[0]
            raise AsrKdError(f"{utt_id}: state id {int(self.targets[frame])}, expected 0 to {num_states - 1}; run the align stage again")


@dataclass(frozen=True)
class Part:
    """Frames of an epoch that are in memory together.

    Attributes:
        num_frames: frames to train on.
        load: reads them; gives them with the numbers (n,), on the CPU, of those to train on, in random order.
    """

    num_frames: int
    load: Callable[[], tuple[FrameData, Tensor]]


class StreamedFrames:
    """Frames of more utterances than fit into memory, with the numbering of `FrameData` of the same utterances.

    Args:
        features, targets: one store or several each.
        utt_ids: which utterances; a chunk is a run of them, so they should come in stored order.
        left, right: frames of context.
        device: where parts and windows are put.
        chunk_frames, part_frames: frames that are read in one run, and that are in memory together.

    Raises:
        AsrKdError: an utterance has no features or targets, or another number of targets than of frames.
    """

    def __init__(self, features: FrameStore | Sequence[FrameStore], targets: FrameStore | Sequence[FrameStore], utt_ids: Sequence[str],
                 left: int, right: int, device: torch.device, *, chunk_frames: int = CHUNK_FRAMES, part_frames: int = PART_FRAMES) -> None:
        self.utt_ids, self.left, self.right, self.device = list(utt_ids), left, right, device
        self.chunk_frames, self.part_frames = chunk_frames, part_frames
        self._features, self._targets = store_of_each(features), _store_of_each_target(targets)
        check_present(self.utt_ids, self._features)
        lengths = [_checked_length(utt_id, self._features[utt_id], self._targets) for utt_id in self.utt_ids]
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_frames = int(self.offsets[-1])
        self._original_ids = original_ids(self.utt_ids, self._features)
        self._stores = [features] if isinstance(features, FrameStore) else list(features)
        self._opened = [*self._stores, *([targets] if isinstance(targets, FrameStore) else targets)]
        number = {id(store): n for n, store in enumerate(self._stores)}
        self._store_number = np.array([number[id(self._features[utt_id])] for utt_id in self.utt_ids])
        self._first_row = np.array([self._features[utt_id].span(utt_id)[0] for utt_id in self.utt_ids], dtype=np.int64)

    @property
    def windows(self) -> StreamedFrames:
        """Gives windows as `FrameData.windows` does."""
        return self

    def gather(self, frame_indices: Tensor) -> Tensor:
        """Windows around any frames, (B,) -> (B, input_dim) float32, read from the disk row by row: for samples."""
        numbers = frame_indices.cpu().numpy()
        positions = np.searchsorted(self.offsets, numbers, side="right") - 1
        last = np.diff(self.offsets)[positions] - 1
        within = numbers - self.offsets[positions]
        rows = np.clip(within[:, None] + np.arange(-self.left, self.right + 1), 0, last[:, None]) + self._first_row[positions, None]  # (B, left + 1 + right)
        windows = np.empty((*rows.shape, self._stores[0].frames.shape[1]), self._stores[0].frames.dtype)
        for n in np.unique(self._store_number[positions]):
            here = self._store_number[positions] == n
            windows[here] = self._stores[n].frames[rows[here]]
            self._stores[n].release()
        return torch.from_numpy(windows).flatten(1).to(self.device).float()

    def run(self, start: int, end: int) -> FrameData:
        """The frames `start` to `end` - 1, which begin and end with an utterance, in memory: what a pass in order should ask for."""
        return self._read(np.arange(*np.searchsorted(self.offsets, [start, end])))

    def parts(self, seed: int, epoch: int) -> list[Part]:
        """The frames of an epoch in random order, one speed variant of each utterance; a function of `seed` and `epoch` alone."""
        rng, lengths = np.random.default_rng([seed, epoch]), np.diff(self.offsets)
        positions = np.sort(_chosen_variants(self._original_ids, rng))
        chunks = _runs(positions, lengths[positions], self.chunk_frames)
        shuffled = [chunks[n] for n in rng.permutation(len(chunks))]
        joined = _runs(np.arange(len(shuffled)), [int(lengths[chunk].sum()) for chunk in shuffled], self.part_frames)
        parts = [np.concatenate([shuffled[n] for n in numbers]) for numbers in joined]
        # counted from 1, as [seed, epoch, 0] gives the same random numbers as [seed, epoch]
        return [Part(int(lengths[part].sum()), partial(self._load, part, [seed, epoch, n])) for n, part in enumerate(parts, 1)]

    def _load(self, positions: NDArray[np.int64], seed: list[int]) -> tuple[FrameData, Tensor]:
        data = self._read(positions)
        return data, torch.from_numpy(np.random.default_rng(seed).permutation(data.num_frames))

    def _read(self, positions: NDArray[np.int64]) -> FrameData:
        data = load_frame_data(self._features, self._targets, [self.utt_ids[position] for position in positions], self.left, self.right, self.device)
        for store in self._opened:
            store.release()
        return data


TrainingFrames = FrameData | StreamedFrames


def load_ahead(loads: Sequence[Callable[[], Loaded]]) -> Iterator[Loaded]:
    """Results in order, the next one being loaded by a thread while the present one is used; "cuda" is the same GPU to both."""
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(1, initializer=partial(torch.cuda.set_device, torch.cuda.current_device()) if on_gpu else None) as pool:
        coming = pool.submit(loads[0]) if loads else None
        for following in [*loads[1:], None]:
            if coming is None:
                return
            loaded = coming.result()
            coming = pool.submit(following) if following is not None else None
            yield loaded


def _runs(items: NDArray[np.int64], sizes: Sequence[int] | NDArray[np.int64], full: int) -> list[NDArray[np.int64]]:
    """Consecutive items together until their sizes add up to `full`; a last run of less than half of that joins the one before."""
    ends, size = [], 0
    for n, own in enumerate(sizes):
        size += int(own)
        if size >= full:
            ends.append(n + 1)
            size = 0
    if ends and 0 < 2 * size < full:
        ends.pop()
    return [run for run in np.split(items, ends) if len(run)]


def load_frame_data(features: FrameStore | Sequence[FrameStore] | Mapping[str, FrameStore],
                    targets: FrameStore | Sequence[FrameStore] | Mapping[str, FrameStore], utt_ids: Sequence[str], left: int, right: int,
                    device: torch.device) -> FrameData:
    """Join features and targets of `utt_ids`, which may lie in several stores each (or utterance id -> store).

    Raises:
        AsrKdError: an utterance is in no store, or has another number of targets than of frames.
    """
    if not utt_ids:
        raise AsrKdError("no utterances to train on; check train_splits, tuning_speakers and the lists of excluded utterances")
    features = features if isinstance(features, Mapping) else store_of_each(features)
    windows = Windows(features, list(utt_ids), left, right, device)
    store_of = targets if isinstance(targets, Mapping) else _store_of_each_target(targets)
    parts = []
    for utt_id, num_frames in zip(utt_ids, np.diff(windows.offsets), strict=True):
        check_targets_of(utt_id, num_frames, store_of)
        parts.append(store_of[utt_id][utt_id])
    return FrameData(windows, torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device), original_ids(utt_ids, features))


def epoch_frames(data: FrameData, seed: int, epoch: int) -> Tensor:
    """Frame numbers of one epoch in random order, (n,) int64 on the CPU; a function of `seed` and `epoch` alone.

    One of the speed variants ("sp0.9-ID", "ID", "sp1.1-ID") of each utterance is drawn anew in every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    chosen = _chosen_variants(original_ids(data.utt_ids) if data.original_ids is None else data.original_ids, rng)
    if len(chosen) == len(data.utt_ids):
        return torch.from_numpy(rng.permutation(data.num_frames))
    frames = np.concatenate([np.arange(data.offsets[position], data.offsets[position + 1]) for position in chosen])
    return torch.from_numpy(rng.permutation(frames))


def original_ids(utt_ids: Sequence[str], store_of: Mapping[str, FrameStore] | None = None) -> list[str]:
    """The utterance that each of `utt_ids` is a speed variant of: itself, or a copy's id without its prefix.

    Copies are known by the speed that their feature store records. Where none is recorded, they are those whose id without prefix is among
    `utt_ids`, for ids may begin like a copy's by themselves ("sp1-0001").
    """
    present = set(utt_ids)
    originals = []
    for utt_id in utt_ids:
        bare = _SPEED_PREFIX.sub("", utt_id)
        speed = store_of[utt_id].attributes.get("speed") if store_of else None
        is_copy = bare in present if speed is None else speed != 1.0
        originals.append(bare if is_copy else utt_id)
    return originals


def _chosen_variants(originals: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Position of one speed variant of each utterance; all positions, and nothing drawn, where there is one of each."""
    groups: dict[str, list[int]] = {}
    for position, original in enumerate(originals):
        groups.setdefault(original, []).append(position)
    if len(groups) == len(originals):
        return list(range(len(originals)))
    return [positions[rng.integers(len(positions))] for positions in groups.values()]


def input_statistics(data: TrainingFrames, num_features: int, seed: int, max_windows: int = 20_000) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation per feature dimension, repeated over the window: both (input_dim,), from a random sample of windows.

    Raises:
        AsrKdError: a feature dimension is constant.
    """
    rng = np.random.default_rng([seed, 0xF0])
    sample = np.sort(rng.choice(data.num_frames, min(max_windows, data.num_frames), replace=False))
    windows = data.windows.gather(torch.from_numpy(sample).to(data.device)).float()
    frames = windows.view(-1, num_features).double()
    deviation, mean = torch.std_mean(frames, 0)
    if not bool((deviation > 0).all()):
        raise AsrKdError(f"features: dimension {int(deviation.argmin())} is constant over the training data; check the audio and the feature settings")
    repeats = windows.shape[1] // num_features
    return mean.float().repeat(repeats), deviation.reciprocal().float().repeat(repeats)


def _store_of_each_target(stores: FrameStore | Sequence[FrameStore]) -> dict[str, FrameStore]:
    """Utterance id -> store of state ids; the first one counts."""
    return {utt_id: store for store in reversed([stores] if isinstance(stores, FrameStore) else list(stores)) for utt_id in store}


def check_targets_of(utt_id: str, num_frames: int, store_of: Mapping[str, FrameStore]) -> None:
    """Raise `AsrKdError` unless an utterance has a state id for each of its frames."""
    if utt_id not in store_of:
        folders = sorted({str(store.folder) for store in store_of.values()})
        raise AsrKdError(f"{utt_id}: not in {', '.join(folders)}; run the stage that writes it again, or leave the utterance out")
    if store_of[utt_id].length(utt_id) != num_frames:
        raise AsrKdError(f"{utt_id}: {store_of[utt_id].length(utt_id)} targets for {num_frames} frames; run the align stage again")


def _checked_length(utt_id: str, store: FrameStore, targets: Mapping[str, FrameStore]) -> int:
    length = store.length(utt_id)
    check_targets_of(utt_id, length, targets)
    return length
