"""Viterbi alignment of many utterances at once.

The states of all utterances of a batch lie side by side in one vector, longest utterance first; a step in time updates the
prefix of utterances that are not over yet. Every state has itself and one other predecessor; the few states where paths
meet (word starts, silences) have further predecessors in a padded index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asr_kd.hmm.model import STATES_PER_PHONE, HmmModel
from asr_kd.hmm.topology import EDGE_SILENCE, NO_EDGE_SILENCE, WITH_SILENCE, WITHOUT_SILENCE, AlignmentGraph

FloatArray = NDArray[np.float32]
_SELF, _FIRST, _FURTHER = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Path:
    """One utterance's best path.

    Attributes:
        states: (T,) state of the alignment graph in each frame.
        log_probability: emission, transition and silence terms of the path, natural log.
    """

    states: NDArray[np.int32]
    log_probability: float


@dataclass(frozen=True, eq=False)
class _Batch:
    """Graphs laid side by side; N states in all, index N is a predecessor that never scores."""

    offsets: NDArray[np.int64]
    stay: FloatArray
    source: NDArray[np.int64]
    move: FloatArray
    branches: NDArray[np.int64]
    further_source: NDArray[np.int64]
    further_move: FloatArray
    begin: FloatArray
    finish: FloatArray


def choice_weights(log_silence: float) -> FloatArray:
    """Log weight of each kind of arc: silence between words has the learned probability, silence at the ends is as likely as not."""
    weights = np.zeros(5, np.float32)
    weights[WITH_SILENCE] = log_silence
    weights[WITHOUT_SILENCE] = np.log1p(-np.exp(min(log_silence, -1e-6)))
    weights[EDGE_SILENCE] = weights[NO_EDGE_SILENCE] = np.log(0.5)
    return weights


def viterbi(graphs: Sequence[AlignmentGraph], hmm: HmmModel, log_likelihoods: Sequence[FloatArray],
            columns: Sequence[NDArray[np.integer]]) -> list[Path | None]:
    """The best path of each utterance; None where no path has a finite score.

    Args:
        graphs: one per utterance.
        hmm: gives the transitions.
        log_likelihoods: per utterance (T, U): log-likelihood of each frame in the U states that its graph uses.
        columns: per utterance (J,): the column of each graph state.
    """
    order = sorted(range(len(graphs)), key=lambda u: -len(log_likelihoods[u]))
    lengths = [len(log_likelihoods[u]) for u in order]
    batch = _lay_out([graphs[u] for u in order], hmm)
    emissions, index = _pad([log_likelihoods[u] for u in order], [columns[u] for u in order])
    scores, back = _forward(batch, emissions, index, lengths)
    found = _trace_back(batch, scores, back, lengths)
    paths: list[Path | None] = [None] * len(graphs)
    for u, path in zip(order, found, strict=True):
        paths[u] = path
    return paths


def _lay_out(graphs: Sequence[AlignmentGraph], hmm: HmmModel) -> _Batch:
    offsets = np.concatenate([[0], np.cumsum([graph.num_states for graph in graphs])]).astype(np.int64)
    total = int(offsets[-1])
    tied = hmm.flat_table[np.concatenate([graph.codes for graph in graphs])]
    advance = hmm.log_advance[tied]
    weights = choice_weights(hmm.log_optional_silence)

    def shifted(nodes: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(graph, nodes).astype(np.int64) * STATES_PER_PHONE + start for graph, start in zip(graphs, offsets[:-1], strict=True)])

    def kinds(name: str) -> FloatArray:
        taken: FloatArray = weights[np.concatenate([getattr(graph, name) for graph in graphs])]
        return taken

    source = np.arange(-1, total - 1, dtype=np.int64)
    move = np.concatenate([[-np.inf], advance[:-1]]).astype(np.float32)
    source[::STATES_PER_PHONE], move[::STATES_PER_PHONE] = total, -np.inf
    last = shifted("arc_from") + STATES_PER_PHONE - 1
    first = shifted("arc_to")
    weight = advance[last] + kinds("arc_kind")
    sort = np.argsort(first, kind="stable")
    last, first, weight = last[sort], first[sort], weight[sort]
    is_new = np.diff(first, prepend=-1) != 0
    rank = np.arange(len(first)) - np.flatnonzero(is_new)[np.cumsum(is_new) - 1]
    source[first[is_new]], move[first[is_new]] = last[is_new], weight[is_new]
    branches, row = np.unique(first[rank > 0], return_inverse=True)
    width = int(rank.max(initial=0))
    further_source = np.full((width, len(branches)), total, np.int64)
    further_move = np.full((width, len(branches)), -np.inf, np.float32)
    further_source[rank[rank > 0] - 1, row] = last[rank > 0]
    further_move[rank[rank > 0] - 1, row] = weight[rank > 0]
    begin = np.full(total, -np.inf, np.float32)
    begin[shifted("start")] = kinds("start_kind")
    finish = np.full(total, -np.inf, np.float32)
    ends = shifted("end") + STATES_PER_PHONE - 1
    finish[ends] = advance[ends] + kinds("end_kind")
    return _Batch(offsets, hmm.log_self_loop[tied], source, move, branches, further_source, further_move, begin, finish)


def _pad(log_likelihoods: Sequence[FloatArray], columns: Sequence[NDArray[np.integer]]) -> tuple[FloatArray, NDArray[np.int64]]:
    """Log-likelihoods side by side, (T_max, sum of U), and for each state of the batch its column there."""
    starts = np.concatenate([[0], np.cumsum([table.shape[1] for table in log_likelihoods])]).astype(np.int64)
    emissions = np.zeros((len(log_likelihoods[0]), int(starts[-1])), np.float32)
    for table, start in zip(log_likelihoods, starts[:-1], strict=True):
        emissions[: len(table), start : start + table.shape[1]] = table
    return emissions, np.concatenate([column + start for column, start in zip(columns, starts[:-1], strict=True)]).astype(np.int64)


def _forward(batch: _Batch, emissions: FloatArray, index: NDArray[np.int64], lengths: list[int]) -> tuple[FloatArray, NDArray[np.uint8]]:
    """Scores of the states in each utterance's last frame, (N + 1,), and which predecessor won, (T_max, N)."""
    total = len(batch.stay)
    scores = np.full(total + 1, -np.inf, np.float32)
    scores[:total] = batch.begin + emissions[0][index]
    back = np.zeros((len(emissions), total), np.uint8)
    active = len(lengths)
    n = total
    n_branches = len(batch.branches)
    for t in range(1, len(emissions)):
        while lengths[active - 1] <= t:
            active -= 1
            n = int(batch.offsets[active])
            n_branches = int(np.searchsorted(batch.branches, n))
        stay = scores[:n] + batch.stay[:n]
        best = scores.take(batch.source[:n])
        best += batch.move[:n]
        choice = back[t, :n]
        np.greater(best, stay, out=choice.view(bool))
        np.maximum(best, stay, out=best)
        _merge_branches(batch, scores, best, choice, n_branches)
        best += emissions[t].take(index[:n])
        scores[:n] = best
    return scores, back


