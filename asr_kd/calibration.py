"""What posteriors are worth as probabilities: reliability bins, negative log-likelihood and Brier score, as sums that add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.errors import AsrKdError

NUM_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Reliability counts in equal bins of confidence, the highest posterior of a frame (Guo et al. 2017); addable over utterances."""

    frames: NDArray[np.int64]
    correct: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.frames + other.frames, self.correct + other.correct, self.confidence + other.confidence)

    @property
    def expected_calibration_error(self) -> float:
        """Mean over frames of |accuracy - confidence| of the frame's bin."""
        return float(np.abs(self.correct - self.confidence).sum() / max(int(self.frames.sum()), 1))

    def as_json(self) -> dict[str, Any]:
        """What the report reads: `bins` of mean confidence, accuracy and frames (empty bins left out), and `ece`."""
        filled = np.flatnonzero(self.frames)
        bins = [{"confidence": float(self.confidence[b] / self.frames[b]), "accuracy": float(self.correct[b] / self.frames[b]),
                 "frames": int(self.frames[b])} for b in filled]
        return {"ece": self.expected_calibration_error, "bins": bins}


def reliability(confidence: NDArray[np.floating], correct: NDArray[np.bool_], num_bins: int = NUM_BINS) -> Reliability:
    """Count (N,) confidences in [0, 1] and whether each (N,) frame was right."""
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    frames = np.bincount(bins, minlength=num_bins).astype(np.int64)
    right = np.bincount(bins[correct], minlength=num_bins).astype(np.int64)
    return Reliability(frames, right, np.bincount(bins, weights=confidence, minlength=num_bins).astype(np.float64))


@dataclass(frozen=True)
class PosteriorQuality:
    """Sums over frames of posteriors compared with reference states; add them over utterances, divide once.

    Attributes:
        bins: reliability counts and the expected calibration error.
        nll: sum of -log posterior of the reference state, nats.
        brier: sum of the squared distance between the posteriors and the one-hot reference, 0 to 2 per frame.
    """

    bins: Reliability
    nll: float
    brier: float

    def __add__(self, other: PosteriorQuality) -> PosteriorQuality:
        return PosteriorQuality(self.bins + other.bins, self.nll + other.nll, self.brier + other.brier)

    def as_json(self) -> dict[str, Any]:
        """`ece` and `bins` as the report reads them, with `nll` and `brier` per frame beside them."""
        frames = max(1, int(self.bins.frames.sum()))
        return {**self.bins.as_json(), "nll": self.nll / frames, "brier": self.brier / frames}


def posterior_quality(log_posteriors: Tensor, states: Tensor, num_bins: int = NUM_BINS) -> PosteriorQuality:
    """Compare natural-log posteriors (N, S) with reference states (N,).

    Raises:
        AsrKdError: another number of states than frames, or posteriors that do not sum to 1 (logits, for example).

    >>> half = posterior_quality(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1]))
    >>> round(half.nll, 4), half.brier
    (0.6931, 0.5)
    """
    if len(log_posteriors) != len(states):
        raise AsrKdError(f"calibration: {len(log_posteriors)} frames of posteriors for {len(states)} reference states; run the align stage again")
    posteriors = log_posteriors.float().exp()  # (N, S)
    if not torch.allclose(posteriors.sum(1), torch.ones(len(states), device=posteriors.device), atol=1e-2):
        raise AsrKdError("calibration: rows that do not sum to 1, expected log posteriors; apply log_softmax to logits first")
    states = states.long()[:, None]
    confidence, best = posteriors.max(1)
    of_reference = posteriors.gather(1, states)[:, 0]
    bins = reliability(confidence.double().cpu().numpy(), (best == states[:, 0]).cpu().numpy(), num_bins)
    brier = posteriors.square().sum(1) - 2 * of_reference + 1
    return PosteriorQuality(bins, -float(log_posteriors.gather(1, states).double().sum()), float(brier.double().sum()))
