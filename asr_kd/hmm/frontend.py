"""What the aligner hears: cepstra from stored log-mel, normalised per speaker, with deltas or spliced and projected, adapted per speaker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import concrete_device
from asr_kd.errors import AsrKdError
from asr_kd.hmm.features import Features
from asr_kd.progress import progress

CPU = torch.device("cpu")
NUM_CEPSTRA = 13
SPLICE = 4
"""Frames on either side that are joined before the projection."""


def dct_matrix(num_mels: int, num_cepstra: int = NUM_CEPSTRA) -> Tensor:
    """(num_mels, num_cepstra) orthonormal DCT-II: log-mel @ matrix = cepstra."""
    k, m = np.arange(num_cepstra)[None, :], np.arange(num_mels)[:, None]
    matrix = np.sqrt(2.0 / num_mels) * np.cos(np.pi * k * (m + 0.5) / num_mels)
    matrix[:, 0] /= np.sqrt(2.0)
    return torch.from_numpy(matrix.astype(np.float32))


@cache
def _dct_on(num_mels: int, device: torch.device) -> Tensor:
    """`dct_matrix` on a device, made once."""
    return dct_matrix(num_mels).to(device)


def splice(frames: Tensor, context: int = SPLICE) -> Tensor:
    """(T, D) -> (T, (2 · context + 1) · D): each frame between its neighbours, edges repeated."""
    neighbours = torch.arange(-context, context + 1, device=frames.device)
    index = (torch.arange(len(frames), device=frames.device)[:, None] + neighbours).clamp_(0, len(frames) - 1)
    return frames[index].flatten(1)


def add_deltas(frames: Tensor) -> Tensor:
    """(T, D) -> (T, 3 D): with slopes over five frames and slopes of these."""
    return torch.cat([frames, (delta := _slope(frames)), _slope(delta)], 1)


def _slope(frames: Tensor) -> Tensor:
    """Regression slope over five frames, sum_k k · x[t + k] / 10 for k = -2..2, edges repeated."""
    padded = torch.cat([frames[:1], frames[:1], frames, frames[-1:], frames[-1:]])
    return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10


@dataclass(frozen=True, eq=False)
class Frontend:
    """Turns stored log-mel frames into the aligner's features.

    Attributes:
        store: log-mel features.
        speakers: utterance id -> speaker id.
        means: speaker id -> (13,) cepstral mean.
        projection: (9 · 13, D) for spliced cepstra; None: cepstra with deltas.
        transforms: speaker id -> (D, D + 1) affine adaptation [A, b] (fMLLR); speakers without one are left as they are.
        device: where frames are made; the tensors above stay on the CPU.
    """

    store: Features
    speakers: Mapping[str, str]
    means: Mapping[str, Tensor]
    projection: Tensor | None = None
    transforms: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = CPU

    @property
    def dim(self) -> int:
        """D, width of the features."""
        return 3 * NUM_CEPSTRA if self.projection is None else self.projection.shape[1]

    @staticmethod
    def of(store: Features, speakers: Mapping[str, str], utt_ids: Sequence[str], device: torch.device | str = "cpu") -> Frontend:
        """Measure the cepstral means of the speakers over the given utterances.

        Raises:
            AsrKdError: an utterance without a speaker, or features that are not log-mel frames.
        """
        if len(store.frame_shape) != 1 or store.frame_shape[0] < NUM_CEPSTRA:
            raise AsrKdError(f"features: frames of shape {store.frame_shape}, expected ({NUM_CEPSTRA} or more,); give {NUM_CEPSTRA} num_mels or more")
        sums: dict[str, NDArray[np.float64]] = {}
        counts: dict[str, int] = {}
        for utt_id in progress(utt_ids, "cepstral means", unit="utt"):
            if utt_id not in speakers:
                raise AsrKdError(f"{utt_id}: no speaker given; add it to the manifest (spk_id)")
            speaker, frames = speakers[utt_id], store[utt_id]
            sums[speaker] = sums.get(speaker, 0.0) + frames.sum(0, dtype=np.float64)
            counts[speaker] = counts.get(speaker, 0) + len(frames)
        dct = dct_matrix(store.frame_shape[0])
        means = {speaker: torch.from_numpy(sums[speaker] / max(counts[speaker], 1)).float() @ dct for speaker in sums}
        return Frontend(store, speakers, means, device=concrete_device(device))

    def projected(self, projection: Tensor | None) -> Frontend:
        """The same with spliced cepstra through `projection`, unadapted."""
        return replace(self, projection=projection, transforms={})

    def adapted(self, transforms: Mapping[str, Tensor]) -> Frontend:
        """The same with these speaker transforms."""
        return replace(self, transforms=transforms)

    def cepstra(self, utt_id: str) -> Tensor:
        """(T, 13) normalised cepstra."""
        log_mel = torch.from_numpy(self.store[utt_id].astype(np.float32)).to(self.device)
        return log_mel @ _dct_on(log_mel.shape[1], self.device) - self.means[self.speakers[utt_id]].to(self.device)

    def spliced(self, utt_id: str) -> Tensor:
        """(T, 9 · 13) what a projection is estimated from."""
        return splice(self.cepstra(utt_id))

    def unadapted(self, utt_id: str) -> Tensor:
        """(T, D) features before the speaker's transform."""
        return add_deltas(self.cepstra(utt_id)) if self.projection is None else self.spliced(utt_id) @ self.projection.to(self.device)

    def frames(self, utt_id: str) -> Tensor:
        """(T, D) features."""
        return self.transformed(self.speakers[utt_id], self.unadapted(utt_id))

    def transformed(self, speaker: str, frames: Tensor) -> Tensor:
        """Frames (T, D) of a speaker after the speaker's transform, if there is one."""
        if speaker not in self.transforms:
            return frames
        transform = self.transforms[speaker].to(self.device)
        return torch.addmm(transform[:, -1], frames, transform[:, :-1].T)
