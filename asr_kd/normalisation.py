"""Mean normalisation for a speaker never seen.

Training subtracts each speaker's mean features. One file of an unknown speaker has its own mean only, and a short file's
mean says more about its words than about the speaker. It is therefore shrunk to the training mean: with p frames' worth of
trust in the training mean mu, n frames x_t in the file,

    mean = (p mu + sum_t x_t) / (p + n),

the maximum a posteriori mean of a Gaussian (Gauvain & Lee 1994, eq. 24). p = 0 is the file's own mean, p infinite the training mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore
from asr_kd.model import AcousticModel
from asr_kd.progress import progress
from asr_kd.score import FrameCounts, frame_counts

PSEUDO_COUNTS = (0.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0, math.inf)
Frames = NDArray[np.floating]
LogPosteriors = Callable[[Frames], NDArray[np.float32]]


@dataclass(frozen=True)
class MeanNormalisation:
    """Training mean mu, (F,), and p, how many frames it counts for (0 to infinity)."""

    training_mean: tuple[float, ...]
    pseudo_count_frames: float

    def mean(self, frame_sum: Frames, num_frames: int) -> NDArray[np.float64]:
        """(F,) mean to subtract, from the sum over n frames; see the formula above.

        >>> MeanNormalisation((4.0,), 2.0).mean(np.array([20.0]), 2)
        array([7.])
        """
        prior = np.asarray(self.training_mean)
        trust = 1.0 if math.isinf(self.pseudo_count_frames) else self.pseudo_count_frames / (self.pseudo_count_frames + num_frames)
        return trust * prior + (1.0 - trust) * np.asarray(frame_sum) / num_frames

    def __call__(self, frames: Frames) -> NDArray[np.float32]:
        """Normalise one utterance's raw features, (T, F)."""
        return (frames - self.mean(frames.sum(axis=0, dtype=np.float64), len(frames))).astype(np.float32)


def training_mean(stores: Sequence[FrameStore]) -> NDArray[np.float64]:
    """Mean over all frames before normalisation, (F,), from the means that `extract_features` noted (cmvn "speaker" or "corpus").

    Raises:
        AsrKdError: the stores hold no means.
    """
    total, count = np.zeros(stores[0].frames.shape[1]), 0
    for store in stores:
        for utt_id in store:
            total += store.length(utt_id) * _noted_mean(store, utt_id)
            count += store.length(utt_id)
    return total / count


def raw_features(store: FrameStore, utt_id: str) -> NDArray[np.float32]:
    """Features of an utterance before normalisation, (T, F): the noted mean is added back."""
    return (store[utt_id].astype(np.float64) + _noted_mean(store, utt_id)).astype(np.float32)


def make_normalisation(cmvn: str, stores: Sequence[FrameStore], pseudo_count_frames: float) -> MeanNormalisation:
    """The counterpart, for one file, of how training was normalised: "speaker", "utterance", "corpus" or "none"."""
    num_mels = stores[0].frames.shape[1]
    if cmvn in ("none", "utterance"):
        return MeanNormalisation((0.0,) * num_mels, math.inf if cmvn == "none" else 0.0)
    return MeanNormalisation(tuple(training_mean(stores).tolist()), math.inf if cmvn == "corpus" else pseudo_count_frames)


@torch.no_grad()
def log_posteriors(model: AcousticModel, frames: Frames, left: int, right: int) -> NDArray[np.float32]:
    """Natural log posteriors of normalised features, (T, F) -> (T, S), on the model's device.

    Frames are rounded to float16 first, as stored features are.
    """
    device = model.input_mean.device
    rows = torch.from_numpy(np.array(frames, dtype=np.float16)).float().to(device)
    padded = torch.cat([rows[:1].expand(left, -1), rows, rows[-1:].expand(right, -1)])  # (left + T + right, F)
    windows = padded.unfold(0, left + 1 + right, 1).transpose(1, 2).flatten(1)  # (T, (left + 1 + right) * F)
    posteriors: NDArray[np.float32] = model(windows).float().log_softmax(-1).cpu().numpy()
    return posteriors


def choose_pseudo_count(network: LogPosteriors, splits: Sequence[tuple[FrameStore, FrameStore]], utt_ids: Sequence[str], mean: Frames,
                        candidates: Sequence[float] = PSEUDO_COUNTS) -> tuple[float, dict[float, FrameCounts]]:
    """The p with the most correct frames on the tuning speakers when every utterance is normalised alone; ties go to the smaller.

    Args:
        network: normalised (T, F) -> (T, S) log posteriors.
        splits: features as `extract_features` wrote them, and state ids; the tuning speakers may be in several.
        utt_ids: of the tuning speakers; those without state ids are left out.
        mean: of the training data, (F,).

    Returns:
        The best p, and the counts for each candidate.
    """
    counts = dict.fromkeys(sorted(candidates), FrameCounts())
    places = [(store, targets, utt_id) for store, targets in splits for utt_id in utt_ids if utt_id in targets]
    for store, targets, utt_id in progress(places, desc="mean normalisation", unit="utt"):
        raw, reference = raw_features(store, utt_id), np.asarray(targets[utt_id], dtype=np.int64)
        for pseudo_count in counts:
            best = network(MeanNormalisation(tuple(mean), pseudo_count)(raw)).argmax(1)
            counts[pseudo_count] += frame_counts(utt_id, reference, best)
    return max(counts, key=lambda pseudo_count: counts[pseudo_count].correct), counts


def _noted_mean(store: FrameStore, utt_id: str) -> NDArray[np.float64]:
    means: Any = store.attributes.get("means", {})
    speakers: Any = store.attributes.get("speakers", {})
    noted = means.get(speakers.get(utt_id), means.get("corpus"))
    if noted is None:
        raise AsrKdError(f"{utt_id}: {store.folder} notes no mean of its speaker; extract the features with cmvn speaker or corpus")
    return np.asarray(noted, dtype=np.float64)
