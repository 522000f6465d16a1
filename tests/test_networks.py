"""The training stages: size of a network, what identifies networks, and teachers that diverged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd import networks, results, stage
from asr_kd.corpus import Corpus
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.features import Windows
from asr_kd.frame_data import FrameData
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.manifest import Exclusion, write_exclusions
from asr_kd.model import ModelShape
from asr_kd.networks import NETWORKS, TrainingData, network_shape, train_networks
from asr_kd.settings import Settings, make_settings
from asr_kd.stage import Record, write_json
from asr_kd.training import TrainingResult

TINY: dict[str, Any] = {"synthetic_minutes": {"train": 1}, "hidden_layers": 1, "hidden_units": 8, "num_mels": 4, "left_context": 0, "right_context": 0,
                        "precision": "fp32", "batch_frames": 50}


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    with FrameWriter(tmp_path / "features", (4,), np.float16) as writer:
        writer.append("u", np.random.default_rng(0).normal(size=(200, 4)))
    frames = FrameData(Windows(FrameStore(tmp_path / "features"), left=0, right=0), torch.arange(200, dtype=torch.int32) % 3)
    return TrainingData(frames, frames, 3, {"features": "f", "targets": "t"})


def teachers(data: TrainingData, folder: Path) -> tuple[Ensemble, str]:
    settings: Settings = make_settings(TINY | {"output_folder": str(folder)})
    trained, record = train_networks("teachers", folder / "teachers", settings, data, seeds=[1, 2, 3], epochs=1)
    return trained, record.fingerprint


def test_networks_are_identified_by_their_weights(data: TrainingData, tmp_path: Path) -> None:
    """Soft targets of networks that another machine trained from the same settings must not pass for these ones'."""
    trained, one = teachers(data, tmp_path)
    assert teachers(data, tmp_path)[1] == one
    with torch.no_grad():
        trained.weights[0][0, 0, 0] += 1
    trained.save(tmp_path / "teachers" / NETWORKS)
    assert teachers(data, tmp_path)[1] != one


def test_another_hard_weight_is_another_student_of_the_same_teachers(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[Any]] = {"teachers": [], "student": []}
    monkeypatch.setattr(networks, "run_stage", lambda stage, folder, choices, *_, **__: asked[stage].append(choices) or Record(stage, {}, {}, "", 0.0, {}))
    monkeypatch.setattr(networks, "file_fingerprint", lambda _: "")
    monkeypatch.setattr(Ensemble, "load", lambda _: Ensemble(ModelShape(4, 1, 8, 3), [1]))
    for hard_weight in (0.5, 0.25):
        settings = make_settings(TINY | {"output_folder": str(tmp_path), "hard_weight": hard_weight})
        soft: Any = SimpleNamespace(temperature=2.0)
        train_networks("teachers", tmp_path, settings, data, seeds=[1], epochs=1)
        train_networks("student", tmp_path, settings, data, seeds=[1], epochs=1, student=True, soft_targets=soft)
    assert asked["teachers"][0] == asked["teachers"][1]
    assert asked["student"][0] != asked["student"][1]


