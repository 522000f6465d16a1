"""Tying of triphone states by phonetic decision trees with automatic questions.

Every leaf of a phone state's tree is a set of left phones times a set of right phones, since each question asks for one of
the two; so a leaf is kept as two masks and no tree has to be walked.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asr_kd.errors import AsrKdError
from asr_kd.hmm.model import EDGE, SIL, STATES_PER_PHONE, split_codes
from asr_kd.progress import progress

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ContextStatistics:
    """First and second moments of the frames of every state in context that occurs.

    Attributes:
        codes: (U,) context codes, sorted.
        moments: (U, 1 + 2 D) float64: number of frames, sum, sum of squares.
    """

    codes: NDArray[np.int32]
    moments: FloatArray


def log_likelihood(moments: FloatArray, variance_floor: FloatArray) -> FloatArray:
    """Log-likelihood of frames under their own diagonal Gaussian, from moments (..., 1 + 2 D): -n/2 · sum(log 2 pi var + 1)."""
    dim = (moments.shape[-1] - 1) // 2
    count = moments[..., 0]
    safe = np.maximum(count, 1e-10)[..., None]
    mean = moments[..., 1 : dim + 1] / safe
    variance = np.maximum(moments[..., dim + 1 :] / safe - mean**2, variance_floor)
    score: FloatArray = np.where(count > 0, -0.5 * count * (np.log(2 * math.pi * variance) + 1).sum(-1), 0.0)
    return score


def phone_questions(statistics: ContextStatistics, num_phones: int, variance_floor: FloatArray) -> BoolArray:
    """Sets of phones, (Q, n) with n = num_phones + 1: every cluster met while merging the most alike phones one by one.

    Alike are phones whose three states lose the least likelihood when they share Gaussians. The edge of the utterance is
    asked for alone and together with silence.
    """
    n = num_phones + 1
    _, centre, _, position = split_codes(statistics.codes, num_phones)
    moments = np.zeros((n, STATES_PER_PHONE, statistics.moments.shape[1]))
    np.add.at(moments, (centre, position), statistics.moments)
    clusters = [np.arange(n) == phone for phone in range(1, n)]
    pool = [moments[phone] for phone in range(1, n)]
    active = list(range(len(clusters)))

    def score(members: FloatArray) -> FloatArray:
        total: FloatArray = log_likelihood(members, variance_floor).sum(-1)
        return total

    loss = np.full((2 * n, 2 * n), np.inf)
    for a in active:
        for b in active[:a]:
            loss[a, b] = score(pool[a]) + score(pool[b]) - score(pool[a] + pool[b])
    while len(active) > 2:
        a, b = divmod(int(loss.argmin()), loss.shape[1])
        new = len(clusters)
        clusters.append(clusters[a] | clusters[b])
        pool.append(pool[a] + pool[b])
        for gone in (a, b):
            loss[gone], loss[:, gone] = np.inf, np.inf
            active.remove(gone)
        for other in active:
            loss[new, other] = score(pool[new]) + score(pool[other]) - score(pool[new] + pool[other])
        active.append(new)
    ids = np.arange(n)
    return np.stack([*clusters, ids == EDGE, (ids == EDGE) | (ids == SIL)])


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tied state: `centre`'s state `position` between any of the `left` and any of the `right` phones (masks (n,)); of silence all three states."""

    centre: int
    position: int
    left: BoolArray
    right: BoolArray


@dataclass(frozen=True, eq=False)
class _Split:
    gain: float
    yes: BoolArray
    is_left: bool


def check_num_states(num_states: int, num_phones: int) -> None:
    """Raise `AsrKdError` for fewer states than three per phone, silence included."""
    if num_states < num_phones * STATES_PER_PHONE:
        raise AsrKdError(f"num_states: got {num_states}, expected at least {num_phones * STATES_PER_PHONE} (three for each of {num_phones} phones); raise it")


