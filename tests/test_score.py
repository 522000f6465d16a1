import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd import score
from asr_kd.errors import AsrKdError
from asr_kd.score import FrameCounts, WordErrors, bootstrap_ci95, probability_better, score_split, word_errors

sentences = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


def edit_distance(reference, hypothesis):
    """The textbook recursion, slow and obvious."""
    if not reference or not hypothesis:
        return len(reference) + len(hypothesis)
    replace = edit_distance(reference[1:], hypothesis[1:]) + (reference[0] != hypothesis[0])
    return min(replace, edit_distance(reference[1:], hypothesis) + 1, edit_distance(reference, hypothesis[1:]) + 1)


def binomial_split(num_utterances, words_each, rate, seed=0):
    errors = np.random.default_rng(seed).binomial(words_each, rate, num_utterances)
    return {f"u{u}": WordErrors(substitutions=int(e), words=words_each) for u, e in enumerate(errors)}


def test_doctests():
    assert doctest.testmod(score).failed == 0


@settings(deadline=None, max_examples=60)
@given(sentences, sentences)
def test_word_errors_are_the_edit_distance(reference, hypothesis):
    counts = word_errors(reference, hypothesis)
    assert counts.errors == edit_distance(reference, hypothesis)
    assert counts.words == len(reference)
    assert len(hypothesis) - len(reference) == counts.insertions - counts.deletions


def test_empty_hypothesis_and_empty_reference():
    assert word_errors(["a", "b"], []) == WordErrors(deletions=2, words=2)
    assert word_errors([], ["a", "b"]) == WordErrors(insertions=2)
    assert word_errors([], []) == WordErrors()
    with pytest.raises(AsrKdError, match="no reference words"):
        _ = word_errors([], ["a"]).wer


def test_counts_are_added_and_divided_once():
    long, short = WordErrors(substitutions=1, words=99), WordErrors(insertions=1, words=1)
    assert sum([long, short], WordErrors()).wer == 2 / 100
    assert sum([FrameCounts(1, 4), FrameCounts(5, 6)], FrameCounts()).accuracy == 0.6


def test_missing_hypotheses_are_never_dropped():
    references = {"u1": ["a"], "u2": ["b", "c"]}
    with pytest.raises(AsrKdError, match=r"u2: no hypothesis \(1 of 2"):
        score_split(references, {"u1": ["a"]})
    with pytest.raises(AsrKdError, match="u3: a hypothesis without a reference"):
        score_split(references, {"u1": [], "u2": [], "u3": ["a"]})


def test_word_confusions_by_hand():
    references = {"u1": ["the", "cat", "sat", "on", "the", "mat"], "u2": ["yes"], "u3": ["no"]}
    hypotheses = {"u1": ["a", "cat", "sat", "the", "mat"], "u2": ["yes", "sir"], "u3": []}
    confusions = score.word_confusions(references, hypotheses)
    assert confusions.substitutions == {("the", "a"): 1}
    assert confusions.deletions == {"on": 1, "no": 1}
    assert confusions.insertions == {"sir": 1}