def test_training_that_was_cut_when_only_its_record_was_missing_is_not_repeated(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_finish", cut)
        with pytest.raises(KeyboardInterrupt):
            teachers(data, tmp_path)
    before = (tmp_path / "teachers" / NETWORKS).read_bytes()
    (tmp_path / "teachers" / "checkpoint.pt").write_bytes(b"left behind")
    monkeypatch.setattr(networks, "train", cut)
    teachers(data, tmp_path)
    assert (tmp_path / "teachers" / NETWORKS).read_bytes() == before
    assert not (tmp_path / "teachers" / "checkpoint.pt").exists()


def test_a_teacher_without_any_training_is_left_out(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(networks, "train", lambda *_, **__: TrainingResult([0.5, -1.0, 0.6], [], {1: 7}, "fp32"))
    left, _ = teachers(data, tmp_path)
    fresh = Ensemble(left.shape, [1, 3])
    assert [torch.equal(one, other) for one, other in zip(left.weights, fresh.weights, strict=True)] == [True, True]
    assert left.seeds == (1, 3)
    assert "1 of 3 networks diverged at once and are left out" in caplog.text


def test_networks_that_are_all_left_out_are_an_error(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "train", lambda *_, **__: TrainingResult([-1.0, -1.0, -1.0], [], {}, "fp32"))
    with pytest.raises(AsrKdError, match=r"teachers: all 3 networks have weights that are NaN or infinite.*lower learning_rate"):
        teachers(data, tmp_path)


def test_soft_targets_of_an_earlier_layout_are_made_again(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, of_teachers = teachers(data, tmp_path)
    settings = make_settings(TINY | {"output_folder": str(tmp_path), "soft_targets": "compact"})

    def prints() -> str:
        return networks.prepare_soft_targets(tmp_path / "soft", settings, data, trained, of_teachers, 2.0)[1].fingerprint

    now = prints()
    assert prints() == now
    monkeypatch.setattr(networks, "LAYOUT", networks.LAYOUT + 1)
    assert prints() != now


def test_members_have_the_numbers_that_they_were_trained_with(tmp_path: Path) -> None:
    write_json(tmp_path / "teachers" / "training.json", {"diverged": {"1": 7}, "heldout_accuracy": [0.5, -1.0, 0.4]})
    assert results._member_numbers(make_settings(TINY | {"output_folder": str(tmp_path)})) == [1, 3]


def test_the_report_counts_each_utterance_left_out_once_and_by_kind(tmp_path: Path) -> None:
    reasons = {"manifests/train.exclusions.csv": ["no transcript for /my data/a.flac", "no transcript for /my data/b.flac"],
               "features/train/exclusions.csv": [f"{place}: no samples; replace the file" for place in ("/my data/c.flac", "d.wav/d")],
               "targets/train/exclusions.csv": ["no features", "no features", "word outside the lexicon: ZEBRA", "word outside the lexicon: ORYX EMU",
                                                "12 frames, shorter than its 30 states", "7 frames, shorter than its 9 states",
                                                "/data/e.wav: 3.25 s of audio, expected 12 s as the manifest says; cut it"]}
    for name, own in reasons.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_exclusions(tmp_path / name, [Exclusion(f"u{n}", reason) for n, reason in enumerate(own)])
    for name in ("teachers", "student", "control"):
        write_json(tmp_path / name / "training.json", {"diverged": {}, "heldout_accuracy": []})
    settings = make_settings(TINY | {"output_folder": str(tmp_path)})
    assert results._exclusions(settings, Corpus({"train": []}, [], [], [], {}))["train"] == {
        "not usable: no transcript for … …": 2, "no features: no samples": 2, "not aligned: word outside the lexicon": 2,
        "not aligned: … frames, shorter than its … states": 2, "not aligned: … s of audio, expected … s as the manifest says": 1}


@pytest.mark.parametrize(("form", "device", "expected"), [("compact", "cpu", 92), ("compact", "cuda", 220), ("dense", "cuda", 220),
                                                        ("on_the_fly", "cuda", 220)])
def test_a_gpu_has_room_for_soft_targets_beside_the_features(form: str, device: str, expected: int) -> None:
    settings = make_settings(TINY | {"output_folder": "o", "num_mels": 40, "soft_targets": form, "device": device})
    assert networks.bytes_in_memory(settings) == expected


def test_only_soft_targets_change_the_students_dropout() -> None:
    settings = make_settings({"output_folder": "o", "synthetic_minutes": {"train": 1}, "dropout": 0.2, "student_dropout": 0.0, "hidden_layers": 3,
                              "hidden_units": 64, "student_hidden_units": 32, "num_mels": 40})
    assert network_shape(settings, 100) == ModelShape(1040, 3, 64, 100, 0.2)
    assert network_shape(settings, 100, student=True, soft=True) == ModelShape(1040, 3, 32, 100, 0.0)
    assert network_shape(settings, 100, student=True) == ModelShape(1040, 3, 32, 100, 0.2)  # the control
