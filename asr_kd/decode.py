"""Viterbi beam search over HCLG from log posterior minus log prior; tuning of its scales; hypotheses as files.

kaldi_decoder's FasterDecoder does the search. It holds Python's lock, so several utterances at a time need several
processes; those are forked after the graph is read, and so share one copy of it.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kaldi_decoder
import kaldifst
import numpy as np
from numpy.typing import ArrayLike, NDArray

from asr_kd.const_fst import copy_with_word_cost
from asr_kd.errors import AsrKdError
from asr_kd.graph import GRAPH, read_graph_info
from asr_kd.progress import progress
from asr_kd.score import WordErrors, score_split
from asr_kd.stage import write_text

logger = logging.getLogger(__name__)

_WINDOW_PER_JOB = 3  # utterances handed to the pool per process: enough that none waits for work
Utterances = Iterable[tuple[str, NDArray[np.float32]]]  # utt_id, (T, S) log posteriors


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of the search.

    Attributes:
        acoustic_scale: factor on log posterior minus log prior.
        word_insertion_penalty: cost (natural log units) of each word; above 0 makes fewer insertions and more deletions.
        beam: paths worse than the best by more than this cost are given up.
        max_active: at most so many graph states are followed per frame. On 58 s of speech with 30,000 words, from 13 and 7000 to
            13 and 3000 the search took 0.42 of the time, to 11 and 7000 0.45; the mean cost per frame rose by 0.0005 and 0.0007.
    """

    acoustic_scale: float = 0.12
    word_insertion_penalty: float = 0.0
    beam: float = 11.0
    max_active: int = 3000


@dataclass(frozen=True)
class Hypothesis:
    """What was recognised in one utterance.

    Attributes:
        words: recognised words; those of the best unfinished path where `reached_final` is False.
        cost: negative log score of the path: graph, acoustic and insertion costs.
        reached_final: the path ends where a sentence may end.
        decode_s: processor seconds of the search, one thread.
        num_frames: T.
    """

    utt_id: str
    words: tuple[str, ...]
    cost: float
    reached_final: bool
    decode_s: float
    num_frames: int


class Decoder:
    """A graph in memory, ready to decode one utterance after another.

    Args:
        graph_folder: what `build_graph` wrote.
        log_priors: (S,) natural log of the states' prior probabilities, all finite.
        settings: see `DecodeSettings`.

    Raises:
        AsrKdError: graph, word table and priors do not belong together, the priors are not finite, or there is no room for the temporary
            copy of the graph that a word insertion penalty needs.
    """

    def __init__(self, graph_folder: Path | str, log_priors: ArrayLike, settings: DecodeSettings | None = None) -> None:
        self.settings = settings or DecodeSettings()
        info, self._words = read_graph_info(graph_folder)
        self._log_priors = np.asarray(log_priors, np.float32)
        if self._log_priors.shape != (info["num_state_ids"],) or not np.isfinite(self._log_priors).all():
            raise AsrKdError(f"{graph_folder}: log priors of shape {self._log_priors.shape}, expected {info['num_state_ids']} finite values; "
                             "run the align and graph stages again")
        self._graph = _load_graph(Path(graph_folder), self.settings.word_insertion_penalty)

    def decode(self, utt_id: str, log_posteriors: NDArray[np.float32]) -> Hypothesis:
        """Best word sequence for (T, S) log posteriors.

        Raises:
            AsrKdError: wrong number of states, or NaN or infinity.
        """
        num_states = len(self._log_priors)
        if log_posteriors.ndim != 2 or log_posteriors.shape[1] != num_states:
            raise AsrKdError(f"{utt_id}: log posteriors of shape {log_posteriors.shape}, expected (frames, {num_states}); "
                             "build the graph from the network's states")
        scaled = np.ascontiguousarray(self.settings.acoustic_scale * (log_posteriors - self._log_priors), np.float32)  # (T, S)
        if not np.isfinite(scaled).all():
            bad = int(np.argwhere(~np.isfinite(scaled))[0][0])
            raise AsrKdError(f"{utt_id}: NaN or infinity in the log posteriors at frame {bad}; check the network and the features")
        started = time.thread_time()
        reached_final, labels, cost = self._search(scaled)
        return Hypothesis(utt_id, tuple(self._words[label] for label in labels), cost, reached_final, time.thread_time() - started, len(scaled))

    def _search(self, scaled: NDArray[np.float32]) -> tuple[bool, list[int], float]:
        """Whether a final state was reached, word labels, cost."""
        if not len(scaled):
            return False, [], 0.0
        options = kaldi_decoder.FasterDecoderOptions(beam=self.settings.beam, max_active=self.settings.max_active)
        decoder = kaldi_decoder.FasterDecoder(self._graph, options)
        decoder.decode(kaldi_decoder.DecodableCtc(scaled))
        found, path = decoder.get_best_path()  # found is True even where only unfinished paths are left
        if not found:
            return False, [], 0.0
        _, _, labels, weight = kaldifst.get_linear_symbol_sequence(path)
        return decoder.reached_final(), labels, weight.value1 + weight.value2


