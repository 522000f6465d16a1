"""What trained networks say about whole utterances: log posteriors, of members and of their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.ensemble import Ensemble
from asr_kd.features import Windows
from asr_kd.precision import precision_context

_CHUNK_ELEMENTS = 16_000_000  # logits of all members that are computed at once


def log_posteriors(networks: Ensemble, windows: Windows, utt_ids: Sequence[str] | None = None) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (utt_id, (T, S) natural log posteriors), of the mean of all members' posteriors; matrix products in float32.

    Args:
        windows: on the networks' device.
        utt_ids: which utterances; all of `windows` by default.
    """
    for utt_id in windows.utt_ids if utt_ids is None else utt_ids:
        yield utt_id, torch.cat([mean_log_posteriors(part) for part in member_log_posteriors(networks, windows, utt_id)]).cpu().numpy()


def member_log_posteriors(networks: Ensemble, windows: Windows, utt_id: str) -> Iterator[Tensor]:
    """Yield natural log posteriors of every member for an utterance, (K, n, S) float32, n frames at a time; matrix products in float32.

    All frames at once would be 2 GB for ten members, 14,000 states and 35 s.
    """
    inputs = windows.utterance(utt_id)
    for part in torch.split(inputs, max(1, _CHUNK_ELEMENTS // (len(networks) * networks.shape.num_states))):
        with torch.no_grad(), precision_context("fp32", inputs.device):
            log_probs = networks(part).log_softmax(-1)
        yield log_probs


def mean_log_posteriors(log_probs: Tensor) -> Tensor:
    """Log of the mean over members of their posteriors, (K, T, S) -> (T, S)."""
    return log_probs[0] if len(log_probs) == 1 else log_probs.logsumexp(0) - math.log(len(log_probs))
