"""Counts that add up: word errors, correct frames, confusions; bootstrap intervals and comparisons over them.

Rates are never averaged: counts are added over utterances (or speakers, or seeds) and divided once.

>>> per_utterance = score_split({"u1": "a cat sat".split(), "u2": ["yes"]}, {"u1": "a cat sat down".split(), "u2": []})
>>> sum(per_utterance.values(), WordErrors())
WordErrors(substitutions=0, deletions=1, insertions=1, words=4)
>>> sum(per_utterance.values(), WordErrors()).wer
0.5
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, TypeVar

import jiwer
import numpy as np
from numpy.typing import NDArray

from asr_kd.errors import AsrKdError

Words = Sequence[str]
MIN_SPEAKERS = 10
"""Fewer speakers than this cannot stand for a population: then utterances are resampled instead."""
REPLICATES = 10_000


@dataclass(frozen=True)
class WordErrors:
    """Errors against `words` reference words; add counts, divide once."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(self.substitutions + other.substitutions, self.deletions + other.deletions,
                          self.insertions + other.insertions, self.words + other.words)

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Fraction, may exceed 1; `AsrKdError` when there are no reference words."""
        return _divide(self.errors, self.words, "word error rate of no reference words; check the transcripts of the split")

    @property
    def fraction(self) -> tuple[int, int]:
        return self.errors, self.words

    def as_json(self) -> dict[str, Any]:
        """`errors`, `words` and `wer`, as results.json has them."""
        return {"errors": self.errors, "words": self.words, "wer": self.wer}


@dataclass(frozen=True)
class FrameCounts:
    """Frames whose best state is the reference state."""

    correct: int = 0
    frames: int = 0

    def __add__(self, other: FrameCounts) -> FrameCounts:
        return FrameCounts(self.correct + other.correct, self.frames + other.frames)

    @property
    def accuracy(self) -> float:
        """Fraction; `AsrKdError` when there are no frames."""
        return _divide(self.correct, self.frames, "frame accuracy of no frames; check that the split could be aligned")

    @property
    def fraction(self) -> tuple[int, int]:
        return self.correct, self.frames


Counts = WordErrors | FrameCounts
AnyCounts = TypeVar("AnyCounts", WordErrors, FrameCounts)


def word_errors(reference: Words, hypothesis: Words) -> WordErrors:
    """Errors of one hypothesis under the minimum edit distance; either side may be empty.

    >>> word_errors("THE CAT SAT".split(), "THE HAT SAT DOWN".split())
    WordErrors(substitutions=1, deletions=0, insertions=1, words=3)
    """
    return _count(reference, next(_edits([reference], [hypothesis])))


def score_split(references: Mapping[str, Words], hypotheses: Mapping[str, Words]) -> dict[str, WordErrors]:
    """Word errors of every reference utterance, in the references' order.

    Raises:
        AsrKdError: an utterance has no hypothesis, or a hypothesis has no reference.
    """
    aligned = _aligned(references, hypotheses)
    return {utt_id: _count(references[utt_id], edits) for utt_id, edits in aligned}


@dataclass
class WordConfusions:
    """What was mistaken for what, counted over a split."""

    substitutions: Counter[tuple[str, str]] = field(default_factory=Counter)
    deletions: Counter[str] = field(default_factory=Counter)
    insertions: Counter[str] = field(default_factory=Counter)


def word_confusions(references: Mapping[str, Words], hypotheses: Mapping[str, Words]) -> WordConfusions:
    """Substituted pairs (reference word, recognised word), deleted and inserted words; arguments and errors as `score_split`."""
    confusions = WordConfusions()
    for _, edits in _aligned(references, hypotheses):
        for spoken, recognised in edits:
            if spoken and recognised:
                confusions.substitutions.update(zip(spoken, recognised, strict=True))
            confusions.deletions.update(spoken if not recognised else ())
            confusions.insertions.update(recognised if not spoken else ())
    return confusions


def frame_counts(utt_id: str, reference: NDArray[np.integer], predicted: NDArray[np.integer]) -> FrameCounts:
    """Correct frames of one utterance: (T,) state ids against (T,) state ids.

    Raises:
        AsrKdError: the lengths differ.
    """
    if reference.shape != predicted.shape:
        raise AsrKdError(f"{utt_id}: {len(reference)} targets for {len(predicted)} frames; run the align stage again")
    return FrameCounts(int((reference == predicted).sum()), len(reference))


def frame_confusions(reference: NDArray[np.integer], predicted: NDArray[np.integer], num_classes: int) -> NDArray[np.int64]:
    """(N,) classes against (N,) classes -> (num_classes, num_classes) frame counts, row = reference; add them over utterances.

    Phones instead of states: pass `phone_of_state[states]`.
    """
    pairs = reference.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)  # (C, C)


def top_confusions(confusions: NDArray[np.int64], names: Sequence[str], limit: int = 20) -> list[dict[str, Any]]:
    """The most frequent wrong pairs of a (C, C) matrix, as the rows that the report reads.

    Each row: `reference`, `predicted`, `frames`, and `share`, the fraction of the reference class's frames that went there.
    """
    wrong = confusions.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = [divmod(int(cell), len(wrong)) for cell in order]
    return [{"reference": names[spoken], "predicted": names[heard], "frames": int(wrong[spoken, heard]),
             "share": float(wrong[spoken, heard] / confusions[spoken].sum())} for spoken, heard in cells if wrong[spoken, heard] > 0]


def per_speaker(errors: Mapping[str, WordErrors], speakers: Mapping[str, str]) -> dict[str, WordErrors]:
    """Add up utterances by speaker, speakers sorted.

    Raises:
        AsrKdError: an utterance has no speaker.
    """
    unknown = errors.keys() - speakers.keys()
    if unknown:
        raise AsrKdError(f"{min(unknown)}: no speaker ({len(unknown)} such utterances); score against the manifest of the split that was decoded")
    totals: dict[str, WordErrors] = {}
    for utt_id, counts in errors.items():
        totals[speakers[utt_id]] = totals.get(speakers[utt_id], WordErrors()) + counts
    return dict(sorted(totals.items()))


def pool(systems: Sequence[Mapping[str, AnyCounts]]) -> dict[str, AnyCounts]:
    """Add several systems' counts per utterance: the pooled rate is the mean of their rates, as all have the same references.

    Raises:
        AsrKdError: no systems, or they were scored on different utterances.
    """
    if not systems:
        raise AsrKdError("pool: no systems, expected the counts of at least one; decode at least one member")
    for system in systems[1:]:
        _same_utterances(systems[0], system)
    return {utt_id: reduce(add, (system[utt_id] for system in systems)) for utt_id in systems[0]}


def bootstrap_ci95(counts: Mapping[str, Counts], speakers: Mapping[str, str] | None = None, seed: int = 0,
                   replicates: int = REPLICATES) -> tuple[float, float]:
    """95 % percentile interval of the pooled rate (WER or frame accuracy) by the bootstrap of Bisani & Ney (ICASSP 2004).

    Args:
        counts: utt_id -> counts.
        speakers: utt_id -> speaker; with at least `MIN_SPEAKERS` of them whole speakers are drawn, otherwise utterances.

    Raises:
        AsrKdError: nothing was scored.
    """
    numerators, denominators = _blocks(counts, speakers)
    rates = np.concatenate([numerators[draw].sum(1) / np.maximum(denominators[draw].sum(1), 1) for draw in _draws(len(numerators), seed, replicates)])
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def probability_better(ours: Mapping[str, WordErrors], theirs: Mapping[str, WordErrors], speakers: Mapping[str, str] | None = None, seed: int = 0,
                       replicates: int = REPLICATES) -> float:
    """Share of paired bootstrap replicates in which `ours` has the lower WER (Bisani & Ney 2004); a tie counts one half.

    Both are resampled with the same draws, so what is hard for both cancels. Rates are compared: `theirs` may be the
    pooled counts of several systems. Two identical systems give 0.5.

    Raises:
        AsrKdError: the two were scored on different utterances, or on none.
    """
    _same_utterances(ours, theirs)
    our_errors, our_words = _blocks(ours, speakers)
    their_errors, their_words = _blocks({utt_id: theirs[utt_id] for utt_id in ours}, speakers)
    better = 0.0
    for draw in _draws(len(our_errors), seed, replicates):
        # cross-multiplied integers: ties are exact
        left, right = our_errors[draw].sum(1) * their_words[draw].sum(1), their_errors[draw].sum(1) * our_words[draw].sum(1)
        better += float((left < right).sum() + 0.5 * (left == right).sum())
    return better / replicates


def system_row(frames: Mapping[str, FrameCounts], words: Mapping[str, WordErrors] | None = None, *, speakers: Mapping[str, str] | None = None,
               seed: int = 0, real_time_factor: float | None = None) -> dict[str, Any]:
    """One system's entry of results.json, from counts by utterance id.

    A system that was not decoded has the frame accuracy only, one on a split of which nothing could be aligned the word errors only.

    Args:
        speakers: utt_id -> speaker, for the intervals; see `bootstrap_ci95`.

    Raises:
        AsrKdError: no reference words.
    """
    row: dict[str, Any] = {}
    if frames:
        row = {"frame_accuracy": sum(frames.values(), FrameCounts()).accuracy, "frame_accuracy_ci95": list(bootstrap_ci95(frames, speakers, seed))}
    if words is None:
        return row
    total = sum(words.values(), WordErrors())
    row |= {**total.as_json(), "wer_ci95": list(bootstrap_ci95(words, speakers, seed)),
            "substitutions": total.substitutions, "deletions": total.deletions, "insertions": total.insertions}
    return row if real_time_factor is None else row | {"real_time_factor": real_time_factor}


def gain_kept(baseline: Mapping[str, Any], ensemble: Mapping[str, Any], distilled: Mapping[str, Any]) -> dict[str, float | None]:
    """(distilled - baseline) / (ensemble - baseline) for frame accuracy and WER; None where ensemble and baseline are equal or were not scored."""

    def kept(measure: str) -> float | None:
        if measure not in baseline or ensemble[measure] == baseline[measure]:
            return None
        share: float = (distilled[measure] - baseline[measure]) / (ensemble[measure] - baseline[measure])
        return share

    return {measure: kept(measure) for measure in ("frame_accuracy", "wer")}


def _divide(count: int, total: int, complaint: str) -> float:
    if total == 0:
        raise AsrKdError(complaint)
    return count / total


Edit = tuple[Words, Words]
"""A stretch where reference and hypothesis differ: (spoken words, recognised words); one of them is empty unless words were substituted."""


def _edits(references: Sequence[Words], hypotheses: Sequence[Words]) -> Iterator[list[Edit]]:
    for spoken, recognised in zip(references, hypotheses, strict=True):
        if not spoken or not recognised:  # older jiwer refuses empty references
            yield [(spoken, recognised)] if spoken or recognised else []
            continue
        chunks = jiwer.process_words(" ".join(spoken), " ".join(recognised)).alignments[0]
        yield [(spoken[chunk.ref_start_idx:chunk.ref_end_idx], recognised[chunk.hyp_start_idx:chunk.hyp_end_idx])
               for chunk in chunks if chunk.type != "equal"]


def _count(reference: Words, edits: list[Edit]) -> WordErrors:
    substitutions = sum(len(spoken) for spoken, recognised in edits if spoken and recognised)
    deletions = sum(len(spoken) for spoken, recognised in edits if not recognised)
    insertions = sum(len(recognised) for spoken, recognised in edits if not spoken)
    return WordErrors(substitutions, deletions, insertions, len(reference))


def _aligned(references: Mapping[str, Words], hypotheses: Mapping[str, Words]) -> Iterator[tuple[str, list[Edit]]]:
    missing = [utt_id for utt_id in references if utt_id not in hypotheses]
    if missing:
        raise AsrKdError(f"{missing[0]}: no hypothesis ({len(missing)} of {len(references)} utterances lack one); run the decode stage again")
    unknown = [utt_id for utt_id in hypotheses if utt_id not in references]
    if unknown:
        raise AsrKdError(f"{unknown[0]}: a hypothesis without a reference ({len(unknown)} such); score against the split that was decoded")
    return zip(references, _edits(list(references.values()), [hypotheses[utt_id] for utt_id in references]), strict=True)


def _same_utterances(one: Mapping[str, Counts], other: Mapping[str, Counts]) -> None:
    differing = one.keys() ^ other.keys()
    if differing:
        raise AsrKdError(f"{min(differing)}: scored for one system only ({len(differing)} such); decode and score both systems on the same split")


def resampled(utt_ids: Iterable[str], speakers: Mapping[str, str]) -> str:
    """What bootstraps over these utterances draw: "speakers" where there are at least `MIN_SPEAKERS`, else "utterances"."""
    return "speakers" if len({speakers[utt_id] for utt_id in utt_ids}) >= MIN_SPEAKERS else "utterances"


def _blocks(counts: Mapping[str, Counts], speakers: Mapping[str, str] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(numerators, denominators) of what is drawn, (B,) each: summed over each speaker, or one entry per utterance."""
    if not counts:
        raise AsrKdError("no utterances were scored; check the split's name and its exclusions")
    by_block = {utt_id: utt_id for utt_id in counts}
    if speakers is not None and resampled(counts, speakers) == "speakers":
        by_block = {utt_id: speakers[utt_id] for utt_id in counts}
    position = {block: b for b, block in enumerate(dict.fromkeys(by_block.values()))}
    sums = np.zeros((len(position), 2), dtype=np.int64)
    for utt_id, count in counts.items():
        sums[position[by_block[utt_id]]] += count.fraction
    return sums[:, 0], sums[:, 1]


def _draws(num_blocks: int, seed: int, replicates: int) -> Iterator[NDArray[np.int64]]:
    """Indices drawn with replacement, (replicates in this batch, num_blocks) at a time so that memory stays small."""
    generator = np.random.default_rng(seed)
    batch = max(1, 1_000_000 // num_blocks)
    for start in range(0, replicates, batch):
        yield generator.integers(0, num_blocks, (min(batch, replicates - start), num_blocks))
