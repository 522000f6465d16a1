"""Alignment graphs: every way to say a transcript, as a graph of HMM states.

Optional silence before, between and after words, and the pronunciation variants of each word, make the paths; phones at
word edges are expanded by the neighbours they can have, so that cross-word triphones are exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asr_kd.hmm.model import EDGE, SIL, STATES_PER_PHONE, context_codes

PLAIN, WITH_SILENCE, WITHOUT_SILENCE = 0, 1, 2
"""Kinds of arcs: no choice made; into (or, at the ends, through) an optional silence; past an optional silence between words."""
EDGE_SILENCE, NO_EDGE_SILENCE = 3, 4
"""The same choice before the first and after the last word."""

Pronunciations = Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class AlignmentGraph:
    """Nodes are phones in context, each of three states in a row; node i's states are 3 i, 3 i + 1, 3 i + 2.

    Attributes:
        codes: (3 * nodes,) context code of each state.
        node_slot: (nodes,) place in the transcript: 2 w + 1 for word w, 2 w for the silence before it.
        arc_from, arc_to, arc_kind: (arcs,) from a node's last state to a node's first state.
        start, start_kind: nodes where a path may begin.
        end, end_kind: nodes where a path may end.
    """

    codes: NDArray[np.int32]
    node_slot: NDArray[np.int32]
    arc_from: NDArray[np.int32]
    arc_to: NDArray[np.int32]
    arc_kind: NDArray[np.int8]
    start: NDArray[np.int32]
    start_kind: NDArray[np.int8]
    end: NDArray[np.int32]
    end_kind: NDArray[np.int8]

    @property
    def num_states(self) -> int:
        """Number of states J."""
        return len(self.codes)

    @property
    def node_word(self) -> NDArray[np.int32]:
        """(nodes,) position of the word in the transcript, -1 for silence."""
        return np.where(self.node_slot % 2 == 1, self.node_slot // 2, -1).astype(np.int32)


class _Builder:
    """Collects nodes word by word."""

    def __init__(self) -> None:
        self.triples: list[tuple[int, int, int]] = []
        self.slots: list[int] = []
        self.arcs: list[tuple[int, int, int]] = []

    def node(self, left: int, centre: int, right: int, slot: int) -> int:
        self.triples.append((left, centre, right))
        self.slots.append(slot)
        return len(self.triples) - 1

    def silence(self, word: int) -> int:
        return self.node(EDGE, SIL, EDGE, 2 * word)

    def pronunciation(self, phones: tuple[int, ...], word: int, lefts: set[int], rights: set[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Add one pronunciation in all its contexts; return its first nodes by left context and its last nodes by right context."""
        entries: dict[int, list[int]] = defaultdict(list)
        exits: dict[int, list[int]] = defaultdict(list)
        previous: list[int] = []
        for i, phone in enumerate(phones):
            here: list[int] = []
            for left in sorted(lefts) if i == 0 else [phones[i - 1]]:
                for right in sorted(rights) if i == len(phones) - 1 else [phones[i + 1]]:
                    node = self.node(left, phone, right, 2 * word + 1)
                    here.append(node)
                    if i == 0:
                        entries[left].append(node)
                    if i == len(phones) - 1:
                        exits[right].append(node)
            self.arcs.extend((a, b, PLAIN) for a in previous for b in here)
            previous = here
        return entries, exits


