"""Alignment of a corpus: by the trained mixtures, speaker by speaker, or by a network; and reading of alignments as words and phones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import add_over_processes, at_first_process, by_first_process, concrete_device, rank, world_size
from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.corpus import (
    Aligned,
    FixedPhones,
    Graphs,
    GraphSource,
    Pronouncer,
    Scores,
    align_utterances,
    chunk_frames,
    chunks,
    map_threads,
    mixture_scores,
    own_utterances,
)
from asr_kd.hmm.features import Features, joined
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.gmm import GaussianMixtures
from asr_kd.hmm.model import EDGE, SIL, STATES_PER_PHONE, HmmModel, read_tensors, split_codes, write_tensors
from asr_kd.hmm.transforms import MIN_SPEAKER_FRAMES, TransformStatistics, fmllr
from asr_kd.manifest import Exclusion, write_exclusions
from asr_kd.precision import precision_context
from asr_kd.progress import progress

log = logging.getLogger(__name__)

LogLikelihoods = Callable[[str], NDArray[np.floating]]
EXCLUSIONS = "exclusions.csv"
SEGMENTS = "segments"
ADAPTATIONS = 2
"""Times that speakers are adapted to and aligned again."""
MAX_SILENCE_LEAVE = 0.1
"""Largest probability of leaving a state of silence: the closure of a stop is no pause between words."""
NO_PATH = "no path of finite score"


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

    def timed(self, frontend: Frontend, graphs: Graphs, found: Mapping[str, Aligned | None]) -> Mapping[str, Aligned | None]:
        """The same phones with their boundaries where the boundary models see them."""
        for model in self.boundaries:
            found = move_boundaries(model, frontend, graphs, found)
        return found


def align_with(model: GmmHmm, frontend: Frontend, graphs: GraphSource, utt_ids: Sequence[str], *,
               guide: Mapping[str, Aligned | None] | None = None) -> dict[str, Aligned | None]:
    """One alignment pass by a mixture model; a frontend of another projection is projected, one of the same is used with its transforms."""
    if frontend.projection is not model.projection:
        frontend = frontend.projected(model.projection)
    return dict(align_utterances(utt_ids, graphs, frontend.store, model.hmm, mixture_scores(frontend, model.mixtures), "align",
                                 frontend.device, guide))


def move_boundaries(model: GmmHmm, frontend: Frontend, graphs: GraphSource, found: Mapping[str, Aligned | None]) -> dict[str, Aligned | None]:
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


def align(aligner: Aligner, features: FrameStore | Sequence[FrameStore], transcripts: Mapping[str, Sequence[str]], speakers: Mapping[str, str],
          lexicon: Pronouncer, folder: Path | str, *, device: torch.device | str = "cpu") -> list[Exclusion]:
    """Align a split and write its state ids, a FrameStore of () int32, at `folder`, with segments and `exclusions.csv`.

    State ids are those of the triphone alignment; the segments' times come from the boundary models. Networks want the former: on 4 hours
    of read speech, targets moved to the boundaries of the latter raised the word error rate from 24.9 to 26.9 %.

    Of several processes each aligns its share of the speakers, and the first one writes.

    Args:
        features: log-mel store that holds the utterances (or several stores).
        transcripts: utterance id -> words.
        speakers: utterance id -> speaker id, for normalisation and adaptation.
        device: where mixtures are evaluated and paths searched for.

    Returns:
        The utterances that could not be aligned.
    """
    graphs = Graphs(transcripts, lexicon, aligner.hmm.phones)
    stores = joined(features)
    usable, exclusions = usable_utterances(graphs, stores)
    own = own_utterances(usable, speakers, stores)
    if not own:
        return write_alignments(folder, aligner.hmm, graphs, usable, {}, {}, exclusions)
    with precision_context("fp32", torch.device(device)):
        frontend = Frontend.of(stores, speakers, own, device)
        found = aligner.align(frontend, graphs, own)
        timed = aligner.timed(frontend, graphs, found)
    return write_alignments(folder, aligner.hmm, graphs, usable, found, timed, exclusions)


def align_with_network(hmm: HmmModel, log_likelihoods: LogLikelihoods, features: FrameStore | Sequence[FrameStore], transcripts: Mapping[str, Sequence[str]],
                       lexicon: Pronouncer, folder: Path | str, *, acoustic_scale: float = 1.0, device: torch.device | str = "cpu") -> list[Exclusion]:
    """Align a split by a network's scores: as `align`, with `log_likelihoods(utt_id)` the (T, S) log posteriors minus log priors.

    Raises:
        AsrKdError: scores whose shape does not fit the features and the states.
    """
    graphs = Graphs(transcripts, lexicon, hmm.phones)
    stores = joined(features)
    usable, exclusions = usable_utterances(graphs, stores)

    place = concrete_device(device)

    def scores_of(utt_id: str) -> Scores:
        table = np.asarray(log_likelihoods(utt_id))
        if table.shape != (stores.length(utt_id), hmm.num_states):
            raise AsrKdError(f"{utt_id}: scores of shape {table.shape} for {stores.length(utt_id)} frames and {hmm.num_states} states; "
                             "score it with a network trained on these states and features")
        return lambda states, span: torch.from_numpy(table[span, states].astype(np.float32) * np.float32(acoustic_scale)).to(place)

    own = usable[rank() :: world_size()]
    found = dict(align_utterances(own, graphs, stores, hmm, scores_of, "align with the network", place))
    return write_alignments(folder, hmm, graphs, usable, found, found, exclusions)


def usable_utterances(graphs: Graphs, features: Features) -> tuple[list[str], list[Exclusion]]:
    """Utterances with a transcript that can be aligned, in the order of the transcripts, and the others with the reason."""
    problems = {utt_id: graphs.problem(utt_id, features) for utt_id in graphs.transcripts}
    usable = [utt_id for utt_id, problem in problems.items() if problem is None]
    return usable, [Exclusion(utt_id, problem) for utt_id, problem in problems.items() if problem is not None]


def write_alignments(folder: Path | str, hmm: HmmModel, graphs: Graphs, utt_ids: Iterable[str],
                     found: Mapping[str, Aligned | None], timed: Mapping[str, Aligned | None], exclusions: Sequence[Exclusion]) -> list[Exclusion]:
    """Write state ids, segments and exclusions; returns all exclusions, those without a path included.

    Args:
        found: alignments of this process's share of the utterances; the first process writes those of all.
        timed: the same with the boundaries that segments are to have.
    """
    merged = {utt_id: pair for part in at_first_process({utt_id: (own, timed[utt_id]) for utt_id, own in found.items()}) for utt_id, pair in part.items()}
    return by_first_process(lambda: _write(Path(folder), hmm, graphs, utt_ids, merged, exclusions))


def _write(folder: Path, hmm: HmmModel, graphs: Graphs, utt_ids: Iterable[str], found: Mapping[str, tuple[Aligned | None, Aligned | None]],
           exclusions: Sequence[Exclusion]) -> list[Exclusion]:
    excluded = [*exclusions]
    frames, log_likelihood = 0, 0.0
    attributes: dict[str, object] = {"num_states": hmm.num_states, "phones": list(hmm.phones)}
    with FrameWriter(folder / SEGMENTS, (4,), np.int32, attributes) as segments, FrameWriter(folder, (), np.int32, attributes) as writer:
        for utt_id in utt_ids:
            aligned, placed = found[utt_id]
            if aligned is None or placed is None:
                excluded.append(Exclusion(utt_id, NO_PATH))
                continue
            writer.append(utt_id, hmm.flat_table[aligned.codes])
            segments.append(utt_id, segment_rows(placed, graphs[utt_id].node_word, len(hmm.phones)))
            frames += len(aligned.codes)
            log_likelihood += aligned.log_likelihood
    write_exclusions(folder / EXCLUSIONS, excluded)
    log.info("%s: %d frames aligned, log-likelihood per frame %.3f, %d utterances left out%s", folder, frames, log_likelihood / max(frames, 1), len(excluded),
             f" (listed in {folder / EXCLUSIONS})" if excluded else "")
    return excluded


def segment_rows(aligned: Aligned, node_word: NDArray[np.int32], num_phones: int) -> NDArray[np.int32]:
    """(segments, 4): phone id, position of the word (-1 in silence), first frame, one past the last frame."""
    starts = np.flatnonzero(np.diff(aligned.nodes, prepend=-1))
    ends = np.append(starts[1:], len(aligned.nodes))
    _, centre, _, _ = split_codes(aligned.codes[starts], num_phones)
    return np.stack([centre, node_word[aligned.nodes[starts]], starts, ends], 1).astype(np.int32)


class Segments:
    """Phones and words of alignments with their frames.

    Args:
        folder: where alignments were written.

    Raises:
        AsrKdError: no alignments there.
    """

    def __init__(self, folder: Path | str) -> None:
        self._store = FrameStore(Path(folder) / SEGMENTS)
        phones = self._store.attributes["phones"]
        assert isinstance(phones, list)
        self._phones: list[str] = phones

    def phones(self, utt_id: str) -> list[tuple[str, int, int]]:
        """(phone, first frame, one past the last frame) of an utterance, silence as SIL."""
        return [(self._phones[phone - 1], start, end) for phone, _, start, end in self._store[utt_id].tolist()]

    def words(self, utt_id: str, transcript: Sequence[str]) -> list[tuple[str, int, int]]:
        """(word, first frame, one past the last frame) of an utterance, silence left out.

        Raises:
            AsrKdError: the transcript has another number of words than the alignment.
        """
        rows = self._store[utt_id].astype(np.int64)
        positions = rows[:, 1][rows[:, 1] >= 0]
        if len(np.unique(positions)) != len(transcript):
            raise AsrKdError(f"{utt_id}: {len(transcript)} words in the transcript, {len(np.unique(positions))} in the alignment; run the align stage again")
        return [(word, int(own[0, 2]), int(own[-1, 3])) for w, word in enumerate(transcript) for own in [rows[rows[:, 1] == w]]]


def state_priors(hmm: HmmModel, targets: Iterable[FrameStore], utt_ids: Iterable[str]) -> HmmModel:
    """The model with log priors from the state counts of these utterances' alignments, wherever they are in the stores."""
    counts, wanted = np.zeros(hmm.num_states), set(utt_ids)
    for store in targets:
        for utt_id in wanted.intersection(store.utt_ids):
            counts += np.bincount(store[utt_id], minlength=hmm.num_states)
    return hmm.with_counts(counts)


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
        silent = (split_codes(path, len(hmm.phones))[1] == SIL)
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
