"""Frames for training: windows of features beside the state id of their centre frame, joined by utterance id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.errors import AsrKdError
from asr_kd.features import Windows
from asr_kd.frames import FrameStore

_SPEED_PREFIX = re.compile(r"^sp[0-9.]+-")


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
    """

    windows: WindowSource
    targets: Tensor

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


def load_frame_data(features: FrameStore | Sequence[FrameStore], targets: FrameStore | Sequence[FrameStore], utt_ids: Sequence[str],
                    left: int, right: int, device: torch.device) -> FrameData:
    """Join features and targets of `utt_ids`, which may lie in several stores each.

    Raises:
        AsrKdError: an utterance is in no store, or has another number of targets than of frames.
    """
    if not utt_ids:
        raise AsrKdError("no utterances to train on; check train_splits, tuning_speakers and the lists of excluded utterances")
    windows = Windows(features, list(utt_ids), left, right, device)
    stores = [targets] if isinstance(targets, FrameStore) else list(targets)
    parts = []
    for utt_id, num_frames in zip(utt_ids, np.diff(windows.offsets), strict=True):
        states = _store_of(utt_id, stores)[utt_id]
        if len(states) != num_frames:
            raise AsrKdError(f"{utt_id}: {len(states)} targets for {num_frames} frames; run the align stage again")
        parts.append(states)
    return FrameData(windows, torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device))


def epoch_frames(data: FrameData, seed: int, epoch: int, variants: str = "one") -> Tensor:
    """Frame numbers of one epoch in random order, (n,) int64 on the CPU; a function of `seed` and `epoch` alone.

    Args:
        variants: "one" draws one of the speed variants ("sp0.9-ID", "ID", "sp1.1-ID") of each utterance anew in every epoch, "all" takes all.
    """
    rng = np.random.default_rng([seed, epoch])
    if variants == "all":
        return torch.from_numpy(rng.permutation(data.num_frames))
    groups: dict[str, list[int]] = {}
    for position, utt_id in enumerate(data.utt_ids):
        groups.setdefault(_SPEED_PREFIX.sub("", utt_id), []).append(position)
    if len(groups) == len(data.utt_ids):
        return torch.from_numpy(rng.permutation(data.num_frames))
    chosen = [positions[rng.integers(len(positions))] for positions in groups.values()]
    frames = np.concatenate([np.arange(data.offsets[position], data.offsets[position + 1]) for position in chosen])
    return torch.from_numpy(rng.permutation(frames))


def input_statistics(data: FrameData, num_features: int, seed: int, max_windows: int = 20_000) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation per feature dimension, repeated over the window: both (input_dim,), from a random sample of windows.

    Raises:
        AsrKdError: a feature dimension is constant.
    """
    rng = np.random.default_rng([seed, 0xF0])
    sample = np.sort(rng.choice(data.num_frames, min(max_windows, data.num_frames), replace=False))
    windows = data.windows.gather(torch.from_numpy(sample).to(data.targets.device)).float()
    frames = windows.view(-1, num_features).double()
    deviation, mean = torch.std_mean(frames, 0)
    if not bool((deviation > 0).all()):
        raise AsrKdError(f"features: dimension {int(deviation.argmin())} is constant over the training data; check the audio and the feature settings")
    repeats = windows.shape[1] // num_features
    return mean.float().repeat(repeats), deviation.reciprocal().float().repeat(repeats)


def _store_of(utt_id: str, stores: Sequence[FrameStore]) -> FrameStore:
    for store in stores:
        if utt_id in store:
            return store
    raise AsrKdError(f"{utt_id}: not in {', '.join(str(store.folder) for store in stores)}; run the stage that writes it again, or leave the utterance out")