def grow_tree(statistics: ContextStatistics, num_phones: int, num_states: int, *, min_frames: float, min_gain: float,
              variance_floor: FloatArray) -> list[Leaf]:
    """Split the leaf that gains most likelihood until there are `num_states` of them, or none can be split.

    The states of silence share one leaf: where a pause passes from one to the next is arbitrary, and a network that is asked to tell them
    apart gets a third of the quiet frames wrong.

    Args:
        min_frames: both sides of a split must have as many frames.
        min_gain: smallest gain in log-likelihood of a split.

    Raises:
        AsrKdError: fewer states asked for than three per phone.
    """
    check_num_states(num_states, num_phones)
    n = num_phones + 1
    questions = phone_questions(statistics, num_phones, variance_floor)
    left, centre, right, position = split_codes(statistics.codes, num_phones)
    everything = np.ones(n, np.bool_)
    leaves: list[Leaf] = []
    members: list[NDArray[np.intp]] = []
    queue: list[tuple[float, int, _Split]] = []

    def add(leaf: Leaf, rows: NDArray[np.intp]) -> None:
        leaves.append(leaf)
        members.append(rows)

    def consider(index: int) -> None:
        if leaves[index].centre == SIL:
            return
        rows = members[index]
        split = best_split(statistics.moments[rows], left[rows], right[rows], questions, min_frames, variance_floor)
        if split is not None and split.gain > min_gain:
            heapq.heappush(queue, (-split.gain, index, split))

    add(Leaf(SIL, 0, everything, everything), np.flatnonzero(centre == SIL))
    for phone in range(SIL + 1, n):
        for k in range(STATES_PER_PHONE):
            add(Leaf(phone, k, everything, everything), np.flatnonzero((centre == phone) & (position == k)))
    for index in range(len(leaves)):
        consider(index)
    with progress(desc="tying states", total=num_states - len(leaves), unit="split") as bar:
        while queue and len(leaves) < num_states:
            _, index, split = heapq.heappop(queue)
            leaf, rows = leaves[index], members[index]
            inside = split.yes[(left if split.is_left else right)[rows]]
            yes, no = ((leaf.left & side, leaf.right) if split.is_left else (leaf.left, leaf.right & side) for side in (split.yes, ~split.yes))
            leaves[index], members[index] = Leaf(leaf.centre, leaf.position, *yes), rows[inside]
            add(Leaf(leaf.centre, leaf.position, *no), rows[~inside])
            consider(index)
            consider(len(leaves) - 1)
            bar.update(1)
    return leaves


def best_split(moments: FloatArray, left: NDArray[np.integer], right: NDArray[np.integer], questions: BoolArray, min_frames: float,
               variance_floor: FloatArray) -> _Split | None:
    """The question about one neighbour that raises the likelihood of these contexts (rows of `moments`) most."""
    total = moments.sum(0)
    whole = log_likelihood(total, variance_floor)
    best: _Split | None = None
    for is_left, phones in ((True, left), (False, right)):
        by_phone = np.zeros((questions.shape[1], moments.shape[1]))
        np.add.at(by_phone, phones, moments)
        yes = questions.astype(np.float64) @ by_phone  # (Q, 1 + 2 D)
        no = total - yes
        gain = log_likelihood(yes, variance_floor) + log_likelihood(no, variance_floor) - whole
        gain[(yes[:, 0] < min_frames) | (no[:, 0] < min_frames)] = -np.inf
        top = int(gain.argmax())
        if np.isfinite(gain[top]) and (best is None or gain[top] > best.gain):
            best = _Split(float(gain[top]), questions[top], is_left)
    return best


def state_table(leaves: list[Leaf], num_phones: int) -> NDArray[np.int32]:
    """The (n, n, n, 3) table of `HmmModel`; state ids in order of phone, position, then leaf."""
    n = num_phones + 1
    table = np.full((n, n, n, STATES_PER_PHONE), -1, np.int32)
    order = sorted(range(len(leaves)), key=lambda i: (leaves[i].centre, leaves[i].position, i))
    for state, i in enumerate(order):
        leaf = leaves[i]
        table[:, leaf.centre, :, leaf.position][np.ix_(leaf.left, leaf.right)] = state
    table[:, SIL, :, 1:] = table[:, SIL, :, :1]
    return table
