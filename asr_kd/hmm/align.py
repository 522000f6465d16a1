"""Alignment of a split, by mixtures or by a network, as state ids and segments on disk; and reading of these as words and phones."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from asr_kd.distributed import by_first_process, concrete_device, from_all_processes, rank, world_size
from asr_kd.errors import AsrKdError
from asr_kd.frames import INDEX, FrameStore, FrameWriter
from asr_kd.hmm.aligner import Aligner
from asr_kd.hmm.corpus import Aligned, Alignments, Graphs, Pronouncer, Scores, align_utterances, chunks, own_utterances, speaker_chunks, usable_utterances
from asr_kd.hmm.features import Features, joined
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.model import HmmModel, split_codes
from asr_kd.lexicon import Pronunciation
from asr_kd.manifest import Exclusion, write_exclusions
from asr_kd.precision import precision_context
from asr_kd.stage import fingerprint, remove_folder

log = logging.getLogger(__name__)

LogLikelihoods = Callable[[str], NDArray[np.floating]]
AlignPart = Callable[[Graphs, list[str]], tuple[Alignments, Alignments]]
"""Aligns some utterances: the states to train networks on, and the same phones with the boundaries that segments are to have."""
EXCLUSIONS = "exclusions.csv"
SEGMENTS = "segments"
PARTS = ".parts.part-0"
"""Named so that a stage that ends removes what is left of it (`asr_kd.stage`)."""
PART_FRAMES = 3_600_000
"""Frames, ten hours, that are aligned and kept before further ones: a run that is cut off loses little, and memory does not grow with the corpus."""
NO_PATH = "no path of finite score"


def align(aligner: Aligner, features: FrameStore | Sequence[FrameStore], transcripts: Mapping[str, Sequence[str]], speakers: Mapping[str, str],
          lexicon: Pronouncer, folder: Path | str, *, device: torch.device | str = "cpu", resume: bool = False) -> list[Exclusion]:
    """Align a split and write its state ids, a FrameStore of () int32, at `folder`, with segments and `exclusions.csv`.

    State ids are those of the triphone alignment; the segments' times come from the boundary models. Networks want the former: on 4 hours
    of read speech, targets moved to the boundaries of the latter raised the word error rate from 24.9 to 26.9 %.

    Of several processes each aligns its share of the speakers, and the first one joins what they wrote.

    Args:
        features: log-mel store that holds the utterances (or several stores).
        transcripts: utterance id -> words.
        speakers: utterance id -> speaker id, for normalisation and adaptation.
        device: where mixtures are evaluated and paths searched for.
        resume: keep what a call that was cut off has aligned in `folder`; its other arguments must have been these, which is not checked.

    Returns:
        The utterances that could not be aligned.
    """
    stores = joined(features)

    def work(graphs: Graphs, utt_ids: list[str]) -> tuple[Alignments, Alignments]:
        with precision_context("fp32", torch.device(device)):
            frontend = Frontend.of(stores, speakers, utt_ids, device)
            found = aligner.align(frontend, graphs, utt_ids)
            return found, aligner.timed(frontend, graphs, found)

    def parts_of(utt_ids: list[str]) -> Iterable[list[str]]:
        return speaker_chunks(own_utterances(utt_ids, speakers, stores), speakers, stores, PART_FRAMES)

    return _align_split(Path(folder), aligner.hmm, lambda: Graphs(transcripts, lexicon, aligner.hmm.phones), stores, parts_of, work, resume)


def align_with_network(hmm: HmmModel, log_likelihoods: LogLikelihoods, features: FrameStore | Sequence[FrameStore], transcripts: Mapping[str, Sequence[str]],
                       lexicon: Pronouncer, folder: Path | str, *, device: torch.device | str = "cpu", resume: bool = False) -> list[Exclusion]:
    """Align a split by a network's scores: as `align`, with `log_likelihoods(utt_id)` the (T, S) log posteriors minus log priors.

    Raises:
        AsrKdError: scores whose shape does not fit the features and the states.
    """
    stores = joined(features)
    place = concrete_device(device)

    def scores_of(utt_id: str) -> Scores:
        table = np.asarray(log_likelihoods(utt_id))
        if table.shape != (stores.length(utt_id), hmm.num_states):
            raise AsrKdError(f"{utt_id}: scores of shape {table.shape} for {stores.length(utt_id)} frames and {hmm.num_states} states; "
                             "score it with a network trained on these states and features")
        return lambda states, span: torch.from_numpy(table[span, states].astype(np.float32)).to(place)

    def work(graphs: Graphs, utt_ids: list[str]) -> tuple[Alignments, Alignments]:
        found = dict(align_utterances(utt_ids, graphs, stores, hmm, scores_of, "align with the network", place))
        return found, found

    def parts_of(utt_ids: list[str]) -> Iterable[list[str]]:
        return chunks(utt_ids[rank() :: world_size()], stores, PART_FRAMES)

    return _align_split(Path(folder), hmm, lambda: Graphs(transcripts, lexicon, hmm.phones), stores, parts_of, work, resume)


def _align_split(folder: Path, hmm: HmmModel, new_graphs: Callable[[], Graphs], features: Features, parts_of: Callable[[list[str]], Iterable[list[str]]],
                 work: AlignPart, resume: bool) -> list[Exclusion]:
    """Align what can be aligned part by part, each into a store of its own, and join them.

    Args:
        new_graphs: gives graphs with an empty cache: it is to hold those of one part.
        parts_of: the parts, of all utterances, that this process aligns.
    """
    usable, exclusions = usable_utterances(new_graphs(), features)
    if not resume:
        by_first_process(lambda: remove_folder(folder / PARTS))
    parts = list(parts_of(usable))
    places = [folder / PARTS / f"{rank()}of{world_size()}-{number}" for number in range(len(parts))]
    for number, (place, utt_ids) in enumerate(zip(places, parts, strict=True)):
        _align_part(place, hmm, new_graphs(), utt_ids, work)
        if len(parts) > 1:
            log.info("%s: part %d of %d aligned", folder, number + 1, len(parts))
    every_place = [place for own in from_all_processes(places) for place in own]
    return by_first_process(lambda: _join(folder, hmm, every_place, usable, exclusions))


def _align_part(folder: Path, hmm: HmmModel, graphs: Graphs, utt_ids: list[str], work: AlignPart) -> None:
    """Align some utterances into a store with segments; what an earlier call has finished stays."""
    key = fingerprint(utt_ids)
    if (folder / INDEX).is_file() and FrameStore(folder).attributes.get("key") == key:
        return
    found, timed = work(graphs, utt_ids)
    log_likelihood = sum(aligned.log_likelihood for aligned in found.values() if aligned is not None)
    attributes: dict[str, object] = {"key": key, "log_likelihood": log_likelihood}
    # the index of the states is written last
    with FrameWriter(folder, (), np.int32, attributes) as writer, FrameWriter(folder / SEGMENTS, (4,), np.int32) as segments:
        for utt_id in utt_ids:
            aligned, placed = found[utt_id], timed[utt_id]
            if aligned is not None and placed is not None:
                writer.append(utt_id, hmm.flat_table[aligned.codes])
                segments.append(utt_id, segment_rows(placed, graphs[utt_id].node_word, len(hmm.phones)))


def _join(folder: Path, hmm: HmmModel, parts: Iterable[Path], utt_ids: Iterable[str], exclusions: Sequence[Exclusion]) -> list[Exclusion]:
    """Make one store of the parts, in the order of `utt_ids`, and remove them; returns all exclusions, those without a path included."""
    stores = [FrameStore(part) for part in parts]
    part_of = {utt_id: (store, segments) for store in stores for segments in [FrameStore(store.folder / SEGMENTS)] for utt_id in store}
    excluded = [*exclusions]
    attributes: dict[str, object] = {"num_states": hmm.num_states, "phones": list(hmm.phones)}
    with FrameWriter(folder / SEGMENTS, (4,), np.int32, attributes) as segments, FrameWriter(folder, (), np.int32, attributes) as writer:
        for utt_id in utt_ids:
            if utt_id not in part_of:
                excluded.append(Exclusion(utt_id, NO_PATH))
                continue
            own, own_segments = part_of[utt_id]
            writer.append(utt_id, own[utt_id])
            segments.append(utt_id, own_segments[utt_id])
    write_exclusions(folder / EXCLUSIONS, excluded)
    frames = sum(len(store.frames) for store in stores)
    log_likelihood = sum(cast(float, store.attributes["log_likelihood"]) for store in stores)
    log.info("%s: %d frames aligned, log-likelihood per frame %.3f, %d utterances left out%s", folder, frames, log_likelihood / max(frames, 1), len(excluded),
             f" (listed in {folder / EXCLUSIONS})" if excluded else "")
    remove_folder(folder / PARTS)
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
        return [(word, own[0][2], own[-1][3]) for word, own in zip(transcript, self._rows_of_words(utt_id, transcript), strict=True)]

    def pronunciations(self, utt_id: str, transcript: Sequence[str]) -> list[tuple[str, Pronunciation]]:
        """(word, phones that it was aligned to) of an utterance; errors as of `words`."""
        rows_of_words = self._rows_of_words(utt_id, transcript)
        return [(word, tuple(self._phones[row[0] - 1] for row in own)) for word, own in zip(transcript, rows_of_words, strict=True)]

    def pauses(self, utt_id: str, transcript: Sequence[str]) -> list[tuple[str, bool]]:
        """(word, whether silence follows it) of an utterance, `<s>` for its start first; errors as of `words`."""
        self._rows_of_words(utt_id, transcript)
        start = len(transcript)
        order = [start, *(word for word, _ in itertools.groupby(row[1] for row in self._store[utt_id].tolist()))]
        followed = {before for before, after in itertools.pairwise(order) if after < 0}
        return [("<s>", start in followed), *((word, position in followed) for position, word in enumerate(transcript))]

    def _rows_of_words(self, utt_id: str, transcript: Sequence[str]) -> list[list[list[int]]]:
        """What `segment_rows` found of each word."""
        found: list[list[list[int]]] = []
        for word, rows in itertools.groupby(self._store[utt_id].tolist(), key=operator.itemgetter(1)):
            if word >= 0:
                found.append(list(rows))
        if len(found) != len(transcript):
            raise AsrKdError(f"{utt_id}: {len(transcript)} words in the transcript, {len(found)} in the alignment; run the align stage again")
        return found


def with_state_priors(hmm: HmmModel, targets: Iterable[FrameStore], utt_ids: Iterable[str]) -> HmmModel:
    """The model with log priors from the state counts of these utterances' alignments, wherever they are in the stores."""
    counts, wanted = np.zeros(hmm.num_states), set(utt_ids)
    for store in targets:
        for utt_id in wanted.intersection(store.utt_ids):
            counts += np.bincount(store[utt_id], minlength=hmm.num_states)
    return hmm.with_counts(counts)
