"""Alignment graphs and batched Viterbi against enumeration of all paths and hand-worked cases."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.hmm.corpus import num_graph_states
from asr_kd.hmm.model import EDGE, SIL, HmmModel, context_codes, split_codes, untied_model
from asr_kd.hmm.topology import PLAIN, AlignmentGraph, build_alignment_graph, even_path
from asr_kd.hmm.viterbi import choice_weights, viterbi

NUM_PHONES = 4
A, B, C = 2, 3, 4


def random_hmm(rng: np.random.Generator, num_phones: int = NUM_PHONES) -> HmmModel:
    """Context-independent states with random transitions."""
    base = untied_model(("SIL", *"ABCDEFG"[: num_phones - 1]))
    leave = rng.uniform(0.05, 0.95, base.num_states)
    return HmmModel(base.phones, base.state_table, np.log1p(-leave).astype(np.float32), np.log(leave).astype(np.float32), float(np.log(rng.uniform(0.1, 0.9))),
                    base.log_priors)


def enumerated(graph: AlignmentGraph, hmm: HmmModel, table: np.ndarray) -> tuple[float, list[int]]:
    """Best path by trying every sequence of graph states."""
    weights = choice_weights(hmm.log_optional_silence)
    tied = hmm.flat_table[graph.codes]
    moves = {(j, j): hmm.log_self_loop[tied[j]] for j in range(graph.num_states)}
    moves |= {(j, j + 1): hmm.log_advance[tied[j]] for j in range(graph.num_states) if j % 3 < 2}
    moves |= {(3 * a + 2, 3 * b): hmm.log_advance[tied[3 * a + 2]] + weights[kind]
              for a, b, kind in zip(graph.arc_from, graph.arc_to, graph.arc_kind, strict=True)}
    begin = {3 * n: weights[kind] for n, kind in zip(graph.start, graph.start_kind, strict=True)}
    finish = {3 * n + 2: hmm.log_advance[tied[3 * n + 2]] + weights[kind] for n, kind in zip(graph.end, graph.end_kind, strict=True)}
    best: tuple[float, list[int]] = (-np.inf, [])

    def extend(path: list[int], score: float) -> None:
        nonlocal best
        if len(path) == len(table):
            total = score + finish.get(path[-1], -np.inf)
            if total > best[0]:
                best = (total, path)
            return
        for (source, target), weight in moves.items():
            if source == path[-1]:
                extend([*path, target], score + weight + table[len(path), target])

    for first, weight in begin.items():
        extend([first], weight + table[0, first])
    return best


pronunciation = st.lists(st.integers(2, NUM_PHONES), min_size=1, max_size=2).map(tuple)
transcript = st.lists(st.lists(pronunciation, min_size=1, max_size=2, unique=True), min_size=1, max_size=2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(transcript, st.integers(1, 9)), min_size=1, max_size=3), st.integers(0, 2**31))
def test_batched_viterbi_finds_the_best_of_all_paths(cases: list[tuple[list[list[tuple[int, ...]]], int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    hmm = random_hmm(rng)
    graphs = [build_alignment_graph(words, NUM_PHONES) for words, _ in cases]
    tables = [rng.normal(0, 2, (frames, graph.num_states)).astype(np.float32) for graph, (_, frames) in zip(graphs, cases, strict=True)]
    paths = viterbi(graphs, hmm, list(map(torch.from_numpy, tables)), [np.arange(graph.num_states) for graph in graphs])
    for (words, _), graph, table, path in zip(cases, graphs, tables, paths, strict=True):
        score, states = enumerated(graph, hmm, table)
        if not states:
            assert path is None
            assert len(table) < 3 * sum(min(map(len, variants)) for variants in words)
        else:
            assert path is not None
            assert path.log_probability == pytest.approx(score, abs=1e-3)
            assert len(path.states) == len(table)
            assert path.states.tolist() == states


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.lists(st.integers(2, NUM_PHONES), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3), max_size=5))
def test_states_of_a_graph_are_counted_without_building_it(words: list[list[tuple[int, ...]]]) -> None:
    assert num_graph_states(words) == build_alignment_graph(words, NUM_PHONES).num_states


def test_the_shortest_length_that_can_be_aligned() -> None:
    graph = build_alignment_graph([[(A, B, C), (A,)], [(B, B)]], NUM_PHONES)
    hmm = random_hmm(np.random.default_rng(0))
    for frames, expected in ((8, False), (9, True)):
        table = np.zeros((frames, graph.num_states), np.float32)
        assert (viterbi([graph], hmm, [torch.from_numpy(table)], [np.arange(graph.num_states)])[0] is not None) is expected


def step_by_step(graph: AlignmentGraph, hmm: HmmModel, table: np.ndarray) -> tuple[float, np.ndarray]:
    """Best path of an utterance in double precision, one frame after another over a matrix of all moves."""
    weights = choice_weights(hmm.log_optional_silence).astype(np.float64)
    tied = hmm.flat_table[graph.codes]
    moves = np.full((graph.num_states, graph.num_states), -np.inf)
    np.fill_diagonal(moves, hmm.log_self_loop[tied])
    for j in range(graph.num_states - 1):
        if j % 3 < 2:
            moves[j, j + 1] = hmm.log_advance[tied[j]]
    for a, b, kind in zip(graph.arc_from, graph.arc_to, graph.arc_kind, strict=True):
        moves[3 * a + 2, 3 * b] = hmm.log_advance[tied[3 * a + 2]] + weights[kind]
    scores = np.full(graph.num_states, -np.inf)
    scores[3 * graph.start] = weights[graph.start_kind]
    scores += table[0]
    back = np.zeros(table.shape, np.int64)
    for t in range(1, len(table)):
        candidates = scores[:, None] + moves
        back[t] = candidates.argmax(0)
        scores = candidates.max(0) + table[t]
    ends = 3 * graph.end + 2
    final = scores[ends] + hmm.log_advance[tied[ends]] + weights[graph.end_kind]
    states = [ends[final.argmax()]]
    for t in range(len(table) - 1, 0, -1):
        states.append(back[t, states[-1]])
    return final.max(), np.array(states[::-1])


def test_minutes_of_states_that_sound_alike_are_not_rounded_away() -> None:
    """At -49 per frame, an adapted model's log-likelihood, float32 sums over more than a minute are rounded to thirty-seconds."""
    rng = np.random.default_rng(5)
    hmm = random_hmm(rng)
    graphs = [build_alignment_graph([[tuple(rng.integers(2, NUM_PHONES + 1, 3))] for _ in range(words)], NUM_PHONES) for words in (3, 2)]
    tables = [(-49 + 0.3 * rng.normal(size=(frames, graph.num_states))).astype(np.float32) for graph, frames in zip(graphs, (8_000, 300), strict=True)]
    paths = viterbi(graphs, hmm, list(map(torch.from_numpy, tables)), [np.arange(graph.num_states) for graph in graphs])
    for graph, table, path in zip(graphs, tables, paths, strict=True):
        score, states = step_by_step(graph, hmm, table.astype(np.float64))
        assert path is not None
        assert path.log_probability == pytest.approx(score, abs=1.0)
        assert np.array_equal(path.states, states)