def test_frame_counts_and_confusions():
    reference, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 0])
    assert score.frame_counts("u1", reference, predicted) == FrameCounts(3, 6)
    matrix = score.frame_confusions(reference, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert score.top_confusions(matrix, ["SIL", "A", "B"], limit=5) == [
        {"reference": "B", "predicted": "SIL", "frames": 2, "share": 2 / 3}, {"reference": "SIL", "predicted": "A", "frames": 1, "share": 0.5}]
    with pytest.raises(AsrKdError, match="u1: 6 targets for 5 frames"):
        score.frame_counts("u1", reference, predicted[:-1])


def test_per_speaker_and_pool():
    errors = {"u1": WordErrors(1, 0, 0, 4), "u2": WordErrors(0, 1, 0, 2), "u3": WordErrors(0, 0, 1, 3)}
    totals = score.per_speaker(errors, {"u1": "s2", "u2": "s1", "u3": "s2"})
    assert totals == {"s1": WordErrors(0, 1, 0, 2), "s2": WordErrors(1, 0, 1, 7)}
    assert score.pool([errors, errors])["u3"] == WordErrors(0, 0, 2, 6)
    with pytest.raises(AsrKdError, match="u4: scored for one system only"):
        score.pool([errors, {**errors, "u4": WordErrors()}])


def test_interval_agrees_with_the_normal_approximation():
    split = binomial_split(400, 20, 0.2)
    total = sum(split.values(), WordErrors())
    rates = np.array([counts.errors / 20 for counts in split.values()])
    half_width = 1.96 * rates.std() / math.sqrt(len(rates))
    low, high = bootstrap_ci95(split)
    assert low == pytest.approx(total.wer - half_width, abs=0.001)
    assert high == pytest.approx(total.wer + half_width, abs=0.001)


def test_interval_equals_full_enumeration():
    split = {"u1": WordErrors(0, 0, 0, 1), "u2": WordErrors(1, 0, 0, 3), "u3": WordErrors(2, 0, 0, 2)}
    every = np.repeat([sum(draw, WordErrors()).wer for draw in itertools.product(split.values(), repeat=3)], 100)  # 27 draws, equally likely
    assert bootstrap_ci95(split, replicates=50_000) == pytest.approx(tuple(np.percentile(every, [2.5, 97.5])), abs=1e-9)


def test_interval_covers_the_truth_95_per_cent_of_the_time():
    covered = [low <= 0.2 <= high for low, high in (bootstrap_ci95(binomial_split(150, 15, 0.2, seed=s), replicates=500) for s in range(300))]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_speakers_are_the_blocks_when_there_are_enough():
    """Utterances of one speaker with one rate: 20 speakers x 30 utterances are 20 observations, not 600."""
    rates = np.random.default_rng(1).uniform(0.05, 0.4, 20)
    split = {f"s{s}-{u}": WordErrors(substitutions=round(100 * rates[s]), words=100) for s in range(20) for u in range(30)}
    speakers = {utt_id: utt_id.split("-")[0] for utt_id in split}
    low, high = bootstrap_ci95(split, speakers)
    assert high - low == pytest.approx(2 * 1.96 * rates.std() / math.sqrt(20), rel=0.1)
    few = {utt_id: "s" + str(int(utt_id.split("-")[0][1:]) % 9) for utt_id in split}
    assert bootstrap_ci95(split, few) == bootstrap_ci95(split)


def test_frame_accuracy_has_an_interval_too():
    low, high = bootstrap_ci95({f"u{u}": FrameCounts(50 + u % 3, 100) for u in range(60)})
    assert 0.505 < low < 0.51 < high < 0.515


def test_probability_better():
    split = binomial_split(200, 20, 0.2)
    worse = {utt_id: counts + WordErrors(insertions=1) for utt_id, counts in split.items()}
    assert probability_better(split, split) == 0.5
    assert probability_better(split, score.pool([split, split, split])) == 0.5
    assert probability_better(split, worse) == 1.0
    assert probability_better(worse, split) == 0.0


def test_probability_better_agrees_with_the_normal_approximation():
    ours, theirs = binomial_split(500, 20, 0.2, seed=1), binomial_split(500, 20, 0.2, seed=2)
    difference = np.array([ours[u].errors - theirs[u].errors for u in ours])
    z = -difference.mean() / (difference.std() / math.sqrt(len(difference)))
    expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert 0.05 < expected < 0.95
    assert probability_better(ours, theirs) == pytest.approx(expected, abs=0.015)
    assert probability_better(ours, theirs) == pytest.approx(1 - probability_better(theirs, ours), abs=1e-9)


def test_same_seed_same_interval_and_empty_split():
    split = binomial_split(53, 17, 0.3)
    first, again, other = (bootstrap_ci95(split, seed=seed, replicates=200) for seed in (5, 5, 6))
    assert first == again != other
    with pytest.raises(AsrKdError, match="no utterances were scored"):
        bootstrap_ci95({})


def test_rows_of_results_json():
    errors = {"u1": WordErrors(1, 0, 0, 4), "u2": WordErrors(0, 1, 1, 6)}
    frames = {"u1": FrameCounts(1, 2), "u2": FrameCounts(2, 2)}
    row = score.system_row(frames, errors, real_time_factor=0.1)
    low, high = row.pop("wer_ci95")
    assert low <= row["wer"] <= high
    assert row.pop("frame_accuracy_ci95") == [0.5, 1.0]  # one utterance twice, or the other, or both
    assert row == {"frame_accuracy": 0.75, "wer": 0.3, "errors": 3, "words": 10, "substitutions": 1, "deletions": 1, "insertions": 1,
                   "real_time_factor": 0.1}
    assert score.system_row(frames) == {"frame_accuracy": 0.75, "frame_accuracy_ci95": [0.5, 1.0]}


def test_gain_kept_of_the_paper():
    """Hinton, Vinyals & Dean 2015, table 1: 86 % of the frame accuracy and all of the WER gain."""
    baseline, ensemble, distilled = ({"frame_accuracy": a, "wer": w} for a, w in ((0.589, 0.109), (0.611, 0.107), (0.608, 0.107)))
    kept = score.gain_kept(baseline, ensemble, distilled)
    assert kept["frame_accuracy"] == pytest.approx(0.86, abs=0.005)
    assert kept["wer"] == pytest.approx(1.0)
    assert score.gain_kept(baseline, baseline, distilled) == {"frame_accuracy": None, "wer": None}
    alone = [{"wer": row["wer"]} for row in (baseline, ensemble, distilled)]
    assert score.gain_kept(*alone) == {"frame_accuracy": None, "wer": kept["wer"]}