def _merge_branches(batch: _Batch, scores: FloatArray, best: FloatArray, choice: NDArray[np.uint8], n_branches: int) -> None:
    """Let the further predecessors of the first `n_branches` branching states compete; updates `best` and `choice`."""
    if n_branches == 0:
        return
    states = batch.branches[:n_branches]
    leader, winner = best[states], choice[states]
    for column in range(len(batch.further_source)):
        rival = scores.take(batch.further_source[column, :n_branches])
        rival += batch.further_move[column, :n_branches]
        better = rival > leader
        winner[better] = _FURTHER + column
        np.maximum(leader, rival, out=leader)
    best[states], choice[states] = leader, winner


def _trace_back(batch: _Batch, scores: FloatArray, back: NDArray[np.uint8], lengths: list[int]) -> list[Path | None]:
    """Best paths by following the winners backwards, all utterances in step."""
    final = scores[:-1] + batch.finish
    spans = list(zip(batch.offsets[:-1], batch.offsets[1:], strict=True))
    states = np.asarray([start + int(final[start:end].argmax()) for start, end in spans], np.int64)
    log_probabilities = final[states]
    columns = np.full(len(batch.stay), -1, np.int64)
    columns[batch.branches] = np.arange(len(batch.branches))
    track = np.zeros((len(back), len(lengths)), np.int64)
    begun = 0
    for t in range(len(back) - 1, -1, -1):
        while begun < len(lengths) and lengths[begun] > t:
            begun += 1
        here = states[:begun]
        track[t, :begun] = here
        if t == 0:
            break
        winner = back[t, here]
        further = winner >= _FURTHER
        came = np.where(winner == _SELF, here, batch.source[here])
        if further.any():
            came[further] = batch.further_source[winner[further].astype(np.int64) - _FURTHER, columns[here[further]]]
        states[:begun] = came
    return [Path((track[:length, u] - start).astype(np.int32), float(log_probabilities[u])) if np.isfinite(log_probabilities[u]) else None
            for u, (length, (start, _)) in enumerate(zip(lengths, spans, strict=True))]
