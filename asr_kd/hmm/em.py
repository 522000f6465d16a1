"""One pass of EM over a corpus: statistics of aligned frames, and the mixtures that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import from_first_process
from asr_kd.hmm.aligner import GmmHmm
from asr_kd.hmm.corpus import map_chunks
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.gmm import GaussianMixtures, Statistics, accumulate, estimate, grow
from asr_kd.hmm.model import EDGE, SIL, HmmModel

VARIANCE_FLOOR = 0.01
"""Share of the global variance below which no Gaussian's variance falls."""
SILENCE_GAUSSIANS = 16
"""Silence is quiet in one recording and noise in the next: with few Gaussians it would lose one of them to the states of words."""


def expect(model: GmmHmm, frontend: Frontend, codes: Mapping[str, NDArray[np.int32]]) -> Statistics:
    """The E step over the corpus, summed over all processes.

    Args:
        frontend: features as the model wants them.
        codes: utterance id -> (T,) context codes of its frames.
    """
    mixtures = model.mixtures.to(frontend.device)

    def work(chunk: list[str]) -> Statistics:
        return accumulate(mixtures, frames_of(frontend, chunk), states_of(model.hmm, codes, chunk))

    return accumulate_over(work, model.mixtures, codes, frontend, "statistics")


def accumulate_over(work: Callable[[list[str]], Statistics], mixtures: GaussianMixtures, utt_ids: Iterable[str], frontend: Frontend,
                    desc: str) -> Statistics:
    """Statistics of all processes' utterances, chunk by chunk; `desc` names the progress bar."""
    total = Statistics.zero(mixtures.num_gaussians, mixtures.dim)
    for part in map_chunks(work, utt_ids, frontend.store, frontend.device, desc):
        total += part
    return total.over_processes()


def maximise(model: GmmHmm, statistics: Statistics, num_gaussians: int) -> GaussianMixtures:
    """The M step: new mixtures, of `num_gaussians` or a few more in all, as silence has at least `SILENCE_GAUSSIANS`."""
    mixtures = estimate(model.mixtures, statistics, variance_floor(statistics))
    frames = np.add.reduceat(statistics.frames.numpy(), model.mixtures.offsets[:-1])
    least = np.ones(model.hmm.num_states, np.int64)
    least[model.hmm.state_table[EDGE, SIL, EDGE]] = SILENCE_GAUSSIANS
    return from_first_process(grow(mixtures, frames, num_gaussians, least=least))


def variance_floor(statistics: Statistics) -> Tensor:
    """(D,) a share of the variance of all frames."""
    return VARIANCE_FLOOR * moments_of_all(statistics)[1]


def moments_of_all(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of all frames."""
    total = statistics.frames.sum()
    mean = statistics.sums.sum(0) / total
    return mean, statistics.squares.sum(0) / total - mean.square()


def frames_of(frontend: Frontend, utt_ids: list[str]) -> Tensor:
    """(T, D) features of some utterances, one after another."""
    return torch.cat([frontend.frames(utt_id) for utt_id in utt_ids])


def states_of(hmm: HmmModel, codes: Mapping[str, NDArray[np.int32]], utt_ids: list[str]) -> NDArray[np.int32]:
    """(T,) state ids of the same frames."""
    states: NDArray[np.int32] = hmm.flat_table[np.concatenate([codes[utt_id] for utt_id in utt_ids])]
    return states
