"""Training and alignment of made-up speech whose true times are known."""

import itertools
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pretend_gpu import pretend_gpu

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm import checkpoint, corpus, train
from asr_kd.hmm.align import ADAPTATIONS, Aligner, Segments, align, align_with_network, learn_transitions, segment_rows, state_priors, usable_utterances
from asr_kd.hmm.corpus import FixedPhones, Graphs, chunks, viterbi_batches
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import Frontend, add_deltas, dct_matrix, splice
from asr_kd.hmm.model import EDGE, SIL, HmmModel, context_codes, untied_model
from asr_kd.hmm.topology import AlignmentGraph
from asr_kd.hmm.train import GmmHmmSettings, quiet_edges, schedule, train_gmm_hmm
from asr_kd.hmm.viterbi import Path as BestPath
from asr_kd.hmm.viterbi import viterbi as best_paths
from asr_kd.lexicon import Lexicon
from asr_kd.manifest import Exclusion

LEXICON = Lexicon({"BAD": (("B", "A", "D"),), "CAB": (("K", "A", "B"),), "DOE": (("D", "O"),), "OAK": (("O", "K"),), "A": (("A",), ("O",))})
SETTINGS = GmmHmmSettings(num_states=22, num_gaussians=60, mono_gaussians=40, mono_passes=8, tri_passes=3, realign_every=2, min_leaf_frames=40)

Truth = dict[str, list[tuple[str, int, int]]]
Words = dict[str, tuple[str, ...]]
Made = tuple[FrameStore, Words, dict[str, str], Truth]


def speak(folder: Path, number: int, seed: int, prefix: str = "utt") -> Made:
    """Utterances of random words; every phone is a spectrum of its own plus noise, speakers differ by an offset."""
    rng = np.random.default_rng(seed)
    spectra = {phone: np.random.default_rng(i).normal(0, 2.5, 40) - 4 * (phone == "SIL") for i, phone in enumerate(["SIL", *LEXICON.phones])}
    words: Words = {}
    truth: Truth = {}
    with FrameWriter(folder, (40,), np.float16) as writer:
        for u in range(number):
            utt_id = f"{prefix}{u:03d}"
            words[utt_id] = tuple(rng.choice(list(LEXICON), 4).tolist())
            times, phones = [], ["SIL"] * int(rng.integers(8, 16))
            for word in words[utt_id]:
                start = len(phones)
                for phone in LEXICON[word][0]:
                    phones += [phone] * int(rng.integers(5, 10))
                times.append((word, start, len(phones)))
                if rng.random() < 0.3:
                    phones += ["SIL"] * int(rng.integers(6, 12))
            phones += ["SIL"] * int(rng.integers(8, 16))
            truth[utt_id] = times
            offset = np.random.default_rng(u % 3).normal(0, 1, 40)
            writer.append(utt_id, np.stack([spectra[phone] for phone in phones]) + offset + rng.normal(0, 1, (len(phones), 40)))
    return FrameStore(folder), words, {utt_id: f"speaker{int(utt_id[-3:]) % 3}" for utt_id in words}, truth


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return speak(tmp_path_factory.mktemp("made") / "features", 60, 0)


