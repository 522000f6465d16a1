"""Viterbi alignment of many utterances at once, on a CPU or a GPU.

The states of all utterances of a batch lie side by side in one vector, longest utterance first; a step in time updates the
prefix of utterances that are not over yet. Every state has itself and one other predecessor; the few states where paths
meet (word starts, silences) have further predecessors in a padded index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.hmm.model import STATES_PER_PHONE, HmmModel
from asr_kd.hmm.topology import EDGE_SILENCE, NO_EDGE_SILENCE, WITH_SILENCE, WITHOUT_SILENCE, AlignmentGraph

FloatArray = NDArray[np.float32]
_RESCALE_FRAMES = 128  # float32 scores of six minutes would be rounded to eighths
_FURTHER = 2  # a predecessor is named 0 (the state itself), 1 (its source), or this plus a row of the further ones


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
    """Graphs laid side by side, N states in all; index N is a predecessor that never scores.

    Attributes:
        offsets, branch_offsets: (utterances + 1,) where each one's states begin, and in `branches` those of them that branch.
        stay, begin, finish: (N,) log weights.
        source, move: (N,) the predecessor beside the state itself, and its log weight.
        branches: (B,) states, in order, that have further ones: `further_source`, `further_move` (W, B).
        branch_of: (N,) where a state stands in `branches`, 0 where it does not.
        column: (N,) of the state in the log-likelihoods.
    """

    offsets: NDArray[np.int64]
    branch_offsets: NDArray[np.int64]
    stay: Tensor
    source: Tensor
    move: Tensor
    branches: Tensor
    further_source: Tensor
    further_move: Tensor
    branch_of: Tensor
    begin: Tensor
    finish: Tensor
    column: Tensor

    def to(self, device: torch.device) -> _Batch:
        return _Batch(self.offsets, self.branch_offsets, *(getattr(self, field.name).to(device) for field in fields(self)[2:]))

    def first(self, utterances: int) -> _Batch:
        """Views of what the step needs for the first utterances alone."""
        n, b = int(self.offsets[utterances]), int(self.branch_offsets[utterances])
        return replace(self, stay=self.stay[:n], source=self.source[:n], move=self.move[:n], column=self.column[:n], branches=self.branches[:b],
                       further_source=self.further_source[:, :b].contiguous(), further_move=self.further_move[:, :b])


def choice_weights(log_silence: float) -> FloatArray:
    """Log weight of each kind of arc: silence between words has the learned probability, silence at the ends is as likely as not."""
    weights = np.zeros(5, np.float32)
    weights[WITH_SILENCE] = log_silence
    weights[WITHOUT_SILENCE] = np.log1p(-np.exp(min(log_silence, -1e-6)))
    weights[EDGE_SILENCE] = weights[NO_EDGE_SILENCE] = np.log(0.5)
    return weights


def viterbi(graphs: Sequence[AlignmentGraph], hmm: HmmModel, log_likelihoods: Sequence[Tensor], columns: Sequence[NDArray[np.integer]]) -> list[Path | None]:
    """The best path of each utterance, searched for on the device of `log_likelihoods`; None where no path has a finite score.

    Args:
        graphs: one per utterance.
        hmm: gives the transitions.
        log_likelihoods: per utterance (T, U) float32: log-likelihood of each frame in the U states that its graph uses.
        columns: per utterance (J,): the column of each graph state.
    """
    order = sorted(range(len(graphs)), key=lambda u: -len(log_likelihoods[u]))
    tables = [log_likelihoods[u] for u in order]
    lengths = [len(table) for table in tables]
    batch = _lay_out([graphs[u] for u in order], [columns[u] for u in order], [table.shape[1] for table in tables], hmm).to(tables[0].device)
    scores, levels, back = _forward(batch, _pad(tables), lengths)
    above_level, track = (tensor.cpu().numpy() for tensor in _trace_back(batch, scores, back, lengths))
    log_probabilities = levels.cpu().numpy() + above_level
    paths: list[Path | None] = [None] * len(graphs)
    for k, u in enumerate(order):
        if np.isfinite(log_probabilities[k]):
            paths[u] = Path((track[: lengths[k], k] - batch.offsets[k]).astype(np.int32), float(log_probabilities[k]))
    return paths


def _lay_out(graphs: Sequence[AlignmentGraph], columns: Sequence[NDArray[np.integer]], widths: Sequence[int], hmm: HmmModel) -> _Batch:
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
    branch_of = np.zeros(total, np.int64)
    branch_of[branches] = np.arange(len(branches))
    begin = np.full(total, -np.inf, np.float32)
    begin[shifted("start")] = kinds("start_kind")
    finish = np.full(total, -np.inf, np.float32)
    ends = shifted("end") + STATES_PER_PHONE - 1
    finish[ends] = advance[ends] + kinds("end_kind")
    column = np.concatenate([own + start for own, start in zip(columns, np.cumsum([0, *widths[:-1]]), strict=True)])
    tensors = (hmm.log_self_loop[tied], source.astype(np.int32), move, branches, further_source.astype(np.int32), further_move, branch_of, begin, finish,
               column.astype(np.int32))
    return _Batch(offsets, np.searchsorted(branches, offsets), *map(torch.from_numpy, tensors))


def _pad(tables: Sequence[Tensor]) -> Tensor:
    """Log-likelihoods side by side, (T_max, sum of U)."""
    emissions = tables[0].new_zeros(len(tables[0]), sum(table.shape[1] for table in tables))
    start = 0
    for table in tables:
        emissions[: len(table), start : start + table.shape[1]] = table
        start += table.shape[1]
    return emissions


def _forward(batch: _Batch, emissions: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the states in each utterance's last frame, (N + 1,), above a level per utterance, (utterances,); which predecessor won, (T_max, N).

    The best score so far is moved into the level now and then, so that the differences that decide are not rounded away.
    """
    total = len(batch.stay)
    scores = emissions.new_full((total + 1,), -torch.inf)
    scores[:total] = batch.begin + emissions[0].index_select(0, batch.column)
    few = len(batch.further_source) + _FURTHER <= torch.iinfo(torch.uint8).max
    back = torch.zeros(len(emissions), total, dtype=torch.uint8 if few else torch.int32, device=emissions.device)
    levels = torch.zeros(len(lengths), dtype=torch.float64, device=emissions.device)
    owner = torch.repeat_interleave(torch.from_numpy(np.diff(batch.offsets))).to(emissions.device)  # (N,)
    active = 0
    for t in range(1, len(emissions)):
        if not active or lengths[active - 1] <= t:
            active = sum(length > t for length in lengths)
            now = batch.first(active)
            n = len(now.stay)
            here, stayed = scores[:n], torch.empty_like(now.stay)
        torch.add(here, now.stay, out=stayed)
        best = scores.index_select(0, now.source).add_(now.move)
        winner = back[t, :n].copy_(best > stayed)
        torch.maximum(best, stayed, out=best)
        if len(now.branches):
            _merge_branches(now, scores, best, winner)
        torch.add(best, emissions[t].index_select(0, now.column), out=here)
        if t % _RESCALE_FRAMES == 0:
            tops = here.new_full((active,), -torch.inf).scatter_reduce_(0, owner[:n], here, "amax")
            tops.masked_fill_(tops.isinf(), 0.0)  # no path is left
            levels[:active] += tops
            here -= tops[owner[:n]]
    return scores, levels, back