def decode(
    graph_folder: Path | str,
    utterances: Utterances,
    log_priors: ArrayLike,
    settings: DecodeSettings | None = None,
    num_jobs: int = 1,
    total: int | None = None,
) -> dict[str, Hypothesis]:
    """Decode utterances as they come, in `num_jobs` processes; the result does not depend on how many.

    The processes share one graph in memory, which they inherit. At most three utterances per process are held at a time. Utterances whose
    search ended away from a final state keep their best unfinished words; they are counted in the log.

    Args:
        utterances: utt_id and (T, S) natural log posteriors; may be a generator.
        log_priors: (S,).
        num_jobs: processes; where the system cannot fork, one is used.
        total: number of utterances, for the progress bar.

    Returns:
        utt_id -> `Hypothesis`, in the order given.

    Raises:
        AsrKdError: as `Decoder`; an utterance id comes twice; a process died.
    """
    decoder = Decoder(graph_folder, log_priors, settings)
    if "fork" not in multiprocessing.get_all_start_methods():
        num_jobs = 1
    found: dict[str, Hypothesis] = {}
    results = decode_parallel(decoder, _unique(utterances), num_jobs) if num_jobs > 1 else (decoder.decode(*pair) for pair in _unique(utterances))
    for hypothesis in progress(results, desc="decode", total=total, unit="utterance"):
        found[hypothesis.utt_id] = hypothesis
    unfinished = unfinished_utterances(found)
    if unfinished:
        logger.warning("decode: %d of %d utterances ended away from a final state, their best unfinished words are used: %s%s",
                       len(unfinished), len(found), " ".join(unfinished[:5]), " ..." if len(unfinished) > 5 else "")
    return found


def decode_parallel(decoder: Decoder, utterances: Utterances, num_jobs: int) -> Iterator[Hypothesis]:
    """Hypotheses in the order of `utterances`, of which at most three per process are held; needs a system that can fork.

    Raises:
        AsrKdError: as `Decoder.decode`, or a process died.
    """
    fork = multiprocessing.get_context("fork")  # passes the graph by inheritance, without a copy
    with ProcessPoolExecutor(num_jobs, fork, _begin_worker, (decoder, os.getpid())) as pool:
        window: deque[Future[Hypothesis]] = deque()
        try:
            for utt_id, log_posteriors in utterances:
                window.append(pool.submit(_decode_in_worker, utt_id, log_posteriors))
                if len(window) == _WINDOW_PER_JOB * num_jobs:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        except BrokenProcessPool as error:
            raise AsrKdError("decode: a worker process died, perhaps for want of memory; use fewer num_jobs or a smaller graph") from error


def unfinished_utterances(hypotheses: Mapping[str, Hypothesis]) -> list[str]:
    """Utterances whose search ended away from a final state."""
    return [utt_id for utt_id, hypothesis in hypotheses.items() if not hypothesis.reached_final]


def real_time_factor(hypotheses: Mapping[str, Hypothesis], frame_shift_ms: float = 10.0) -> float:
    """Processor seconds of search per second of audio; `AsrKdError` where there is no audio."""
    audio_s = sum(hypothesis.num_frames for hypothesis in hypotheses.values()) * frame_shift_ms / 1000
    if not audio_s:
        raise AsrKdError("real-time factor of no audio; check that the split holds utterances")
    return sum(hypothesis.decode_s for hypothesis in hypotheses.values()) / audio_s


@dataclass(frozen=True)
class Tuning:
    """The best settings, and the word errors of each that was tried."""

    settings: DecodeSettings
    tried: tuple[tuple[DecodeSettings, WordErrors], ...]


