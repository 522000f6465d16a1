"""Graphs, batches and chunks of a corpus, and the threads that work on them."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spectral_speech import LEXICON, Spoken

from asr_kd.hmm import corpus
from asr_kd.hmm.aligner import Aligner
from asr_kd.hmm.corpus import FixedPhones, Graphs, chunks, speaker_chunks, usable_utterances, viterbi_batches
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.topology import AlignmentGraph
from asr_kd.manifest import Exclusion


def test_an_utterance_too_long_to_align_at_once_is_listed(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, _, _ = spoken
    graphs, features = Graphs(words, LEXICON, ("SIL", *LEXICON.phones)), joined(store)
    cells = {utt_id: store.length(utt_id) * graphs[utt_id].num_states for utt_id in words}
    longest = max(cells, key=lambda utt_id: cells[utt_id])
    monkeypatch.setattr("asr_kd.hmm.corpus.MAX_UTTERANCE_CELLS", cells[longest] - 1)
    assert usable_utterances(graphs, features)[1] == [Exclusion(
        longest, f"{store.length(longest)} frames with {graphs[longest].num_states} states of its transcript, too long to align at once: cut it")]
    monkeypatch.setattr("asr_kd.hmm.corpus.MAX_UTTERANCE_CELLS", cells[longest])
    assert usable_utterances(graphs, features)[1] == []


def test_sizes_of_graphs_are_told_without_building_them(spoken: Spoken, trained_aligner: tuple[Aligner, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = spoken
    features, phones, cpu = joined(store), trained_aligner[0].hmm.phones, torch.device("cpu")
    graphs = Graphs(words, LEXICON, phones)
    sizes = {utt_id: graphs[utt_id].num_states for utt_id in words}
    found = trained_aligner[0].align(Frontend.of(features, speakers, list(words)), graphs, list(words))
    fixed = FixedPhones(graphs, {utt_id: own for utt_id, own in found.items() if own is not None})
    fixed_sizes = {utt_id: fixed[utt_id].num_states for utt_id in words}

    def build(*_: object) -> AlignmentGraph:
        raise AssertionError("a graph was built")

    monkeypatch.setattr("asr_kd.hmm.corpus.build_alignment_graph", build)
    monkeypatch.setattr("asr_kd.hmm.corpus.path_graph", build)
    fresh = Graphs(words, LEXICON, phones)
    assert usable_utterances(fresh, features) == (list(words), [])
    assert {utt_id: fresh.size(utt_id) for utt_id in words} == sizes
    assert {utt_id: fixed.size(utt_id) for utt_id in words} == fixed_sizes
    assert sorted(utt_id for batch in viterbi_batches(words, fixed, features, cpu) for utt_id in batch) == sorted(words)


def test_few_threads_feed_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "num_threads", lambda: 8)

    def work(number: int) -> tuple[int, int]:
        time.sleep(0.005)
        return number, threading.get_ident()

    for device, threads in (("cpu", 8), ("meta", corpus.GPU_THREADS)):
        numbers, idents = zip(*corpus.map_threads(work, range(60), torch.device(device)), strict=True)
        assert numbers == tuple(range(60))
        assert len(set(idents)) == threads


def test_batches_and_chunks_hold_every_utterance_once(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, _, _ = spoken
    features = joined(store)
    monkeypatch.setattr("asr_kd.hmm.corpus.MAX_BATCH_CELLS", 100_000)
    batches = viterbi_batches(words, Graphs(words, LEXICON, ("SIL", *LEXICON.phones)), features, torch.device("cpu"))
    assert sorted(utt_id for batch in batches for utt_id in batch) == sorted(words)
    assert len(batches) > 1
    parts = list(chunks(words, features, 400))
    assert [utt_id for part in parts for utt_id in part] == list(words)
    assert all(len(part) == 1 or sum(map(features.length, part)) <= 400 for part in parts)


def test_chunks_of_whole_speakers() -> None:
    lengths = {"a1": 5, "b1": 3, "a2": 4, "c1": 2}
    features = SimpleNamespace(length=lengths.__getitem__)
    speakers = {utt_id: utt_id[0] for utt_id in lengths}
    for most, expected in ((14, [["a1", "a2", "b1", "c1"]]), (13, [["a1", "a2", "b1"], ["c1"]]), (5, [["a1", "a2"], ["b1", "c1"]]),
                           (1, [["a1", "a2"], ["b1"], ["c1"]])):
        assert speaker_chunks(lengths, speakers, features, most) == expected  # type: ignore[arg-type]
    assert speaker_chunks([], speakers, features, 10) == []  # type: ignore[arg-type]
