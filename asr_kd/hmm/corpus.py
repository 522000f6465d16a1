"""Passes over a corpus: graphs of its transcripts, batches of utterances, alignment on several threads and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.distributed import local_world_size, rank, world_size
from asr_kd.errors import AsrKdError
from asr_kd.hmm.features import Features
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.gmm import GaussianMixtures, log_likelihoods
from asr_kd.hmm.model import STATES_PER_PHONE, HmmModel
from asr_kd.hmm.topology import AlignmentGraph, Pronunciations, build_alignment_graph, path_graph
from asr_kd.hmm.viterbi import Path, viterbi
from asr_kd.manifest import Exclusion
from asr_kd.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")
NO_FEATURES = "no features"
"""Why an utterance that the feature stage left out is not aligned."""
MAX_CACHED_STATES = 30_000_000
"""Graphs of about this many states (some 400 MB, a hundred hours of speech) are kept between passes; further ones are built when needed."""
MAX_BATCH_CELLS = 40_000_000
"""Frames times states of a Viterbi batch: bytes of its traceback."""
MAX_UTTERANCE_CELLS = 10**9
"""Frames times states of one utterance, which cannot be divided: a gigabyte of traceback, some six minutes of speech."""
MAX_CHUNK_FRAMES = 200_000
"""Frames that are held in memory at once while statistics are summed."""
GPU_FACTOR = 5
"""A GPU takes so many times larger chunks."""
GPU_BATCH_FACTOR = 15
"""A GPU takes so many times larger Viterbi batches: each of their steps through time costs a few launches, whatever its size."""
GPU_THREADS = 3
"""Threads that feed one GPU: more would wait for one another, and each holds a batch there."""
GUIDE_FRAMES = 50
"""Frames by which a word may leave its place in an earlier alignment."""
GUIDED_BLOCK = 128
"""Frames that are scored together in the states that an earlier alignment allows."""


class Pronouncer(Protocol):
    """What is needed of a lexicon (`asr_kd.lexicon.Lexicon`, or a dict with `phones`)."""

    @property
    def phones(self) -> Sequence[str]: ...
    def __contains__(self, word: object) -> bool: ...
    def __getitem__(self, word: str) -> Sequence[Sequence[str]]: ...


class GraphSource(Protocol):
    """Gives the alignment graph of an utterance, and its number of states without building it."""

    def __getitem__(self, utt_id: str, /) -> AlignmentGraph: ...
    def size(self, utt_id: str, /) -> int: ...


class Graphs:
    """Alignment graphs of transcripts by utterance id.

    Args:
        transcripts: utterance id -> words.
        lexicon: pronunciations.
        phones: the HMM's phones.
    """

    def __init__(self, transcripts: Mapping[str, Sequence[str]], lexicon: Pronouncer, phones: tuple[str, ...]) -> None:
        self.transcripts = transcripts
        self.lexicon = lexicon
        self.num_phones = len(phones)
        self._ids = {phone: i + 1 for i, phone in enumerate(phones)}
        self._cache: dict[str, AlignmentGraph] = {}
        self._cached_states = 0
        self._sizes: dict[str, int] = {}

    def pronunciations(self, utt_id: str) -> list[list[tuple[int, ...]]]:
        """For each word of an utterance its pronunciations as phone ids.

        Raises:
            AsrKdError: a pronunciation uses a phone that the HMM lacks.
        """
        try:
            return [[tuple(self._ids[phone] for phone in variant) for variant in self.lexicon[word]] for word in self.transcripts[utt_id]]
        except KeyError as error:
            raise AsrKdError(f"{utt_id}: phone {error} is not in the HMM; use the lexicon that it was trained with") from None

    def problem(self, utt_id: str, features: Features) -> str | None:
        """Why an utterance cannot be aligned, or None."""
        words = self.transcripts[utt_id]
        if utt_id not in features:
            return NO_FEATURES
        if not words:
            return "empty transcript"
        missing = sorted({word for word in words if word not in self.lexicon})
        if missing:
            return f"word outside the lexicon: {' '.join(missing)}"
        shortest = STATES_PER_PHONE * sum(min(map(len, variants)) for variants in self.pronunciations(utt_id))
        frames, states = features.length(utt_id), self.size(utt_id)
        if frames < shortest:
            return f"{frames} frames, shorter than its {shortest} states"
        if frames * states > MAX_UTTERANCE_CELLS:
            return f"{frames} frames with {states} states of its transcript, too long to align at once: cut it"
        return None

    def size(self, utt_id: str) -> int:
        """Number of states of an utterance's graph, counted without building it."""
        if utt_id not in self._sizes:
            self._sizes[utt_id] = num_graph_states(self.pronunciations(utt_id))
        return self._sizes[utt_id]

    def __getitem__(self, utt_id: str) -> AlignmentGraph:
        graph = self._cache.get(utt_id)
        if graph is None:
            graph = build_alignment_graph(self.pronunciations(utt_id), self.num_phones)
            if self._cached_states < MAX_CACHED_STATES:
                self._cache[utt_id] = graph
                self._cached_states += graph.num_states
        return graph