def test_no_finite_path_gives_none_beside_an_utterance_that_has_one() -> None:
    graph = build_alignment_graph([[(A,)]], NUM_PHONES)
    hmm = random_hmm(np.random.default_rng(1))
    good = np.zeros((5, graph.num_states), np.float32)
    bad = good.copy()
    bad[2] = -np.inf
    columns = np.arange(graph.num_states)
    first, second = viterbi([graph, graph], hmm, [torch.from_numpy(bad), torch.from_numpy(good)], [columns, columns])
    assert first is None
    assert second is not None


def phone_sequences(graph: AlignmentGraph) -> set[tuple[tuple[int, int, int], ...]]:
    """Every way through a graph as (left, phone, right), silence without context."""
    left, centre, right, _ = split_codes(graph.codes[::3], NUM_PHONES)
    after = {n: [] for n in range(graph.num_states // 3)}
    for a, b in zip(graph.arc_from.tolist(), graph.arc_to.tolist(), strict=True):
        after[a].append(b)
    found = set()

    def walk(path: list[int]) -> None:
        if path[-1] in graph.end:
            found.add(tuple((int(left[n]), int(centre[n]), int(right[n])) for n in path))
        for n in after[path[-1]]:
            walk([*path, n])

    for n in graph.start.tolist():
        walk([n])
    return found


@settings(deadline=None, max_examples=50)
@given(transcript)
def test_graph_holds_every_variant_and_silence_with_exact_contexts(words: list[list[tuple[int, ...]]]) -> None:
    expected = set()
    for variants in itertools.product(*words):
        for silences in itertools.product((False, True), repeat=len(words) + 1):
            phones = [SIL] if silences[0] else []
            for variant, silence in zip(variants, silences[1:], strict=True):
                phones += [*variant, SIL] if silence else list(variant)
            padded = [EDGE, *phones, EDGE]
            expected.add(tuple((EDGE, SIL, EDGE) if centre == SIL else (left, centre, right)
                               for left, centre, right in zip(padded[:-2], phones, padded[2:], strict=True)))
    assert phone_sequences(build_alignment_graph(words, NUM_PHONES)) == expected


def test_hand_worked_optional_silence() -> None:
    """Word A, then word B: frames that sound like A, silence, B take the silence between; without that sound they do not."""
    graph = build_alignment_graph([[(A,)], [(B,)]], NUM_PHONES)
    hmm = random_hmm(np.random.default_rng(2))
    _, centre, _, _ = split_codes(graph.codes, NUM_PHONES)

    def aligned(sounds: list[int]) -> list[int]:
        table = np.where(np.asarray(sounds)[:, None] == centre[None, :], 0.0, -50.0).astype(np.float32)
        path = viterbi([graph], hmm, [torch.from_numpy(table)], [np.arange(graph.num_states)])[0]
        assert path is not None
        return centre[path.states].tolist()

    with_silence = [A] * 3 + [SIL] * 4 + [B] * 3
    assert aligned(with_silence) == with_silence
    assert aligned([A] * 4 + [B] * 4) == [A] * 4 + [B] * 4
    at_ends = [SIL] * 3 + [A] * 3 + [B] * 5 + [SIL] * 3
    assert aligned(at_ends) == at_ends


def test_hand_worked_pronunciation_variant() -> None:
    graph = build_alignment_graph([[(A, B), (C,)]], NUM_PHONES)
    hmm = random_hmm(np.random.default_rng(3))
    _, centre, _, _ = split_codes(graph.codes, NUM_PHONES)
    table = np.where(centre == C, 0.0, -50.0).astype(np.float32)[None].repeat(6, 0)
    path = viterbi([graph], hmm, [torch.from_numpy(table)], [np.arange(graph.num_states)])[0]
    assert path is not None
    assert centre[path.states].tolist() == [C] * 6


@pytest.mark.parametrize("said", [A, B, C])
def test_hand_worked_silence_with_many_predecessors(said: int) -> None:
    """A word of three pronunciations, a pause, another word: silence is reached from three ends."""
    graph = build_alignment_graph([[(A,), (B,), (C,)], [(A,), (B,), (C,)]], NUM_PHONES)
    hmm = random_hmm(np.random.default_rng(4))
    _, centre, _, _ = split_codes(graph.codes, NUM_PHONES)
    for second in (A, B, C):
        sounds = [said] * 4 + [SIL] * 3 + [second] * 5
        table = np.where(np.asarray(sounds)[:, None] == centre[None, :], 0.0, -50.0).astype(np.float32)
        path = viterbi([graph], hmm, [torch.from_numpy(table)], [np.arange(graph.num_states)])[0]
        assert path is not None
        assert centre[path.states].tolist() == sounds


def test_contexts_at_sentence_edges_are_zero() -> None:
    graph = build_alignment_graph([[(A, B)]], NUM_PHONES)
    left, centre, right, _ = split_codes(graph.codes[::3], NUM_PHONES)
    triples = set(zip(left.tolist(), centre.tolist(), right.tolist(), strict=True))
    assert triples == {(EDGE, SIL, EDGE), (EDGE, A, B), (SIL, A, B), (A, B, EDGE), (A, B, SIL)}
    assert (graph.arc_kind != PLAIN).sum() == 1  # from B before silence into the last silence

@settings(deadline=None, max_examples=20)
@given(st.lists(pronunciation, min_size=1, max_size=4), st.integers(30, 60))
def test_even_path_visits_all_states_for_like_times(words: list[tuple[int, ...]], num_frames: int) -> None:
    path = even_path([[word] for word in words], NUM_PHONES, num_frames)
    phones = [SIL, *itertools.chain(*words), SIL]
    _, centre, _, position = split_codes(path, NUM_PHONES)
    runs = [(key, len(list(group))) for key, group in itertools.groupby(range(num_frames), key=lambda t: t * 3 * len(phones) // num_frames)]
    assert [count for _, count in runs]
    assert max(c for _, c in runs) - min(c for _, c in runs) <= 1
    states = [(int(centre[t]), int(position[t])) for t in range(num_frames)]
    assert [key for key, _ in itertools.groupby(states)] == [key for key, _ in itertools.groupby((p, k) for p in phones for k in range(3))]


def test_context_codes_round_trip() -> None:
    rng = np.random.default_rng(0)
    left, centre, right = rng.integers(0, 8, (3, 50))
    codes = context_codes(left, centre, right, 7)
    assert len(np.unique(codes.reshape(-1))) == 3 * len(np.unique(np.stack([left, centre, right]), axis=1).T)
    back = split_codes(codes, 7)
    for k in range(3):
        assert np.array_equal(back[0][:, k], left)
        assert np.array_equal(back[1][:, k], centre)
        assert np.array_equal(back[2][:, k], right)
        assert (back[3][:, k] == k).all()
