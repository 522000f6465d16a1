"""Training of the aligner on made-up speech."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pretend_gpu import pretend_gpu
from spectral_speech import LEXICON, SETTINGS, Spoken

from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameStore
from asr_kd.hmm import boundaries, checkpoint, train
from asr_kd.hmm.align import align, align_with_network
from asr_kd.hmm.aligner import Aligner
from asr_kd.hmm.corpus import Aligned, Graphs
from asr_kd.hmm.features import joined
from asr_kd.hmm.frontend import Frontend
from asr_kd.hmm.model import HmmModel
from asr_kd.hmm.topology import AlignmentGraph, even_path
from asr_kd.hmm.train import quiet_edges, schedule, train_gmm_hmm
from asr_kd.hmm.viterbi import Path as BestPath
from asr_kd.hmm.viterbi import viterbi as best_paths


def same(a: Aligner, b: Aligner) -> bool:
    pairs = [(a.independent, b.independent), (a.adapted, b.adapted), *zip(a.boundaries, b.boundaries, strict=True)]
    return all(torch.equal(x.mixtures.means, y.mixtures.means) and torch.equal(x.mixtures.weights, y.mixtures.weights)
               and np.array_equal(x.hmm.state_table, y.hmm.state_table) and np.array_equal(x.hmm.log_advance, y.hmm.log_advance)
               and (x.projection is None or torch.equal(x.projection, y.projection)) for x, y in pairs)


def test_boundary_models_of_a_phone_that_was_not_there_are_those_of_all_frames(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = spoken
    some = {utt_id: words[utt_id] for utt_id in list(words)[:6]}
    phones = ("SIL", *LEXICON.phones, "ZH")
    graphs, frontend = Graphs(some, LEXICON, phones), Frontend.of(joined(store), speakers, list(some))
    codes = {utt_id: even_path(graphs.pronunciations(utt_id), len(phones), store.length(utt_id)) for utt_id in some}
    monkeypatch.setattr(boundaries, "move_boundaries", lambda model, frontend, graphs, aligned: dict(aligned))
    aligned = {utt_id: Aligned(own, np.full_like(own, -1), 0.0) for utt_id, own in codes.items()}
    for model in boundaries.train_boundaries(frontend, graphs, aligned, phones, 60):
        frames = torch.cat([frontend.projected(model.projection).frames(utt_id) for utt_id in some])
        first, *_, last = model.mixtures.offsets[-4:].tolist()
        assert last - first == 3  # ZH's three states have a Gaussian each
        torch.testing.assert_close(model.mixtures.means[first:], frames.mean(0).expand(3, -1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(model.mixtures.variances[first:], frames.var(0, unbiased=False).expand(3, -1), atol=1e-2, rtol=1e-2)


def test_training_and_alignment_leave_nothing_on_the_cpu_that_belongs_on_the_gpu(spoken: Spoken, trained_aligner: tuple[Aligner, Path], tmp_path: Path,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = spoken
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
    assert np.array_equal(aligner.hmm.state_table, trained_aligner[0].hmm.state_table)
    assert aligner.adapted is not None
    assert trained_aligner[0].adapted is not None
    assert torch.allclose(aligner.adapted.mixtures.means, trained_aligner[0].adapted.mixtures.means, atol=1e-3)
    align(trained_aligner[0], store, words, speakers, LEXICON, tmp_path / "on_cpu")
    for utt_id in words:
        assert np.array_equal(FrameStore(tmp_path / "on_gpu")[utt_id], FrameStore(tmp_path / "on_cpu")[utt_id])


def test_training_that_was_cut_off_continues_to_the_same_result(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
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
            train_gmm_hmm(*spoken[:3], LEXICON, SETTINGS, folder=tmp_path)
    resumed = train_gmm_hmm(*spoken[:3], LEXICON, SETTINGS, folder=tmp_path)
    assert len(passes) == len(schedule(SETTINGS)) + 3
    assert same(resumed, trained_aligner[0])


def test_training_that_was_cut_off_while_writing_continues_to_the_same_result(spoken: Spoken, trained_aligner: tuple[Aligner, Path],
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
            train_gmm_hmm(*spoken[:3], LEXICON, SETTINGS, folder=tmp_path)
    assert same(train_gmm_hmm(*spoken[:3], LEXICON, SETTINGS, folder=tmp_path), trained_aligner[0])


def test_an_alignment_is_written_only_when_it_is_made(spoken: Spoken, trained_aligner: tuple[Aligner, Path], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    save = checkpoint._save_alignment

    def noted(place: Path, state: train.TrainState) -> None:
        written.append(state.done)
        save(place, state)

    monkeypatch.setattr(checkpoint, "_save_alignment", noted)
    train_gmm_hmm(*spoken[:3], LEXICON, replace(SETTINGS, boundaries=False), folder=tmp_path)
    passes = schedule(SETTINGS)
    assert written == [number for number, step in enumerate(passes, start=1) if number == 1 or step.realign or (step.number == 1 and step.stage != "mono")]
    assert len(written) < len(passes)
    assert [place.name for place in tmp_path.glob("aligned*")] == [f"aligned{written[-1]}"]


def test_damaged_checkpoint_or_other_settings_start_anew(spoken: Spoken, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    short = replace(SETTINGS, mono_passes=3, tri_passes=0, lda=False, sat=False)
    caplog.set_level("INFO")
    first = train_gmm_hmm(*spoken[:3], LEXICON, short, folder=tmp_path)
    for path in tmp_path.glob("pass*/model/mixtures.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    again = train_gmm_hmm(*spoken[:3], LEXICON, short, folder=tmp_path)
    assert torch.equal(first.independent.mixtures.means, again.independent.mixtures.means)
    train_gmm_hmm(*spoken[:3], LEXICON, replace(short, mono_gaussians=30), folder=tmp_path)
    assert "continuing" not in caplog.text
    train_gmm_hmm(*spoken[:3], LEXICON, replace(short, mono_gaussians=30), folder=tmp_path)
    assert "continuing after pass 3" in caplog.text


def test_triphone_stages_before_the_last_train_on_part_of_a_large_corpus(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    store, words, speakers, _ = spoken
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


def test_log_shows_rising_likelihood_per_frame(spoken: Spoken, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "asr_kd.hmm.train")
    train_gmm_hmm(*spoken[:3], LEXICON, replace(SETTINGS, tri_passes=0, lda=False, sat=False, boundaries=False))
    values = [float(record.getMessage().split("per frame ")[1].split(",")[0]) for record in caplog.records if "per frame" in record.getMessage()]
    assert len(values) == SETTINGS.mono_passes
    assert values == sorted(values)


def test_nothing_to_train_on_is_an_error(spoken: Spoken) -> None:
    store, words, speakers, _ = spoken
    with pytest.raises(AsrKdError, match="no transcripts"):
        train_gmm_hmm(store, {}, speakers, LEXICON, SETTINGS)
    with pytest.raises(AsrKdError, match=r"no utterance of 1 can be aligned .*word outside the lexicon"):
        train_gmm_hmm(store, {next(iter(words)): ("ZEBRA",)}, speakers, LEXICON, SETTINGS)


def test_quiet_edges_of_a_hand_made_utterance() -> None:
    loudness = torch.full((100, 13), -5.0)
    loudness[20:70] = 5.0
    lead, tail = quiet_edges(loudness)
    assert abs(lead - (20 - train.QUIET_MARGIN)) <= 2
    assert abs(tail - (30 - train.QUIET_MARGIN)) <= 2
    assert quiet_edges(torch.zeros(30, 13)) == (0, 0)


def test_aligner_round_trip(trained_aligner: tuple[Aligner, Path], tmp_path: Path) -> None:
    trained_aligner[0].save(tmp_path)
    assert same(Aligner.load(tmp_path), trained_aligner[0])
    (tmp_path / "adapted" / "hmm.safetensors").write_bytes(b"cut")
    with pytest.raises(AsrKdError, match=r"hmm\.safetensors: not readable"):
        Aligner.load(tmp_path)
    shutil.rmtree(tmp_path / "independent")
    with pytest.raises(AsrKdError, match="not readable"):
        Aligner.load(tmp_path)
