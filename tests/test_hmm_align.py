"""Alignment of made-up speech whose true times are known."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from spectral_speech import LEXICON, Spoken, speak

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.align import Segments, align, align_with_network, segment_rows, with_state_priors
from asr_kd.hmm.aligner import ADAPTATIONS, Aligner
from asr_kd.hmm.corpus import Aligned, Graphs
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.model import EDGE, untied_model
from asr_kd.manifest import Exclusion


def test_unseen_utterances_are_aligned_to_their_true_times(trained_aligner: tuple[Aligner, Path], tmp_path: Path) -> None:
    aligner = trained_aligner[0]
    store, words, speakers, truth = speak(tmp_path / "features", 12, 99, "new")
    assert align(aligner, store, words, speakers, LEXICON, tmp_path / "out") == []
    segments, targets = Segments(tmp_path / "out"), FrameStore(tmp_path / "out")
    errors = []
    for utt_id, times in truth.items():
        found = segments.words(utt_id, words[utt_id])
        assert [word for word, _, _ in found] == list(words[utt_id])
        ends = {before[2] for before, after in itertools.pairwise(times) if LEXICON[before[0]][0][-1] == LEXICON[after[0]][0][0]}
        within_a_sound = {after[1] for after in times}.intersection(ends)  # two of the same phone without a pause: nobody could say where
        errors += [abs(got - true) for (_, *span), (_, *expected) in zip(found, times, strict=True)
                   for got, true in zip(span, expected, strict=True) if true not in within_a_sound]
        assert targets.length(utt_id) == store.length(utt_id)
        phones = segments.phones(utt_id)
        assert phones[0][1] == 0
        assert phones[-1][2] == store.length(utt_id)
        assert all(before[2] == after[1] for before, after in itertools.pairwise(phones))
    # sounds change from one frame to the next here, and that is where boundaries are found
    assert np.mean(np.asarray(errors) <= 1) > 0.99
    assert np.max(errors) <= 3


def test_boundary_models_move_boundaries_only(trained_aligner: tuple[Aligner, Path], tmp_path: Path) -> None:
    aligner = trained_aligner[0]
    store, words, speakers, truth = speak(tmp_path / "features", 12, 99, "new")
    graphs = Graphs(words, LEXICON, aligner.hmm.phones)
    frontend = Frontend.of(joined(store), speakers, list(words))
    found = aligner.align(frontend, graphs, list(words))
    without_path = {"lost": None}
    timed = aligner.timed(frontend, graphs, {**found, **without_path})
    assert timed.keys() == found.keys() | {"lost"}
    assert timed["lost"] is None
    early = []
    for utt_id, times in truth.items():
        before, after = found[utt_id], timed[utt_id]
        assert before is not None
        assert after is not None
        assert list(dict.fromkeys(after.nodes.tolist())) == list(dict.fromkeys(before.nodes.tolist()))
        assert list(dict.fromkeys(after.codes.tolist())) == list(dict.fromkeys(before.codes.tolist()))
        assert np.array_equal(graphs[utt_id].codes.reshape(-1, 3)[after.nodes, after.codes % 3], after.codes)
        assert after.log_likelihood == before.log_likelihood
        rows = [segment_rows(own, graphs[utt_id].node_word, len(aligner.hmm.phones)) for own in (before, after)]
        early.append([own[own[:, 1] == 0][0, 2] - times[0][1] for own in rows])
    spliced, narrow = np.abs(early).mean(0)
    assert narrow < 0.5 < spliced


def test_targets_are_states_of_the_phones_in_their_context(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
                                                           tmp_path: Path) -> None:
    store, words, speakers, _ = spoken
    one = {utt_id: words[utt_id] for utt_id in list(words)[:5]}
    aligner = trained_aligner[0]
    align(aligner, store, one, speakers, LEXICON, tmp_path)
    hmm, targets, segments = aligner.hmm, FrameStore(tmp_path), Segments(tmp_path)
    for utt_id in one:
        assert segments.pronunciations(utt_id, words[utt_id]) == [(word, LEXICON[word][0]) for word in words[utt_id]]
        ids = np.array([EDGE, *(hmm.phones.index(phone) + 1 for phone, _, _ in segments.phones(utt_id)), EDGE])
        wanted = hmm.state_ids(ids[:-2], ids[1:-1], ids[2:]).reshape(-1)
        assert [state for state, _ in itertools.groupby(targets[utt_id].tolist())] == [state for state, _ in itertools.groupby(wanted.tolist())]


def test_utterances_that_cannot_be_aligned_are_listed(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
                                                      tmp_path: Path) -> None:
    store, words, speakers, _ = spoken
    good, oov, long, empty, absent = list(words)[:5]
    frames = store.length(long)
    wanted = {good: words[good], oov: ("BAD", "ZEBRA"), long: ("CAB",) * frames, empty: (), f"{absent}-gone": words[absent]}
    excluded = align(trained_aligner[0], store, wanted, speakers, LEXICON, tmp_path)
    assert excluded == [Exclusion(oov, "word outside the lexicon: ZEBRA"), Exclusion(long, f"{frames} frames, shorter than its {9 * frames} states"),
                        Exclusion(empty, "empty transcript"), Exclusion(f"{absent}-gone", "no features")]
    assert list(FrameStore(tmp_path)) == [good]
    lines = (tmp_path / "exclusions.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(oov)


def test_speakers_with_degenerate_features_are_counted_and_not_adapted_to(spoken: Spoken, trained_aligner: tuple[Aligner, Path], tmp_path: Path,
                                                                         caplog: pytest.LogCaptureFixture) -> None:
    store, words, speakers, _ = spoken
    with FrameWriter(tmp_path / "features", (40,), np.float16) as writer:
        for utt_id in words:
            writer.append(utt_id, np.zeros_like(store[utt_id]) if speakers[utt_id] == "speaker1" else store[utt_id])
    caplog.set_level("INFO")
    assert align(trained_aligner[0], FrameStore(tmp_path / "features"), words, speakers, LEXICON, tmp_path / "out") == []
    told = [record.getMessage() for record in caplog.records if "not adapted to" in record.getMessage()]
    assert len(told) == ADAPTATIONS
    assert told[0].startswith("1 of 3 speakers are not adapted to")


def test_alignment_by_a_network_follows_its_scores(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
                                                   tmp_path: Path) -> None:
    """Scores that are right about every frame give those states back; no finite path is an exclusion; a wrong shape is an error."""
    store, words, speakers, _ = spoken
    few = {utt_id: words[utt_id] for utt_id in list(words)[:4]}
    hmm = trained_aligner[0].hmm
    align(trained_aligner[0], store, few, speakers, LEXICON, tmp_path / "first")
    targets = FrameStore(tmp_path / "first")
    lost = list(few)[2]

    def scores(utt_id: str) -> np.ndarray:
        table = np.full((store.length(utt_id), hmm.num_states), -40.0)
        table[np.arange(len(table)), targets[utt_id]] = 0.0
        return np.full_like(table, -np.inf) if utt_id == lost else table

    excluded = align_with_network(hmm, scores, store, few, LEXICON, tmp_path / "second")
    assert [exclusion.utt_id for exclusion in excluded] == [lost]
    again = FrameStore(tmp_path / "second")
    assert all(np.array_equal(again[utt_id], targets[utt_id]) for utt_id in again)
    with pytest.raises(AsrKdError, match=r"scores of shape .* score it with a network trained on these states"):
        align_with_network(hmm, lambda utt_id: scores(utt_id)[:, 1:], store, few, LEXICON, tmp_path / "third")


def test_two_stores_are_read_as_one_and_ids_must_differ(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
                                                        tmp_path: Path) -> None:
    other, words, speakers, _ = speak(tmp_path / "features", 3, 5, "more")
    both = {**{utt_id: spoken[1][utt_id] for utt_id in list(spoken[1])[:2]}, **words}
    assert align(trained_aligner[0], [spoken[0], other], both, {**spoken[2], **speakers}, LEXICON, tmp_path / "out") == []
    assert list(FrameStore(tmp_path / "out")) == list(both)
    with pytest.raises(AsrKdError, match="must be unique"):
        joined([spoken[0], spoken[0]])


def test_guided_alignment_equals_the_full_one(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = spoken
    graphs = Graphs(words, LEXICON, trained_aligner[0].hmm.phones)
    frontend = Frontend.of(joined(store), speakers, list(words))
    full = trained_aligner[0].align(frontend, graphs, list(words))
    monkeypatch.setattr("asr_kd.hmm.corpus.GUIDE_FRAMES", 6)
    monkeypatch.setattr("asr_kd.hmm.corpus.GUIDED_BLOCK", 8)
    guided = trained_aligner[0].align(frontend, graphs, list(words))
    states = trained_aligner[0].hmm.flat_table  # which of silence's three states, all tied, is a matter of rounding
    assert all(np.array_equal(states[full[u].codes], states[guided[u].codes]) for u in words)  # type: ignore[union-attr]


def test_state_priors_are_finite_and_from_counts(tmp_path: Path) -> None:
    with FrameWriter(tmp_path, (), np.int32) as writer:
        writer.append("u", np.array([0, 0, 0, 1], np.int32))
    priors = with_state_priors(untied_model(("SIL", "A")), [FrameStore(tmp_path)], FrameStore(tmp_path)).log_priors
    assert np.isfinite(priors).all()
    assert priors[0] - priors[1] == pytest.approx(np.log(3))
    assert np.exp(priors).sum() == pytest.approx(1)


def test_a_split_is_aligned_in_parts_and_a_cut_off_call_goes_on(spoken: Spoken, trained_aligner: tuple[Aligner, Path], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = spoken
    aligner, some = trained_aligner[0], {utt_id: words[utt_id] for utt_id in list(words)[:24]}
    align(aligner, store, some, speakers, LEXICON, tmp_path / "at_once")
    class Cut(Exception):
        pass

    monkeypatch.setattr("asr_kd.hmm.align.PART_FRAMES", 10)  # a speaker is never divided
    parts: list[list[str]] = []
    whole = Aligner.align

    def counted(self: Aligner, frontend: Frontend, graphs: Graphs, utt_ids: Sequence[str]) -> dict[str, Aligned | None]:
        if len(parts) == 2:
            raise Cut
        parts.append(list(utt_ids))
        return whole(self, frontend, graphs, utt_ids)

    monkeypatch.setattr(Aligner, "align", counted)
    with pytest.raises(Cut):
        align(aligner, store, some, speakers, LEXICON, tmp_path / "cut", resume=True)
    assert not (tmp_path / "cut" / "index.json").exists()
    parts, kept = [], parts
    align(aligner, store, some, speakers, LEXICON, tmp_path / "cut", resume=True)
    assert [{speakers[utt_id] for utt_id in part} for part in [*kept, *parts]] == [{"speaker0"}, {"speaker1"}, {"speaker2"}]
    assert sorted(utt_id for part in [*kept, *parts] for utt_id in part) == sorted(some)
    for folder in ("", "segments"):
        alone, joined_parts = FrameStore(tmp_path / "at_once" / folder), FrameStore(tmp_path / "cut" / folder)
        assert alone.utt_ids == joined_parts.utt_ids == list(some)
        assert alone.attributes == joined_parts.attributes
        np.testing.assert_array_equal(alone.frames, joined_parts.frames)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["exclusions.csv", "frames.npy", "index.json", "segments"]


def test_what_another_call_left_is_kept_only_when_asked_for(spoken: Spoken, trained_aligner: tuple[Aligner, Path], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, _, _ = spoken
    one = {utt_id: words[utt_id] for utt_id in list(words)[:1]}
    hmm = trained_aligner[0].hmm
    asked: list[str] = []

    def scores(utt_id: str) -> np.ndarray:
        asked.append(utt_id)
        return np.zeros((store.length(utt_id), hmm.num_states))

    def full(*_: object) -> None:
        raise AsrKdError("no space left")

    for resume, times in ((True, 1), (False, 2)):
        asked.clear()
        with monkeypatch.context() as patched:
            patched.setattr("asr_kd.hmm.align.write_exclusions", full)
            with pytest.raises(AsrKdError, match="no space left"):
                align_with_network(hmm, scores, store, one, LEXICON, tmp_path / f"{resume}", resume=resume)
        align_with_network(hmm, scores, store, one, LEXICON, tmp_path / f"{resume}", resume=resume)
        assert len(asked) == times
    # other utterances than those of the part that was left
    two = {utt_id: words[utt_id] for utt_id in list(words)[:2]}
    with monkeypatch.context() as patched:
        patched.setattr("asr_kd.hmm.align.write_exclusions", full)
        with pytest.raises(AsrKdError, match="no space left"):
            align_with_network(hmm, scores, store, one, LEXICON, tmp_path / "two", resume=True)
    align_with_network(hmm, scores, store, two, LEXICON, tmp_path / "two", resume=True)
    assert list(FrameStore(tmp_path / "two")) == list(two)
