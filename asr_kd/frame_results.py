"""How often the best state is the reference's, for every member of an ensemble and for their mean, with calibration and confusions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.calibration import PosteriorQuality, posterior_quality
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.evaluation import mean_log_posteriors, member_log_posteriors
from asr_kd.features import Windows
from asr_kd.frames import FrameStore
from asr_kd.progress import progress
from asr_kd.score import FrameCounts, frame_confusions, frame_counts


@dataclass
class FrameResult:
    """Frame-level results of one system.

    Attributes:
        counts: utt_id -> frames right and in all.
        quality: of the posteriors as probabilities, over all utterances.
        phone_confusions: (P, P) frames, row = reference phone, over all utterances.
    """

    num_phones: int
    counts: dict[str, FrameCounts] = field(default_factory=dict)
    quality: PosteriorQuality | None = None

    def __post_init__(self) -> None:
        self.phone_confusions: NDArray[np.int64] = np.zeros((self.num_phones, self.num_phones), np.int64)

    @property
    def accuracy(self) -> float:
        """Fraction of right frames over all utterances; `AsrKdError` where there are none."""
        return sum(self.counts.values(), FrameCounts()).accuracy

    def add(self, utt_id: str, reference: NDArray[np.int64], log_posteriors: Tensor, phone_of_state: NDArray[np.int64]) -> None:
        """Count frames of an utterance, some or all: (n,) reference states against (n, S) log posteriors."""
        predicted = log_posteriors.argmax(-1).cpu().numpy()
        self.counts[utt_id] = self.counts.get(utt_id, FrameCounts()) + frame_counts(utt_id, reference, predicted)
        own = posterior_quality(log_posteriors, torch.from_numpy(reference).to(log_posteriors.device))
        self.quality = own if self.quality is None else self.quality + own
        self.phone_confusions += frame_confusions(phone_of_state[reference], phone_of_state[predicted], self.num_phones)


def evaluate_frames(networks: Ensemble, windows: Windows, targets: FrameStore, phone_of_state: NDArray[np.int64]) -> tuple[list[FrameResult], FrameResult]:
    """Results of every member alone and of the mean of their posteriors, over the utterances that have reference states.

    Args:
        targets: reference state ids by utterance; utterances that could not be aligned are not in it and are not counted.
        phone_of_state: (S,) phone number of each state.

    Raises:
        AsrKdError: an utterance has another number of targets than of frames.
    """
    num_phones = int(phone_of_state.max()) + 1
    members, ensemble = [FrameResult(num_phones) for _ in range(len(networks))], FrameResult(num_phones)
    for utt_id in progress([utt_id for utt_id in windows.utt_ids if utt_id in targets], "frame accuracy", unit="utt"):
        reference, (begin, end) = np.asarray(targets[utt_id], dtype=np.int64), windows.span(utt_id)
        if len(reference) != end - begin:
            raise AsrKdError(f"{utt_id}: {len(reference)} targets for {end - begin} frames; run the align stage again")
        done = 0
        for log_posteriors in member_log_posteriors(networks, windows, utt_id):  # (K, n, S)
            part = reference[done : (done := done + log_posteriors.shape[1])]
            for result, own in zip([*members, ensemble], [*log_posteriors, mean_log_posteriors(log_posteriors)], strict=True):
                result.add(utt_id, part, own, phone_of_state)
    return members, ensemble
