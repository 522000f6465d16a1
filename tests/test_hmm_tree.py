"""Tying against direct computation from frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from asr_kd.errors import AsrKdError
from asr_kd.hmm.model import EDGE, SIL, context_codes, split_codes
from asr_kd.hmm.tree import ContextStatistics, Leaf, best_split, grow_tree, log_likelihood, phone_questions, state_table

NUM_PHONES = 6
FLOOR = np.full(2, 1e-4)


def moments_of(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([[len(frames)], frames.sum(0), (frames**2).sum(0)])


def made_up(seed: int) -> tuple[ContextStatistics, dict[int, np.ndarray]]:
    """Frames of a few dozen states in context; left phones 2, 3 sound alike, so do 4, 5."""
    rng = np.random.default_rng(seed)
    shift = np.array([0.0, 0.5, 3.0, 3.2, -3.0, -3.1, 0.0])
    frames: dict[int, np.ndarray] = {}
    for left in range(NUM_PHONES + 1):
        for centre in (1, 2, 3, 4, 5, 6):
            for right in (0, 2, 4):
                for k, code in enumerate(context_codes(left, centre, right, NUM_PHONES).tolist()):
                    if centre == SIL and (left, right) != (0, 0):
                        continue
                    frames[code] = rng.normal([shift[left] * (k == 0) + shift[centre], shift[right] * (k == 2)], 1.0, (int(rng.integers(5, 40)), 2))
    codes = np.sort(np.fromiter(frames, np.int32))
    return ContextStatistics(codes, np.stack([moments_of(frames[code]) for code in codes.tolist()])), frames


def direct_log_likelihood(frames: np.ndarray) -> float:
    """Of frames under the Gaussian fitted to them."""
    if len(frames) == 0:
        return 0.0
    return float(norm.logpdf(frames, frames.mean(0), np.maximum(frames.std(0), np.sqrt(FLOOR))).sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(10, 200))
def test_log_likelihood_of_moments(seed: int, number: int) -> None:
    frames = np.random.default_rng(seed).normal(0, 2, (number, 2))
    assert log_likelihood(moments_of(frames), FLOOR) == pytest.approx(direct_log_likelihood(frames), rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_split_has_the_largest_gain_of_all_questions(seed: int) -> None:
    statistics, frames = made_up(seed)
    left, centre, right, position = split_codes(statistics.codes, NUM_PHONES)
    questions = phone_questions(statistics, NUM_PHONES, FLOOR)
    rows = np.flatnonzero((centre == 3) & (position == 0))
    split = best_split(statistics.moments[rows], left[rows], right[rows], questions, 30, FLOOR)
    gains = {}
    for is_left, phones in ((True, left[rows]), (False, right[rows])):
        for q, question in enumerate(questions):
            sides = [[frames[code] for code, phone in zip(statistics.codes[rows].tolist(), phones, strict=True) if question[phone] == wanted]
                     for wanted in (True, False)]
            both = [np.concatenate([np.empty((0, 2)), *side]) for side in sides]
            if min(map(len, both)) >= 30:
                gains[is_left, q] = sum(map(direct_log_likelihood, both)) - direct_log_likelihood(np.concatenate(both))
    assert split is not None
    assert split.gain == pytest.approx(max(gains.values()), rel=1e-6)
    is_left, q = max(gains, key=lambda key: gains[key])
    assert split.is_left == is_left
    inside = split.yes if (split.yes == questions[q]).all() else ~split.yes
    assert (inside == questions[q]).all()


def test_greedy_tree_gains_as_much_as_its_leaves_say() -> None:
    statistics, frames = made_up(0)
    leaves = grow_tree(statistics, NUM_PHONES, 40, min_frames=30, min_gain=0.0, variance_floor=FLOOR)
    table = state_table(leaves, NUM_PHONES)
    assert len(leaves) == 40
    tied = table.reshape(-1)[statistics.codes]
    for state in range(40):
        pooled = np.concatenate([frames[code] for code in statistics.codes[tied == state].tolist()])
        assert log_likelihood(statistics.moments[tied == state].sum(0), FLOOR) == pytest.approx(direct_log_likelihood(pooled), rel=1e-6)
    by_size = [sum(float(log_likelihood(statistics.moments[tied == s].sum(0), FLOOR)) for s in np.unique(tied))
               for n in (18, 25, 40) for tied in [state_table(grow_tree(statistics, NUM_PHONES, n, min_frames=30, min_gain=0.0, variance_floor=FLOOR),
                                                              NUM_PHONES).reshape(-1)[statistics.codes]]]
    assert by_size == sorted(by_size)


def test_every_context_has_one_state_of_its_phone_and_position() -> None:
    statistics, _ = made_up(1)
    table = state_table(grow_tree(statistics, NUM_PHONES, 50, min_frames=20, min_gain=0.0, variance_floor=FLOOR), NUM_PHONES)
    assert (table[:, EDGE] == -1).all()
    assert (table[:, 1:] >= 0).all()
    assert sorted(np.unique(table[:, 1:])) == list(range(50))
    owners: dict[int, set[tuple[int, int]]] = {}
    for _, centre, _, k in np.ndindex(table[:, 1:].shape):
        for state in np.unique(table[:, centre + 1, :, k]).tolist():
            owners.setdefault(state, set()).add((centre + 1, k))
    silence = table[EDGE, SIL, EDGE, 0]
    assert (table[:, SIL] == silence).all()  # one state, without context
    assert all(len(owner) == 1 for state, owner in owners.items() if state != silence)


def test_questions_hold_singletons_alike_phones_and_the_edge() -> None:
    statistics, _ = made_up(2)
    questions = {tuple(np.flatnonzero(q).tolist()) for q in phone_questions(statistics, NUM_PHONES, FLOOR)}
    assert {(phone,) for phone in range(NUM_PHONES + 1)} <= questions
    assert (2, 3) in questions  # made to sound alike
    assert (4, 5) in questions
    assert (EDGE, SIL) in questions


def test_too_few_states_is_an_error() -> None:
    statistics, _ = made_up(0)
    with pytest.raises(AsrKdError, match="at least 18"):
        grow_tree(statistics, NUM_PHONES, 17, min_frames=30, min_gain=0.0, variance_floor=FLOOR)


def test_state_table_of_hand_made_leaves() -> None:
    everything = np.ones(3, np.bool_)
    first = np.array([True, False, False])
    leaves = [Leaf(SIL, 0, everything, everything), *(Leaf(2, k, everything, everything) for k in range(3))]
    leaves[2] = Leaf(2, 1, first, everything)
    leaves.append(Leaf(2, 1, ~first, everything))
    table = state_table(leaves, 2)
    assert table[0, 2, 0].tolist() == [1, 2, 4]
    assert table[1, 2, 0].tolist() == [1, 3, 4]
    assert table[1, 1, 2].tolist() == [0, 0, 0]
