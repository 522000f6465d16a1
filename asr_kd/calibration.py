"""What posteriors are worth as probabilities: reliability bins, negative log-likelihood and Brier score, as sums that add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asr_kd import score
from asr_kd.errors import AsrKdError

NUM_BINS = 15


@dataclass(frozen=True)
class PosteriorQuality:
    """Sums over frames of posteriors compared with reference states; add them over utterances, divide once.

    Attributes:
        bins: reliability counts and the expected calibration error.
        nll: sum of -log posterior of the reference state, nats.
        brier: sum of the squared distance between the posteriors and the one-hot reference, 0 to 2 per frame.
    """

    bins: score.Calibration
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
    bins = score.calibration(confidence.double().cpu().numpy(), (best == states[:, 0]).cpu().numpy(), num_bins)
    brier = posteriors.square().sum(1) - 2 * of_reference + 1
    return PosteriorQuality(bins, -float(log_posteriors.gather(1, states).double().sum()), float(brier.double().sum()))
