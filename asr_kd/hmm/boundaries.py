"""Models that find where phones begin and end once it is known which phones were spoken.

Cepstra spliced over nine frames, with LDA on top, tell phones apart but know of a sound 40 ms before it is there: after a pause, words
are found early. So the last word on boundaries has a pair of small monophone models: first on single frames, then on frames with their
slopes, each trained on the alignments that it improves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from asr_kd.hmm.aligner import GmmHmm, learn_transitions, move_boundaries
from asr_kd.hmm.corpus import Aligned, Graphs
from asr_kd.hmm.em import expect, maximise, moments_of_all
from asr_kd.hmm.frontend import NUM_CEPSTRA, SPLICE, Frontend
from asr_kd.hmm.gmm import single_gaussians
from asr_kd.hmm.model import untied_model

log = logging.getLogger(__name__)

STAGES = ((False, 3), (True, 10))
"""Whether frames have slopes, and how often boundaries are moved."""
FIRST_PASSES = 6
"""Passes of EM before boundaries are moved for the first time; there is one before each further time."""


def train_boundaries(frontend: Frontend, graphs: Graphs, aligned: Mapping[str, Aligned], phones: tuple[str, ...], num_gaussians: int) -> tuple[GmmHmm, ...]:
    """Train the models, to be used one after the other (`asr_kd.hmm.aligner.move_boundaries`).

    Args:
        frontend: cepstra of the utterances; projection and adaptation play no part.
        aligned: utterance id -> alignment, nodes included, of this process's utterances.
        phones: of the HMM, SIL first.
        num_gaussians: of each model.
    """
    num_words = sum(len(graphs.transcripts[utt_id]) for utt_id in aligned)
    models = []
    for has_slopes, times in STAGES:
        projection = narrow_projection(has_slopes)
        view = frontend.projected(projection)
        hmm = untied_model(phones)
        dim = projection.shape[1]
        model = GmmHmm(hmm, single_gaussians(torch.zeros(hmm.num_states, dim), torch.ones(hmm.num_states, dim)), projection)
        for time in range(times):
            codes = {utt_id: own.codes for utt_id, own in aligned.items()}
            hmm = learn_transitions(hmm, codes.values(), num_words)
            for number in range(1, (FIRST_PASSES if time == 0 else 1) + 1):
                statistics = expect(model, view, codes)
                if time == 0 and number == 1:  # a phone that is not in these utterances keeps the Gaussian of all frames
                    model = replace(model, mixtures=single_gaussians(*(moment.expand(hmm.num_states, -1) for moment in moments_of_all(statistics))))
                grown = num_gaussians if time else hmm.num_states + (num_gaussians - hmm.num_states) * number // FIRST_PASSES
                model = GmmHmm(hmm, maximise(model, statistics, max(grown, hmm.num_states)), projection)
            log.info("boundaries %s %d: log-likelihood per frame %.4f, %d Gaussians", "with slopes" if has_slopes else "of frames", time + 1,
                     statistics.log_likelihood / statistics.num_frames, model.mixtures.num_gaussians)
            aligned = {utt_id: own for utt_id, own in move_boundaries(model, frontend, graphs, aligned).items() if own is not None}
        models.append(model)
    return tuple(models)


def narrow_projection(has_slopes: bool) -> Tensor:
    """(9 · 13, 13 or 26) from spliced cepstra to those of the middle frame, and their regression slopes over five frames."""
    projection = torch.zeros(2 * SPLICE + 1, NUM_CEPSTRA, 2 * NUM_CEPSTRA)
    projection[SPLICE, :, :NUM_CEPSTRA] = torch.eye(NUM_CEPSTRA)
    for k in (-2, -1, 1, 2):
        projection[SPLICE + k, :, NUM_CEPSTRA:] = torch.eye(NUM_CEPSTRA) * (k / 10)
    return projection[:, :, : (2 if has_slopes else 1) * NUM_CEPSTRA].flatten(0, 1).contiguous()