def tune(
    graph_folder: Path | str,
    utterances: Callable[[], Utterances],
    references: Mapping[str, Sequence[str]],
    log_priors: ArrayLike,
    candidates: Mapping[str, Sequence[float]],
    start: DecodeSettings | None = None,
    num_jobs: int = 1,
) -> Tuning:
    """Choose settings with the fewest word errors by coordinate search.

    One setting after another, in the order of `candidates`, takes the best of its values while the others stay, until a
    round changes nothing. Ties go to the value tried first: nearest to the start. No combination is decoded twice. A choice at the end of
    its values is told in the log.

    Args:
        utterances: called anew for each pass over the tuning utterances, so that they need not be held in memory.
        references: utt_id -> words of exactly those utterances.
        candidates: name of a `DecodeSettings` attribute -> values to try, e.g. `{"acoustic_scale": (0.1, 0.12, 0.15)}`.
        start: settings to start from.

    Raises:
        AsrKdError: as `decode`; `references` holds other utterances.
    """
    tried: dict[DecodeSettings, WordErrors] = {}

    def errors(settings: DecodeSettings) -> int:
        if settings not in tried:
            hypotheses = decode(graph_folder, utterances(), log_priors, settings, num_jobs, len(references))
            words = {utt_id: hypothesis.words for utt_id, hypothesis in hypotheses.items()}
            tried[settings] = sum(score_split(references, words).values(), WordErrors())
            logger.info("tune: acoustic scale %g, word insertion penalty %g, beam %g: WER %.2f %%", settings.acoustic_scale,
                        settings.word_insertion_penalty, settings.beam, 100 * tried[settings].wer)
        return tried[settings].errors

    best = start or DecodeSettings()
    while True:
        before = best
        for name, values in candidates.items():
            nearest_first = sorted(values, key=lambda value: abs(value - getattr(best, name)))
            best = min((_with(best, name, value) for value in nearest_first), key=errors)
        if best == before:
            for name, values in candidates.items():
                if len(values) > 1 and (chosen := getattr(best, name)) in (min(values), max(values)):
                    logger.warning("tune: %s %g is the last of %s that were tried; a wider choice may find a better one", name.replace("_", " "), chosen,
                                   ", ".join(f"{value:g}" for value in sorted(values)))
            return Tuning(best, tuple(tried.items()))


def _with(settings: DecodeSettings, name: str, value: float) -> DecodeSettings:
    changed: dict[str, Any] = {name: value}
    return replace(settings, **changed)


def write_trn(path: Path | str, words: Mapping[str, Sequence[str]]) -> None:
    """Write hypotheses as `WORDS (utt_id)`, one line per utterance."""
    write_text(path, "".join(f"{' '.join((*sequence, f'({utt_id})'))}\n" for utt_id, sequence in words.items()))


def read_trn(path: Path | str) -> dict[str, tuple[str, ...]]:
    """utt_id -> words of a file of `WORDS (utt_id)` lines.

    Raises:
        AsrKdError: the file is missing, a line has no id, or an id comes twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AsrKdError(f"{path}: could not be read ({error.strerror}); run the decode stage again") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        *words, last = line.split() or [""]
        utt_id = last[1:-1]
        if not (last.startswith("(") and last.endswith(")")) or utt_id in found:
            raise AsrKdError(f"{path}: line {number} is {line[:60]!r}, expected WORDS (utt_id) with an id of its own; run the decode stage again")
        found[utt_id] = tuple(words)
    return found


def _load_graph(folder: Path, word_insertion_penalty: float) -> Any:
    """The graph with the penalty in the weights of arcs that carry a word; the file with them, for temporary files, is gone after reading."""
    if not word_insertion_penalty:
        return kaldifst.StdConstFst.read(str(folder / GRAPH))
    try:
        with tempfile.NamedTemporaryFile(suffix=f"-{GRAPH}") as copy:
            copy_with_word_cost(folder / GRAPH, copy.name, word_insertion_penalty)
            return kaldifst.StdConstFst.read(copy.name)
    except OSError as error:
        size = os.path.getsize(folder / GRAPH) / 1e9
        raise AsrKdError(f"{tempfile.gettempdir()}: no room for a copy of {folder / GRAPH} ({error.strerror or error}), expected {size:.2f} GB; "
                         "set TMPDIR to a folder that has it") from error


def _unique(utterances: Utterances) -> Iterator[tuple[str, NDArray[np.float32]]]:
    seen: set[str] = set()
    for utt_id, log_posteriors in utterances:
        if utt_id in seen:
            raise AsrKdError(f"{utt_id}: given twice to the decoder; utterance ids must be unique across the splits read together")
        seen.add(utt_id)
        yield utt_id, log_posteriors


_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent dies
_decoder: Decoder | None = None  # of a worker process


def _begin_worker(decoder: Decoder, parent: int) -> None:
    """Take the decoder, and end with the parent, however that ends: else a worker would wait for work for ever, and hold the graph and the run's lock."""
    global _decoder
    _decoder = decoder
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _decode_in_worker(utt_id: str, log_posteriors: NDArray[np.float32]) -> Hypothesis:
    assert _decoder is not None
    return _decoder.decode(utt_id, log_posteriors)