def _merge_branches(batch: _Batch, scores: Tensor, best: Tensor, winner: Tensor) -> None:
    """Let the further predecessors of branching states compete; updates `best` and `winner`."""
    rivals = scores.index_select(0, batch.further_source.view(-1)).view_as(batch.further_move)
    rival, row = (rivals + batch.further_move).max(0)
    leader = best.index_select(0, batch.branches)
    chosen = torch.where(rival > leader, row + _FURTHER, winner.index_select(0, batch.branches))
    winner.index_copy_(0, batch.branches, chosen.to(winner.dtype))
    best.index_copy_(0, batch.branches, torch.maximum(leader, rival))


def _trace_back(batch: _Batch, scores: Tensor, back: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Score of each utterance's best path above its level, and its states, (T_max, utterances), found by following the winners backwards, all in step."""
    final = scores[:-1] + batch.finish
    spans = [(int(start), int(end)) for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    states = torch.stack([start + final[start:end].argmax() for start, end in spans])
    log_probabilities = final[states]
    predecessors = torch.cat([torch.arange(len(batch.stay), device=states.device, dtype=torch.int32)[None], batch.source[None]])
    track = torch.zeros(len(back), len(lengths), dtype=torch.int64, device=states.device)
    begun = 0
    for t in range(len(back) - 1, -1, -1):
        while begun < len(lengths) and lengths[begun] > t:
            begun += 1
        here = states[:begun]
        track[t, :begun] = here
        winner = back[t].index_select(0, here).long()
        came = predecessors[winner.clamp(max=1), here]
        if len(batch.branches):
            came = torch.where(winner < _FURTHER, came, batch.further_source[(winner - _FURTHER).clamp(min=0), batch.branch_of[here]])
        states[:begun] = came
    return log_probabilities, track