@pytest.fixture(scope="module")
def trained(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Aligner, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return train_gmm_hmm(*made[:3], LEXICON, SETTINGS, folder=folder), folder


def same(a: Aligner, b: Aligner) -> bool:
    pairs = [(a.independent, b.independent), (a.adapted, b.adapted), *zip(a.boundaries, b.boundaries, strict=True)]
    return all(torch.equal(x.mixtures.means, y.mixtures.means) and torch.equal(x.mixtures.weights, y.mixtures.weights)
               and np.array_equal(x.hmm.state_table, y.hmm.state_table) and np.array_equal(x.hmm.log_advance, y.hmm.log_advance)
               and (x.projection is None or torch.equal(x.projection, y.projection)) for x, y in pairs)


def test_unseen_utterances_are_aligned_to_their_true_times(trained: tuple[Aligner, Path], tmp_path: Path) -> None:
    aligner = trained[0]
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


def test_boundary_models_move_boundaries_only(trained: tuple[Aligner, Path], tmp_path: Path) -> None:
    aligner = trained[0]
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


def test_training_and_alignment_leave_nothing_on_the_cpu_that_belongs_on_the_gpu(made: Made, trained: tuple[Aligner, Path], tmp_path: Path,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = made
    searched: list[str] = []

    def viterbi(graphs: Sequence[AlignmentGraph], hmm: HmmModel, tables: Sequence[torch.Tensor],
                columns: Sequence[NDArray[np.integer]]) -> list[BestPath | None]:
        searched.extend(table.device.type for table in tables)
        return best_paths(graphs, hmm, tables, columns)

    monkeypatch.setattr("asr_kd.hmm.corpus.viterbi", viterbi)
    with pretend_gpu() as gpu:
        aligner = train_gmm_hmm(store, words, speakers, LEXICON, SETTINGS, folder=tmp_path / "passes", device=gpu)
        aligner.save(tmp_path / "aligner")
        assert align(aligner, store, words, speakers, LEXICON, tmp_path / "on_gpu", device="cuda") == []
        uniform = np.zeros((store.length("utt000"), aligner.hmm.num_states), np.float32)
        align_with_network(aligner.hmm, lambda _: uniform, store, {"utt000": words["utt000"]}, LEXICON, tmp_path / "network", device="cuda")
    assert set(searched) == {"cuda"}
    assert np.array_equal(aligner.hmm.state_table, trained[0].hmm.state_table)
    assert aligner.adapted is not None
    assert trained[0].adapted is not None
    assert torch.allclose(aligner.adapted.mixtures.means, trained[0].adapted.mixtures.means, atol=1e-3)
    align(trained[0], store, words, speakers, LEXICON, tmp_path / "on_cpu")
    for utt_id in words:
        assert np.array_equal(FrameStore(tmp_path / "on_gpu")[utt_id], FrameStore(tmp_path / "on_cpu")[utt_id])


def test_targets_are_states_of_the_phones_in_their_context(made: Made, trained: tuple[Aligner, Path],
                                                           tmp_path: Path) -> None:
    store, words, speakers, _ = made
    one = {utt_id: words[utt_id] for utt_id in list(words)[:5]}
    aligner = trained[0]
    align(aligner, store, one, speakers, LEXICON, tmp_path)
    hmm, targets, segments = aligner.hmm, FrameStore(tmp_path), Segments(tmp_path)
    for utt_id in one:
        ids = np.array([EDGE, *(hmm.phones.index(phone) + 1 for phone, _, _ in segments.phones(utt_id)), EDGE])
        wanted = hmm.state_ids(ids[:-2], ids[1:-1], ids[2:]).reshape(-1)
        assert [state for state, _ in itertools.groupby(targets[utt_id].tolist())] == [state for state, _ in itertools.groupby(wanted.tolist())]


def test_training_that_was_cut_off_continues_to_the_same_result(made: Made, trained: tuple[Aligner, Path],
                                                                tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run_pass = train._Trainer.run_pass

    def cut(self: train._Trainer, step: train.Pass, state: train.TrainState) -> train.TrainState:
        passes.append(step.name)
        if len(passes) in (3, 10, 17):
            raise KeyboardInterrupt
        return run_pass(self, step, state)

    monkeypatch.setattr(train._Trainer, "run_pass", cut)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_gmm_hmm(*made[:3], LEXICON, SETTINGS, folder=tmp_path)
    resumed = train_gmm_hmm(*made[:3], LEXICON, SETTINGS, folder=tmp_path)
    assert len(passes) == len(schedule(SETTINGS)) + 3
    assert same(resumed, trained[0])


def test_training_that_was_cut_off_while_writing_continues_to_the_same_result(made: Made, trained: tuple[Aligner, Path],
                                                                             tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off before the alignment is whole, before it is pointed to, and before earlier ones are removed."""
    calls: list[str] = []

    def cut_off_at_the_third(name: str) -> None:
        do = getattr(checkpoint, name)

        def cut(*arguments: object, **options: object) -> object:
            if name != "write_json" or arguments[0] == tmp_path / checkpoint.LATEST:
                calls.append(name)
                if calls.count(name) == 3:
                    raise KeyboardInterrupt
            return do(*arguments, **options)

        monkeypatch.setattr(checkpoint, name, cut)

    writes = ("_save_alignment", "write_json", "rmtree")
    for name in writes:
        cut_off_at_the_third(name)
    for _ in writes:
        with pytest.raises(KeyboardInterrupt):
            train_gmm_hmm(*made[:3], LEXICON, SETTINGS, folder=tmp_path)
    assert same(train_gmm_hmm(*made[:3], LEXICON, SETTINGS, folder=tmp_path), trained[0])


def test_an_alignment_is_written_only_when_it_is_made(made: Made, trained: tuple[Aligner, Path], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    save = checkpoint._save_alignment

    def noted(place: Path, state: train.TrainState) -> None:
        written.append(state.done)
        save(place, state)

    monkeypatch.setattr(checkpoint, "_save_alignment", noted)
    train_gmm_hmm(*made[:3], LEXICON, replace(SETTINGS, boundaries=False), folder=tmp_path)
    passes = schedule(SETTINGS)
    assert written == [number for number, step in enumerate(passes, start=1) if number == 1 or step.realign or (step.number == 1 and step.stage != "mono")]
    assert len(written) < len(passes)
    assert [place.name for place in tmp_path.glob("aligned*")] == [f"aligned{written[-1]}"]


def test_damaged_checkpoint_or_other_settings_start_anew(made: Made, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    short = replace(SETTINGS, mono_passes=3, tri_passes=0, lda=False, sat=False)
    caplog.set_level("INFO")
    first = train_gmm_hmm(*made[:3], LEXICON, short, folder=tmp_path)
    for path in tmp_path.glob("pass*/model/mixtures.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    again = train_gmm_hmm(*made[:3], LEXICON, short, folder=tmp_path)
    assert torch.equal(first.independent.mixtures.means, again.independent.mixtures.means)
    train_gmm_hmm(*made[:3], LEXICON, replace(short, mono_gaussians=30), folder=tmp_path)
    assert "continuing" not in caplog.text
    train_gmm_hmm(*made[:3], LEXICON, replace(short, mono_gaussians=30), folder=tmp_path)
    assert "continuing after pass 3" in caplog.text


def test_triphone_stages_before_the_last_train_on_part_of_a_large_corpus(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = made
    aligned: list[int] = []
    align_with = train.align_with

    def counting(*arguments: Any, **more: Any) -> Any:
        aligned.append(len(arguments[3]))
        return align_with(*arguments, **more)

    monkeypatch.setattr(train, "align_with", counting)
    monkeypatch.setattr(train, "STAGE_HOURS", sum(map(store.length, words)) / 3 / train.FRAMES_PER_HOUR)
    aligner = train_gmm_hmm(store, words, speakers, LEXICON, replace(SETTINGS, boundaries=False))
    of_stages = aligned[-6:]  # at the begin of each, and once more in it
    assert of_stages == [20, 20, 20, 20, 60, 60]
    found = aligner.align(Frontend.of(joined(store), speakers, list(words)), Graphs(words, LEXICON, aligner.hmm.phones), list(words))
    assert None not in found.values()


def test_log_shows_rising_likelihood_per_frame(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "asr_kd.hmm.train")
    train_gmm_hmm(*made[:3], LEXICON, replace(SETTINGS, tri_passes=0, lda=False, sat=False, boundaries=False))
    values = [float(record.getMessage().split("per frame ")[1].split(",")[0]) for record in caplog.records if "per frame" in record.getMessage()]
    assert len(values) == SETTINGS.mono_passes
    assert values == sorted(values)


def test_aligner_round_trip(trained: tuple[Aligner, Path], tmp_path: Path) -> None:
    trained[0].save(tmp_path)
    assert same(Aligner.load(tmp_path), trained[0])
    (tmp_path / "adapted" / "hmm.safetensors").write_bytes(b"cut")
    with pytest.raises(AsrKdError, match=r"hmm\.safetensors: not readable"):
        Aligner.load(tmp_path)
    shutil.rmtree(tmp_path / "independent")
    with pytest.raises(AsrKdError, match="not readable"):
        Aligner.load(tmp_path)


def test_utterances_that_cannot_be_aligned_are_listed(made: Made, trained: tuple[Aligner, Path],
                                                      tmp_path: Path) -> None:
    store, words, speakers, _ = made
    good, oov, long, empty, absent = list(words)[:5]
    frames = store.length(long)
    wanted = {good: words[good], oov: ("BAD", "ZEBRA"), long: ("CAB",) * frames, empty: (), f"{absent}-gone": words[absent]}
    excluded = align(trained[0], store, wanted, speakers, LEXICON, tmp_path)
    assert excluded == [Exclusion(oov, "word outside the lexicon: ZEBRA"), Exclusion(long, f"{frames} frames, shorter than its {9 * frames} states"),
                        Exclusion(empty, "empty transcript"), Exclusion(f"{absent}-gone", "no features")]
    assert list(FrameStore(tmp_path)) == [good]
    lines = (tmp_path / "exclusions.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(oov)


def test_an_utterance_too_long_to_align_at_once_is_listed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, _, _ = made
    graphs, features = Graphs(words, LEXICON, ("SIL", *LEXICON.phones)), joined(store)
    cells = {utt_id: store.length(utt_id) * graphs[utt_id].num_states for utt_id in words}
    longest = max(cells, key=lambda utt_id: cells[utt_id])
    monkeypatch.setattr("asr_kd.hmm.corpus.MAX_UTTERANCE_CELLS", cells[longest] - 1)
    assert usable_utterances(graphs, features)[1] == [Exclusion(
        longest, f"{store.length(longest)} frames with {graphs[longest].num_states} states of its transcript, too long to align at once: cut it")]
    monkeypatch.setattr("asr_kd.hmm.corpus.MAX_UTTERANCE_CELLS", cells[longest])
    assert usable_utterances(graphs, features)[1] == []


def test_sizes_of_graphs_are_told_without_building_them(made: Made, trained: tuple[Aligner, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = made
    features, phones, cpu = joined(store), trained[0].hmm.phones, torch.device("cpu")
    graphs = Graphs(words, LEXICON, phones)
    sizes = {utt_id: graphs[utt_id].num_states for utt_id in words}
    found = trained[0].align(Frontend.of(features, speakers, list(words)), graphs, list(words))
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


def test_speakers_with_degenerate_features_are_counted_and_not_adapted_to(made: Made, trained: tuple[Aligner, Path], tmp_path: Path,
                                                                         caplog: pytest.LogCaptureFixture) -> None:
    store, words, speakers, _ = made
    with FrameWriter(tmp_path / "features", (40,), np.float16) as writer:
        for utt_id in words:
            writer.append(utt_id, np.zeros_like(store[utt_id]) if speakers[utt_id] == "speaker1" else store[utt_id])
    caplog.set_level("INFO")
    assert align(trained[0], FrameStore(tmp_path / "features"), words, speakers, LEXICON, tmp_path / "out") == []
    told = [record.getMessage() for record in caplog.records if "not adapted to" in record.getMessage()]
    assert len(told) == ADAPTATIONS
    assert told[0].startswith("1 of 3 speakers are not adapted to")


def test_alignment_by_a_network_follows_its_scores(made: Made, trained: tuple[Aligner, Path],
                                                   tmp_path: Path) -> None:
    """Scores that are right about every frame give those states back; no finite path is an exclusion; a wrong shape is an error."""
    store, words, speakers, _ = made
    few = {utt_id: words[utt_id] for utt_id in list(words)[:4]}
    hmm = trained[0].hmm
    align(trained[0], store, few, speakers, LEXICON, tmp_path / "first")
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


def test_two_stores_are_read_as_one_and_ids_must_differ(made: Made, trained: tuple[Aligner, Path],
                                                        tmp_path: Path) -> None:
    other, words, speakers, _ = speak(tmp_path / "features", 3, 5, "more")
    both = {**{utt_id: made[1][utt_id] for utt_id in list(made[1])[:2]}, **words}
    assert align(trained[0], [made[0], other], both, {**made[2], **speakers}, LEXICON, tmp_path / "out") == []
    assert list(FrameStore(tmp_path / "out")) == list(both)
    with pytest.raises(AsrKdError, match="must be unique"):
        joined([made[0], made[0]])


def test_nothing_to_train_on_is_an_error(made: Made) -> None:
    store, words, speakers, _ = made
    with pytest.raises(AsrKdError, match="no transcripts"):
        train_gmm_hmm(store, {}, speakers, LEXICON, SETTINGS)
    with pytest.raises(AsrKdError, match=r"no utterance of 1 can be aligned .*word outside the lexicon"):
        train_gmm_hmm(store, {next(iter(words)): ("ZEBRA",)}, speakers, LEXICON, SETTINGS)


def test_guided_alignment_equals_the_full_one(made: Made, trained: tuple[Aligner, Path],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = made
    graphs = Graphs(words, LEXICON, trained[0].hmm.phones)
    frontend = Frontend.of(joined(store), speakers, list(words))
    full = trained[0].align(frontend, graphs, list(words))
    monkeypatch.setattr("asr_kd.hmm.corpus.GUIDE_FRAMES", 6)
    monkeypatch.setattr("asr_kd.hmm.corpus.GUIDED_BLOCK", 8)
    guided = trained[0].align(frontend, graphs, list(words))
    states = trained[0].hmm.flat_table  # which of silence's three states, all tied, is a matter of rounding
    assert all(np.array_equal(states[full[u].codes], states[guided[u].codes]) for u in words)  # type: ignore[union-attr]


def test_transitions_are_counted_by_hand() -> None:
    """Silence, A, silence; and A, A: three words, so one gap between words, without a silence in it."""
    hmm = untied_model(("SIL", "A"))
    sil, first, second = (context_codes(*triple, 2) for triple in ((EDGE, SIL, EDGE), (SIL, 2, SIL), (2, 2, EDGE)))
    a = np.repeat(np.concatenate([sil, first, sil]), [2, 1, 1, 1, 3, 1, 1, 1, 2])
    b = np.repeat(np.concatenate([first, second]), [1, 1, 1, 2, 1, 1])
    learned = learn_transitions(hmm, [a, b], 3)
    visits, frames = np.array([2, 2, 2, 3, 3, 3]), np.array([3, 2, 3, 4, 5, 3])
    leave = (visits + 1) / (frames + 2)
    assert np.allclose(np.exp(learned.log_advance), [0.1, 0.1, 0.1, *leave[3:]], atol=1e-6)  # silence lasts 30 frames or more on average
    assert np.allclose(np.exp(learned.log_advance) + np.exp(learned.log_self_loop), 1)
    assert learned.log_optional_silence == pytest.approx(np.log(1 / 3))  # (0 silences + 1) / (1 gap + 2)
    assert np.allclose(np.exp(learned.log_priors), frames / frames.sum(), atol=1e-6)


def test_state_priors_are_finite_and_from_counts(tmp_path: Path) -> None:
    with FrameWriter(tmp_path, (), np.int32) as writer:
        writer.append("u", np.array([0, 0, 0, 1], np.int32))
    priors = state_priors(untied_model(("SIL", "A")), [FrameStore(tmp_path)], FrameStore(tmp_path)).log_priors
    assert np.isfinite(priors).all()
    assert priors[0] - priors[1] == pytest.approx(np.log(3))
    assert np.exp(priors).sum() == pytest.approx(1)


def test_hmm_model_checks_and_round_trip(tmp_path: Path) -> None:
    hmm = untied_model(("SIL", "A", "B"))
    hmm.save(tmp_path)
    loaded = HmmModel.load(tmp_path)
    assert loaded.phones == hmm.phones
    assert loaded.num_states == 9
    assert np.array_equal(loaded.state_ids([0, 1], [2, 3], [3, 0]), [[3, 4, 5], [6, 7, 8]])
    with pytest.raises(AsrKdError, match=r"centre phone ids 0\.\.0, expected 1\.\.3"):
        hmm.state_ids(1, 0, 1)


def test_frontend_equals_slow_formulas(made: Made) -> None:
    store, words, speakers, _ = made
    dct = dct_matrix(40).double().numpy()
    assert np.allclose(dct.T @ dct, np.eye(13), atol=1e-6)
    utt_id = next(iter(words))
    own = [u for u in words if speakers[u] == speakers[utt_id]]
    frontend = Frontend.of(joined(store), speakers, list(words))
    raw = store[utt_id].astype(np.float64) @ dct
    mean = np.concatenate([store[u].astype(np.float64) for u in own]).mean(0) @ dct
    cepstra = frontend.cepstra(utt_id)
    assert np.allclose(cepstra.numpy(), raw - mean, atol=2e-3)
    deltas = add_deltas(cepstra)
    at = [min(max(t, 0), len(cepstra) - 1) for t in range(-2, 3)]
    assert torch.allclose(deltas[0, 13:26], sum(k * cepstra[at[k + 2]] for k in range(-2, 3)) / 10, atol=1e-4)
    assert torch.equal(splice(cepstra)[5, :13], cepstra[1])
    assert torch.equal(splice(cepstra)[0, :13], cepstra[0])
    transform = torch.cat([2 * torch.eye(39), torch.ones(39, 1)], 1)
    adapted = frontend.adapted({speakers[utt_id]: transform})
    assert torch.allclose(adapted.frames(utt_id), 2 * deltas + 1, atol=1e-4)


def test_quiet_edges_of_a_hand_made_utterance() -> None:
    loudness = torch.full((100, 13), -5.0)
    loudness[20:70] = 5.0
    lead, tail = quiet_edges(loudness)
    assert abs(lead - (20 - train.QUIET_MARGIN)) <= 2
    assert abs(tail - (30 - train.QUIET_MARGIN)) <= 2
    assert quiet_edges(torch.zeros(30, 13)) == (0, 0)


def test_few_threads_feed_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "num_threads", lambda: 8)

    def work(number: int) -> tuple[int, int]:
        time.sleep(0.005)
        return number, threading.get_ident()

    for device, threads in (("cpu", 8), ("meta", corpus.GPU_THREADS)):
        numbers, idents = zip(*corpus.map_threads(work, range(60), torch.device(device)), strict=True)
        assert numbers == tuple(range(60))
        assert len(set(idents)) == threads


def test_batches_and_chunks_hold_every_utterance_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, _, _ = made
    features = joined(store)
    monkeypatch.setattr("asr_kd.hmm.corpus.MAX_BATCH_CELLS", 100_000)
    batches = viterbi_batches(words, Graphs(words, LEXICON, ("SIL", *LEXICON.phones)), features, torch.device("cpu"))
    assert sorted(utt_id for batch in batches for utt_id in batch) == sorted(words)
    assert len(batches) > 1
    parts = list(chunks(words, features, 400))
    assert [utt_id for part in parts for utt_id in part] == list(words)
    assert all(len(part) == 1 or sum(map(features.length, part)) <= 400 for part in parts)