def usable_utterances(graphs: Graphs, features: Features) -> tuple[list[str], list[Exclusion]]:
    """Utterances with a transcript that can be aligned, in the order of the transcripts, and the others with the reason."""
    problems = {utt_id: graphs.problem(utt_id, features) for utt_id in graphs.transcripts}
    usable = [utt_id for utt_id, problem in problems.items() if problem is None]
    return usable, [Exclusion(utt_id, problem) for utt_id, problem in problems.items() if problem is not None]


def num_graph_states(words: Sequence[Pronunciations]) -> int:
    """Number of states that `build_alignment_graph` makes of a transcript: a silence before each word and at the end, and each phone in every context
    that it can have."""
    nodes = len(words) + 1
    for w, variants in enumerate(words):
        lefts = 1 + (len({phones[-1] for phones in words[w - 1]}) if w else 1)  # after silence, or after another word or the edge
        rights = 1 + (len({phones[0] for phones in words[w + 1]}) if w + 1 < len(words) else 1)
        nodes += sum(lefts * rights if len(phones) == 1 else lefts + len(phones) - 2 + rights for phones in variants)
    return STATES_PER_PHONE * nodes


def num_threads() -> int:
    """Threads for passes over the corpus: this process's part of the cores it may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // local_world_size(), 8))


def own_utterances(utt_ids: Sequence[str], speakers: Mapping[str, str], features: Features) -> list[str]:
    """The utterances that this process works on, in their order: whole speakers, so that each can be adapted to, with alike amounts of speech."""
    if world_size() == 1:
        return list(utt_ids)
    frames: dict[str, int] = {}
    for utt_id in utt_ids:
        speaker = speakers.get(utt_id, "")
        frames[speaker] = frames.get(speaker, 0) + features.length(utt_id)
    loads, owner = [0] * world_size(), {}
    for speaker in sorted(frames, key=lambda name: (-frames[name], name)):
        owner[speaker] = loads.index(min(loads))
        loads[owner[speaker]] += frames[speaker]
    return [utt_id for utt_id in utt_ids if owner[speakers.get(utt_id, "")] == rank()]


def speaker_chunks(utt_ids: Iterable[str], speakers: Mapping[str, str], features: Features, max_frames: int) -> list[list[str]]:
    """Runs of whole speakers of at most `max_frames` frames (or one speaker)."""
    of_speaker: dict[str, list[str]] = {}
    for utt_id in utt_ids:
        of_speaker.setdefault(speakers.get(utt_id, ""), []).append(utt_id)
    result: list[list[str]] = []
    frames = 0
    for own in of_speaker.values():
        length = sum(map(features.length, own))
        if not result or frames + length > max_frames:
            result.append([])
            frames = 0
        result[-1] += own
        frames += length
    return result


def map_threads(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """`map` over threads, in order, a few items ahead; each thread's own matrix products on the CPU stay on one core.

    Args:
        device: where `function` works; the threads that feed a GPU are few.
    """
    threads = num_threads() if device.type == "cpu" else min(num_threads(), GPU_THREADS)
    if threads == 1:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    source = iter(items)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: list[Future[Result]] = [pool.submit(function, item) for item in islice(source, 2 * threads)]
            while waiting:
                yield waiting.pop(0).result()
                waiting.extend(pool.submit(function, item) for item in islice(source, 1))
    finally:
        torch.set_num_threads(before)


def chunk_frames(device: torch.device) -> int:
    """Frames of a chunk whose statistics are summed on `device`."""
    return MAX_CHUNK_FRAMES * (1 if device.type == "cpu" else GPU_FACTOR)


def map_chunks(function: Callable[[list[str]], Result], utt_ids: Iterable[str], features: Features, device: torch.device, desc: str) -> Iterator[Result]:
    """`function` of runs of utterances that are summed on `device` at once, over threads and in order."""
    parts = list(chunks(utt_ids, features, chunk_frames(device)))
    with progress(desc=desc, total=sum(map(len, parts)), unit="utt") as bar:
        for part, result in zip(parts, map_threads(function, parts, device), strict=True):
            yield result
            bar.update(len(part))


def viterbi_batches(utt_ids: Iterable[str], graphs: GraphSource, features: Features, device: torch.device) -> list[list[str]]:
    """Utterances of like length together, such that a batch's traceback stays small."""
    max_cells = MAX_BATCH_CELLS * (1 if device.type == "cpu" else GPU_BATCH_FACTOR)
    batches: list[list[str]] = []
    longest = states = 0
    for utt_id in sorted(utt_ids, key=lambda utt_id: (-features.length(utt_id), utt_id)):
        size = graphs.size(utt_id)
        if not batches or longest * (states + size) > max_cells:
            batches.append([])
            longest, states = features.length(utt_id), 0
        batches[-1].append(utt_id)
        states += size
    return batches


