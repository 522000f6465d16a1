"""Models that align speech with its transcript: Gaussian mixtures of tied states, adapted to speakers, and models of boundaries."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import add_over_processes
from asr_kd.errors import AsrKdError
from asr_kd.hmm.corpus import Aligned, Alignments, FixedPhones, Graphs, GraphSource, align_utterances, chunk_frames, chunks, map_threads, mixture_scores
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.gmm import GaussianMixtures
from asr_kd.hmm.model import EDGE, SIL, STATES_PER_PHONE, HmmModel, read_tensors, split_codes, write_tensors
from asr_kd.hmm.transforms import MIN_SPEAKER_FRAMES, TransformStatistics, fmllr
from asr_kd.progress import progress

log = logging.getLogger(__name__)

ADAPTATIONS = 2
"""Times that speakers are adapted to and aligned again."""
MAX_SILENCE_LEAVE = 0.1
"""Largest probability of leaving a state of silence: the closure of a stop is no pause between words."""


@dataclass(frozen=True, eq=False)
class GmmHmm:
    """A Gaussian mixture model of tied states with the projection of its features (None: cepstra with deltas)."""

    hmm: HmmModel
    mixtures: GaussianMixtures
    projection: Tensor | None = None

    def save(self, folder: Path | str) -> None:
        """Write it into `folder`."""
        self.hmm.save(folder)
        tensors = {"weights": self.mixtures.weights.numpy(), "means": self.mixtures.means.numpy(), "variances": self.mixtures.variances.numpy(),
                   "offsets": self.mixtures.offsets}
        if self.projection is not None:
            tensors["projection"] = self.projection.numpy()
        write_tensors(Path(folder) / "mixtures.safetensors", tensors)

    @staticmethod
    def load(folder: Path | str) -> GmmHmm:
        """Read what `save` wrote.

        Raises:
            AsrKdError: a file is missing or damaged.
        """
        tensors = read_tensors(Path(folder) / "mixtures.safetensors")
        missing = {"weights", "means", "variances", "offsets"} - tensors.keys()
        if missing:
            raise AsrKdError(f"{folder}: mixtures without {', '.join(sorted(missing))}; run the stage that writes them again")
        weights, means, variances = (torch.from_numpy(tensors[name]) for name in ("weights", "means", "variances"))
        projection = torch.from_numpy(tensors["projection"]) if "projection" in tensors else None
        return GmmHmm(HmmModel.load(folder), GaussianMixtures(weights, means, variances, tensors["offsets"].astype(np.int64)), projection)


@dataclass(frozen=True, eq=False)
class Aligner:
    """Aligns speech of any speaker with its transcript.

    Attributes:
        independent: model for speech that is not adapted.
        adapted: model trained on speaker-adapted features; None when training had no such pass.
        boundaries: models that move the boundaries of the phones found, one after the other (`asr_kd.hmm.boundaries`).
    """

    independent: GmmHmm
    adapted: GmmHmm | None = None
    boundaries: tuple[GmmHmm, ...] = ()

    @property
    def hmm(self) -> HmmModel:
        """The state inventory of the alignments."""
        return (self.adapted or self.independent).hmm

    def save(self, folder: Path | str) -> None:
        """Write the models into `folder`/independent, `folder`/adapted and `folder`/boundaries0, 1 ..."""
        self.independent.save(Path(folder) / "independent")
        if self.adapted is not None:
            self.adapted.save(Path(folder) / "adapted")
        for number, model in enumerate(self.boundaries):
            model.save(Path(folder) / f"boundaries{number}")

    @staticmethod
    def load(folder: Path | str) -> Aligner:
        """Read what `save` wrote; a missing or damaged file is an `AsrKdError`."""
        folder = Path(folder)
        adapted = GmmHmm.load(folder / "adapted") if (folder / "adapted").is_dir() else None
        return Aligner(GmmHmm.load(folder / "independent"), adapted, tuple(GmmHmm.load(place) for place in sorted(folder.glob("boundaries?"))))

    def align(self, frontend: Frontend, graphs: Graphs, utt_ids: Sequence[str]) -> dict[str, Aligned | None]:
        """Align utterances; with an adapted model a first alignment serves to adapt to each speaker. None where there is no path.

        The result has the states to train networks on. `timed` makes of it what tells times.
        """
        found = align_with(self.independent, frontend, graphs, utt_ids)
        if self.adapted is None:
            return found
        adapted = frontend.projected(self.adapted.projection)
        for _ in range(ADAPTATIONS):
            adapted = adapted.adapted(speaker_transforms(self.adapted, adapted, {u: aligned.codes for u, aligned in found.items() if aligned is not None}))
            found = align_with(self.adapted, adapted, graphs, utt_ids, guide=found)
        return found

    def timed(self, frontend: Frontend, graphs: Graphs, found: Alignments) -> Alignments:
        """The same phones with their boundaries where the boundary models see them."""
        for model in self.boundaries:
            found = move_boundaries(model, frontend, graphs, found)
        return found


def align_with(model: GmmHmm, frontend: Frontend, graphs: GraphSource, utt_ids: Sequence[str], *,
               guide: Alignments | None = None) -> dict[str, Aligned | None]:
    """One alignment pass by a mixture model; a frontend of another projection is projected, one of the same is used with its transforms."""
    if frontend.projection is not model.projection:
        frontend = frontend.projected(model.projection)
    return dict(align_utterances(utt_ids, graphs, frontend.store, model.hmm, mixture_scores(frontend, model.mixtures), "align",
                                 frontend.device, guide))


def move_boundaries(model: GmmHmm, frontend: Frontend, graphs: GraphSource, found: Alignments) -> dict[str, Aligned | None]:
    """Align the same phones again, so that only their boundaries move; what has no path by this model, or had none, stays as it is.

    The log-likelihoods remain those of the models that chose the phones.
    """
    aligned = {utt_id: own for utt_id, own in found.items() if own is not None}
    fixed = FixedPhones(graphs, aligned)
    moved = align_with(model, frontend, fixed, list(aligned), guide={utt_id: fixed.enter(own) for utt_id, own in aligned.items()})
    better = {utt_id: replace(fixed.leave(utt_id, own), log_likelihood=aligned[utt_id].log_likelihood) for utt_id, own in moved.items() if own is not None}
    return {**found, **better}


def speaker_transforms(model: GmmHmm, frontend: Frontend, codes: Mapping[str, NDArray[np.int32]]) -> dict[str, Tensor]:
    """Speaker id -> fMLLR transform (D, D + 1) from alignments (context codes); silence frames are left out, as it says little about a voice.

    The posteriors come from the features as `frontend` adapts them now. Speakers with too little or degenerate speech have no entry; they are
    counted in the log.
    """
    by_speaker: dict[str, list[str]] = {}
    for utt_id in codes:
        by_speaker.setdefault(frontend.speakers[utt_id], []).append(utt_id)

    mixtures = model.mixtures.to(frontend.device)

    def work(speaker: str) -> tuple[str, Tensor | None]:
        sums = TransformStatistics(mixtures.dim)
        for chunk in chunks(sorted(by_speaker[speaker]), frontend.store, chunk_frames(frontend.device)):
            path = np.concatenate([codes[utt_id] for utt_id in chunk])
            speech = split_codes(path, len(model.hmm.phones))[1] != SIL
            raw = torch.cat([frontend.unadapted(utt_id) for utt_id in chunk])[torch.from_numpy(speech).to(frontend.device)]
            sums.add(mixtures, raw, frontend.transformed(speaker, raw), model.hmm.flat_table[path[speech]])
        return speaker, fmllr(sums)

    found = progress(map_threads(work, sorted(by_speaker), frontend.device), "fMLLR", total=len(by_speaker), unit="speaker")
    transforms = {speaker: transform for speaker, transform in found if transform is not None}
    if len(transforms) < len(by_speaker):
        log.info("%d of %d speakers are not adapted to: fewer than %d frames of speech, or constant or repeated ones", len(by_speaker) - len(transforms),
                 len(by_speaker), MIN_SPEAKER_FRAMES)
    return transforms


def learn_transitions(hmm: HmmModel, codes: Iterable[NDArray[np.int32]], num_words: int) -> HmmModel:
    """The model with transition probabilities, silence between words, and priors counted in the alignments (context codes) of all processes.

    A state left with chance p each frame lasts 1 / p frames on average, so p is visits per frame.
    """
    frames, visits = np.zeros(hmm.num_states), np.zeros(hmm.num_states)
    silences = edges = utterances = 0
    for path in codes:
        tied = hmm.flat_table[path]
        is_first = np.diff(path, prepend=-1) != 0
        frames += np.bincount(tied, minlength=hmm.num_states)
        visits += np.bincount(tied[is_first], minlength=hmm.num_states)
        silent = split_codes(path, len(hmm.phones))[1] == SIL
        silences += int((silent & is_first & (path % STATES_PER_PHONE == 0)).sum())
        edges += int(silent[0]) + int(silent[-1])
        utterances += 1
    others = torch.tensor([silences, edges, utterances, num_words])
    add_over_processes([torch.from_numpy(frames), torch.from_numpy(visits), others])
    silences, edges, utterances, num_words = others.tolist()
    leave = np.clip((visits + 1.0) / (frames + 2.0), 0.01, 0.99)
    silence_states = hmm.state_table[EDGE, SIL, EDGE]
    leave[silence_states] = np.minimum(leave[silence_states], MAX_SILENCE_LEAVE)
    between = np.clip((silences - edges + 1.0) / (num_words - utterances + 2.0), 0.001, 0.95)
    learned = replace(hmm, log_advance=np.log(leave).astype(np.float32), log_self_loop=np.log1p(-leave).astype(np.float32),
                      log_optional_silence=float(np.log(between)))
    return learned.with_counts(frames)
