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


@torch.no_grad()
def log_posteriors(networks: Ensemble, windows: Windows, utt_ids: Sequence[str] | None = None) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (utt_id, (T, S) natural log posteriors), of the mean of all members' posteriors; matrix products in float32.

    Args:
        windows: on the networks' device.
        utt_ids: which utterances; all of `windows` by default.
    """
    for utt_id in windows.utt_ids if utt_ids is None else utt_ids:
        with precision_context("fp32", networks.input_mean.device):
            parts = [mean_log_posteriors(log_probs) for log_probs in _chunks(networks, windows.utterance(utt_id))]
        yield utt_id, torch.cat(parts).cpu().numpy()


def member_log_posteriors(networks: Ensemble, windows: Windows, utt_id: str) -> Tensor:
    """Natural log posteriors of every member for one utterance, (K, T, S) float32."""
    with torch.no_grad():
        return torch.cat(list(_chunks(networks, windows.utterance(utt_id))), 1)


def _chunks(networks: Ensemble, inputs: Tensor) -> Iterator[Tensor]:
    """Log posteriors of every member, (K, T, S) in float32, for a few frames at a time."""
    chunk_frames = max(1, _CHUNK_ELEMENTS // (len(networks) * networks.shape.num_states))
    for part in torch.split(inputs, chunk_frames):
        yield networks(part).float().log_softmax(-1)


def mean_log_posteriors(log_probs: Tensor) -> Tensor:
    """Log of the mean over members of their posteriors, (K, T, S) -> (T, S)."""
    return log_probs[0] if len(log_probs) == 1 else log_probs.logsumexp(0) - math.log(len(log_probs))
