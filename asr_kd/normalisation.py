"""Mean normalisation for a speaker never seen.

Training subtracts each speaker's mean features. One file of an unknown speaker has its own mean only, and a short file's
mean says more about its words than about the speaker. It is therefore shrunk to the training mean: with p frames' worth of
trust in the training mean mu, n frames x_t in the file,

    mean = (p mu + sum_t x_t) / (p + n),

the maximum a posteriori mean of a Gaussian (Gauvain & Lee 1994, eq. 24). p = 0 is the file's own mean, p infinite the training mean.

A long pause would pull that mean down, and every frame of speech up. So of a file's quiet frames no more are counted, the loudest of them,
than there are beside as many loud ones in the training speech; digital silence is not counted at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
LOUD_NATS = 6.0
"""Frames are loud down to this much below the loudest ones: 26 dB."""
TOP_FRAMES, TOP_SHARE = 50, 0.02
"""The loudest ones: half a second, or this share of a longer file."""
LEVEL_STEP, LOWEST_LEVEL, NUM_LEVELS = 0.1, -16.0, 400
"""Levels, nats, that are told apart."""
DIGITAL_SILENCE = 5
"""Levels of samples that are all zero, or nearly so."""
MAX_SAMPLE = 5000
"""Utterances that the share of loud frames is measured on."""
Frames = NDArray[np.floating]
LogPosteriors = Callable[[Frames], NDArray[np.float32]]


class LevelSums:
    """Raw log-mel frames of a file added up by their level, the log of the filters' mean energy: memory does not depend on how many there are."""

    def __init__(self, num_mels: int) -> None:
        self._counts = np.zeros(NUM_LEVELS, np.int64)
        self._sums = np.zeros((NUM_LEVELS, num_mels))

    def add(self, frames: Frames) -> LevelSums:
        """Add (T, F) frames."""
        level = np.logaddexp.reduce(frames, 1) - math.log(frames.shape[1])
        levels = ((level - LOWEST_LEVEL) / LEVEL_STEP).astype(np.int64).clip(0, NUM_LEVELS - 1)
        self._counts += np.bincount(levels, minlength=NUM_LEVELS)
        np.add.at(self._sums, levels, frames)
        return self

    def __len__(self) -> int:
        return int(self._counts.sum())

    def num_loud(self) -> int:
        """Frames at most `LOUD_NATS` below the loudest ones."""
        at_least = self._at_least()
        total = int(at_least[DIGITAL_SILENCE])
        top = min(max(TOP_FRAMES, math.ceil(TOP_SHARE * total)), max(1, total // 4))
        loudest = int(np.flatnonzero(at_least >= top)[-1]) if total else 0
        return int(at_least[max(DIGITAL_SILENCE, loudest - round(LOUD_NATS / LEVEL_STEP))])

    def counted(self, loud_share: float) -> tuple[NDArray[np.float64], float]:
        """Sum (F,) and number of the frames that count: the loud ones, and the loudest others until the share of loud ones has come down to `loud_share`."""
        at_least = self._at_least()
        if at_least[DIGITAL_SILENCE] == 0:
            return self._sums.sum(0), float(len(self))
        number = min(self.num_loud() / loud_share, float(at_least[DIGITAL_SILENCE]))
        last = int(np.flatnonzero(at_least >= number)[-1])  # of this level only a part
        return self._sums[last + 1:].sum(0) + (number - at_least[last + 1]) / self._counts[last] * self._sums[last], number

    def _at_least(self) -> NDArray[np.int64]:
        """(NUM_LEVELS + 1,) frames of each level or a higher one."""
        return np.append(np.cumsum(self._counts[::-1])[::-1], 0)


@dataclass(frozen=True)
class MeanNormalisation:
    """Training mean mu, (F,), p, how many frames it counts for (0 to infinity), and the share of loud frames in the training speech."""

    training_mean: tuple[float, ...]
    pseudo_count_frames: float
    loud_share: float = 1.0

    def mean(self, frame_sum: Frames, num_frames: float) -> NDArray[np.float64]:
        """(F,) mean to subtract, from the sum over n frames; see the formula above.

        >>> MeanNormalisation((4.0,), 2.0).mean(np.array([20.0]), 2)
        array([7.])
        """
        prior = np.asarray(self.training_mean)
        trust = 1.0 if math.isinf(self.pseudo_count_frames) else self.pseudo_count_frames / (self.pseudo_count_frames + num_frames)
        return trust * prior + (1.0 - trust) * np.asarray(frame_sum) / num_frames

    def mean_of(self, levels: LevelSums) -> NDArray[np.float64]:
        """(F,) mean to subtract from a file of these frames."""
        return self.mean(*levels.counted(self.loud_share))

    def __call__(self, frames: Frames) -> NDArray[np.float32]:
        """Normalise one utterance's raw features, (T, F)."""
        return (frames - self.mean_of(LevelSums(frames.shape[1]).add(frames))).astype(np.float32)


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


def loud_share(stores: Sequence[FrameStore]) -> float:
    """Share of loud frames in the utterances of some stores, or in an even sample of them."""
    places = [(store, utt_id) for store in stores for utt_id in store]
    loud = total = 0
    for store, utt_id in places[::max(1, len(places) // MAX_SAMPLE)]:
        raw = raw_features(store, utt_id) if store.attributes.get("means") else store[utt_id].astype(np.float32)
        levels = LevelSums(raw.shape[1]).add(raw)
        loud, total = loud + levels.num_loud(), total + len(levels)
    return loud / total


def raw_features(store: FrameStore, utt_id: str) -> NDArray[np.float32]:
    """Features of an utterance before normalisation, (T, F): the noted mean is added back."""
    return (store[utt_id].astype(np.float64) + _noted_mean(store, utt_id)).astype(np.float32)


def make_normalisation(cmvn: str, stores: Sequence[FrameStore], pseudo_count_frames: float) -> MeanNormalisation:
    """The counterpart, for one file, of how training was normalised: "speaker", "utterance", "corpus" or "none"."""
    num_mels = stores[0].frames.shape[1]
    if cmvn == "none":
        return MeanNormalisation((0.0,) * num_mels, math.inf)
    if cmvn == "utterance":
        return MeanNormalisation((0.0,) * num_mels, 0.0, loud_share(stores))
    return MeanNormalisation(tuple(training_mean(stores).tolist()), math.inf if cmvn == "corpus" else pseudo_count_frames, loud_share(stores))


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


def choose_pseudo_count(network: LogPosteriors, splits: Sequence[tuple[FrameStore, FrameStore]], utt_ids: Sequence[str], normalisation: MeanNormalisation,
                        candidates: Sequence[float] = PSEUDO_COUNTS) -> tuple[float, dict[float, FrameCounts]]:
    """The p with the most correct frames on the tuning speakers when every utterance is normalised alone; ties go to the smaller.

    Args:
        network: normalised (T, F) -> (T, S) log posteriors.
        splits: features as `extract_features` wrote them, and state ids; the tuning speakers may be in several.
        utt_ids: of the tuning speakers; those without state ids are left out.
        normalisation: of the training data, with any p.

    Returns:
        The best p, and the counts for each candidate.
    """
    counts = dict.fromkeys(sorted(candidates), FrameCounts())
    places = [(store, targets, utt_id) for store, targets in splits for utt_id in utt_ids if utt_id in targets]
    for store, targets, utt_id in progress(places, desc="mean normalisation", unit="utt"):
        raw, reference = raw_features(store, utt_id), np.asarray(targets[utt_id], dtype=np.int64)
        for pseudo_count in counts:
            best = network(replace(normalisation, pseudo_count_frames=pseudo_count)(raw)).argmax(1)
            counts[pseudo_count] += frame_counts(utt_id, reference, best)
    return max(counts, key=lambda pseudo_count: counts[pseudo_count].correct), counts


def _noted_mean(store: FrameStore, utt_id: str) -> NDArray[np.float64]:
    means: Any = store.attributes.get("means", {})
    speakers: Any = store.attributes.get("speakers", {})
    noted = means.get(speakers.get(utt_id), means.get("corpus"))
    if noted is None:
        raise AsrKdError(f"{utt_id}: {store.folder} notes no mean of its speaker; extract the features with cmvn speaker or corpus")
    return np.asarray(noted, dtype=np.float64)