def build_alignment_graph(words: Sequence[Pronunciations], num_phones: int) -> AlignmentGraph:
    """The graph of a transcript.

    Args:
        words: for each word its pronunciations as tuples of phone ids (none empty).
        num_phones: phones of the HMM, SIL included.
    """
    builder = _Builder()
    firsts = [{phones[0] for phones in variants} for variants in words]
    lasts = [{phones[-1] for phones in variants} for variants in words]
    silence = builder.silence(0)
    start = [(silence, EDGE_SILENCE)]
    open_exits: dict[tuple[int, int], list[int]] = {}
    for w, variants in enumerate(words):
        lefts = {SIL} | (lasts[w - 1] if w else {EDGE})
        rights = {SIL} | (firsts[w + 1] if w + 1 < len(words) else {EDGE})
        next_silence = builder.silence(w + 1)
        exits_here: dict[tuple[int, int], list[int]] = defaultdict(list)
        for phones in variants:
            entries, exits = builder.pronunciation(phones, w, lefts, rights)
            builder.arcs.extend((silence, node, PLAIN) for node in entries[SIL])
            if w == 0:
                start.extend((node, NO_EDGE_SILENCE) for node in entries[EDGE])
            builder.arcs.extend((a, node, WITHOUT_SILENCE) for (last, first), sources in open_exits.items() if first == phones[0]
                                for a in sources for node in entries.get(last, ()))
            kind = WITH_SILENCE if w + 1 < len(words) else EDGE_SILENCE
            builder.arcs.extend((node, next_silence, kind) for node in exits[SIL])
            for right, nodes in exits.items():
                if right != SIL:
                    exits_here[phones[-1], right].extend(nodes)
        open_exits, silence = exits_here, next_silence
    end = [(silence, PLAIN)] + [(node, NO_EDGE_SILENCE) for nodes in open_exits.values() for node in nodes]
    return _finish(builder, start, end, num_phones)


def path_graph(graph: AlignmentGraph, nodes: NDArray[np.integer]) -> AlignmentGraph:
    """The graph whose only path is through `nodes` of another graph, in that order."""
    first, number = np.zeros(1, np.int32), np.arange(len(nodes), dtype=np.int32)
    return AlignmentGraph(
        codes=graph.codes.reshape(-1, STATES_PER_PHONE)[nodes].reshape(-1), node_slot=graph.node_slot[nodes],
        arc_from=number[:-1], arc_to=number[1:], arc_kind=np.full(len(nodes) - 1, PLAIN, np.int8),
        start=first, start_kind=np.full(1, PLAIN, np.int8), end=number[-1:], end_kind=np.full(1, PLAIN, np.int8),
    )


def _finish(builder: _Builder, start: list[tuple[int, int]], end: list[tuple[int, int]], num_phones: int) -> AlignmentGraph:
    triples = np.asarray(builder.triples, np.int64)
    arcs = np.asarray(builder.arcs, np.int32).reshape(-1, 3)
    starts, ends = np.asarray(start, np.int32), np.asarray(end, np.int32)
    return AlignmentGraph(
        codes=context_codes(triples[:, 0], triples[:, 1], triples[:, 2], num_phones).reshape(-1),
        node_slot=np.asarray(builder.slots, np.int32),
        arc_from=arcs[:, 0], arc_to=arcs[:, 1], arc_kind=arcs[:, 2].astype(np.int8),
        start=starts[:, 0], start_kind=starts[:, 1].astype(np.int8),
        end=ends[:, 0], end_kind=ends[:, 1].astype(np.int8),
    )


def even_path(words: Sequence[Pronunciations], num_phones: int, num_frames: int, quiet: tuple[int, int] = (0, 0)) -> NDArray[np.int32]:
    """Context code of each frame, (T,), for the flat start: silence, first pronunciations, silence, all states equally long.

    Where speech fills the rest, `quiet` frames at the start and at the end are shared by the states of the silences instead.
    """
    phones = [SIL, *(phone for variants in words for phone in variants[0]), SIL]
    centre = np.asarray(phones)
    left = np.asarray([EDGE, *phones[:-1]])
    right = np.asarray([*phones[1:], EDGE])
    silent = centre == SIL
    left[silent] = right[silent] = EDGE
    codes = context_codes(left, centre, right, num_phones).reshape(-1)
    lead, tail = quiet
    if min(lead, tail) < STATES_PER_PHONE or lead + tail + len(codes) - 2 * STATES_PER_PHONE > num_frames:
        return codes[np.arange(num_frames) * len(codes) // num_frames]
    inner = codes[STATES_PER_PHONE:-STATES_PER_PHONE]
    parts = [(codes[:STATES_PER_PHONE], lead), (inner, num_frames - lead - tail), (codes[-STATES_PER_PHONE:], tail)]
    return np.concatenate([part[np.arange(length) * len(part) // length] for part, length in parts])