def chunks(utt_ids: Iterable[str], features: Features, max_frames: int) -> Iterator[list[str]]:
    """Runs of utterances of at most `max_frames` frames (or one utterance)."""
    chunk: list[str] = []
    frames = 0
    for utt_id in utt_ids:
        length = features.length(utt_id)
        if chunk and frames + length > max_frames:
            yield chunk
            chunk, frames = [], 0
        chunk.append(utt_id)
        frames += length
    if chunk:
        yield chunk


@dataclass(frozen=True, eq=False)
class Aligned:
    """An utterance's alignment.

    Attributes:
        codes: (T,) context code of each frame (`asr_kd.hmm.model.context_codes`); `hmm.flat_table[codes]` are the state ids of any tying.
        nodes: (T,) node of the alignment graph, -1 where not known.
        log_likelihood: of the best path, per utterance, natural log.
    """

    codes: NDArray[np.int32]
    nodes: NDArray[np.int32]
    log_likelihood: float


Alignments = Mapping[str, Aligned | None]
"""Utterance id -> alignment, None where there is no path of finite score."""


class FixedPhones:
    """For each aligned utterance the graph of the phones that its alignment goes through, so that only their boundaries are open.

    Args:
        graphs: that the alignments were made with.
        aligned: alignments with their nodes.
    """

    def __init__(self, graphs: GraphSource, aligned: Mapping[str, Aligned]) -> None:
        self._graphs = graphs
        self._nodes = {utt_id: own.nodes[np.flatnonzero(np.diff(own.nodes, prepend=-1))] for utt_id, own in aligned.items()}

    def __getitem__(self, utt_id: str) -> AlignmentGraph:
        return path_graph(self._graphs[utt_id], self._nodes[utt_id])

    def size(self, utt_id: str) -> int:
        """Number of states of an utterance's graph."""
        return STATES_PER_PHONE * len(self._nodes[utt_id])

    def enter(self, own: Aligned) -> Aligned:
        """An alignment in the numbering of these graphs."""
        return replace(own, nodes=np.cumsum(np.diff(own.nodes, prepend=own.nodes[0]) != 0).astype(np.int32))

    def leave(self, utt_id: str, own: Aligned) -> Aligned:
        """An alignment by these graphs in the numbering of those that they came from."""
        return replace(own, nodes=self._nodes[utt_id][own.nodes])


Scores = Callable[[NDArray[np.integer], slice], Tensor]
"""(state ids (U,), frames) -> (n, U) float32 log-likelihoods of an utterance's frames."""


def align_utterances(utt_ids: Sequence[str], graphs: GraphSource, features: Features, hmm: HmmModel, scores_of: Callable[[str], Scores], desc: str,
                     device: torch.device, guide: Alignments | None = None) -> Iterator[tuple[str, Aligned | None]]:
    """Align utterances; None where no path has a finite score. The order is by length, not as given.

    Args:
        scores_of: gives an utterance's scores, on `device`.
        device: where the paths are searched for.
        guide: earlier alignments; a word may move by `GUIDE_FRAMES` from where it was, which saves most of the scores.
    """
    guide = guide or {}

    def work(batch: list[str]) -> list[tuple[str, Aligned | None]]:
        own = [graphs[utt_id] for utt_id in batch]
        used = [np.unique(hmm.flat_table[graph.codes], return_inverse=True) for graph in own]
        tables = [_scored(scores_of(utt_id), graph, features.length(utt_id), states, columns, guide.get(utt_id), device)
                  for utt_id, graph, (states, columns) in zip(batch, own, used, strict=True)]
        paths = viterbi(own, hmm, tables, [columns for _, columns in used])
        return [(utt_id, _aligned(graph, path)) for utt_id, graph, path in zip(batch, own, paths, strict=True)]

    batches = viterbi_batches(utt_ids, graphs, features, device)
    with progress(desc=desc, total=len(utt_ids), unit="utt") as bar:
        for results in map_threads(work, batches, device):
            bar.update(len(results))
            yield from results


def _scored(scores: Scores, graph: AlignmentGraph, num_frames: int, states: NDArray[np.integer], columns: NDArray[np.integer],
            guide: Aligned | None, device: torch.device) -> Tensor:
    """(T, U) log-likelihoods in the states that a graph uses; -inf where the guide rules a state out."""
    if guide is None or guide.nodes[0] < 0:
        return scores(states, slice(0, num_frames))
    allowed = _allowed(graph, num_frames, len(states), columns, guide)
    if device.type != "cpu":  # one large product and a mask take less time than many small products
        ruled_out = torch.from_numpy(~allowed).to(device).repeat_interleave(GUIDED_BLOCK, 0)[:num_frames]
        return scores(states, slice(0, num_frames)).masked_fill(ruled_out, -torch.inf)
    table = torch.full((num_frames, len(states)), -torch.inf)
    for block, own in enumerate(allowed):
        active = np.flatnonzero(own)
        span = slice(block * GUIDED_BLOCK, min((block + 1) * GUIDED_BLOCK, num_frames))
        table[span].index_copy_(1, torch.from_numpy(active), scores(states[active], span))
    return table


def _allowed(graph: AlignmentGraph, num_frames: int, num_states: int, columns: NDArray[np.integer], guide: Aligned) -> NDArray[np.bool_]:
    """(blocks of frames, U) the states whose word lies near enough in the earlier alignment."""
    slots = graph.node_slot[guide.nodes]
    first = np.searchsorted(slots, graph.node_slot, "left") - GUIDE_FRAMES
    last = np.searchsorted(slots, graph.node_slot, "right") + GUIDE_FRAMES
    starts = np.arange(0, num_frames, GUIDED_BLOCK)
    allowed = np.zeros((len(starts), num_states), np.bool_)
    for own, start in zip(allowed, starts.tolist(), strict=True):
        near = (first < start + GUIDED_BLOCK) & (last > start)
        own[columns[np.repeat(near, STATES_PER_PHONE)]] = True
    return allowed


def _aligned(graph: AlignmentGraph, path: Path | None) -> Aligned | None:
    return None if path is None else Aligned(graph.codes[path.states], path.states // STATES_PER_PHONE, path.log_probability)


def mixture_scores(frontend: Frontend, mixtures: GaussianMixtures) -> Callable[[str], Scores]:
    """Scores for `align_utterances` from Gaussian mixtures, on the frontend's device."""
    projection = mixtures.to(frontend.device).projection()

    def scores_of(utt_id: str) -> Scores:
        frames = frontend.frames(utt_id)

        return lambda states, span: log_likelihoods(mixtures, projection, frames[span], states)

    return scores_of
