"""What results.json says beside the rates: exclusions and calibration of several members."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from asr_kd import results
from asr_kd.calibration import PosteriorQuality, reliability
from asr_kd.corpus import Corpus
from asr_kd.ensemble import Ensemble
from asr_kd.features import Windows
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.model import untied_model
from asr_kd.manifest import Utterance
from asr_kd.model import ModelShape
from asr_kd.recognition import Decoded
from asr_kd.report import write_report
from asr_kd.targets import Targets


def listed(path: Path, *reasons: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, ["utt_id", "reason"])
        rows.writeheader()
        rows.writerows({"utt_id": f"u{n}", "reason": reason} for n, reason in enumerate(reasons))


def test_exclusions_are_counted_in_copies_at_other_speeds_too(tmp_path: Path) -> None:
    listed(tmp_path / "manifests" / "train.exclusions.csv", "a/1.flac: no transcript; add one", "a/2.flac: no transcript; add one")
    listed(tmp_path / "features" / "train" / "exclusions.csv", "a/3.flac: shorter than one window")
    listed(tmp_path / "features" / "train-sp1.1" / "exclusions.csv", "a/3.flac: shorter than one window", "a/4.flac: shorter than one window")
    listed(tmp_path / "targets" / "train" / "exclusions.csv", "no features", "12 frames, shorter than its 30 states")
    listed(tmp_path / "targets" / "dev" / "exclusions.csv")
    for name, diverged, accuracies in (("teachers", {"0": 1, "3": 70}, [-1.0, 0.4, 0.4, 0.3]), ("student", {"0": 9}, [0.2]), ("control", {}, [0.4])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps({"diverged": diverged, "heldout_accuracy": accuracies}))
    settings = SimpleNamespace(output=tmp_path, speeds=[1.0, 1.1])
    corpus = SimpleNamespace(splits={"train": [], "dev": []}, evaluation=["dev"])
    assert results._exclusions(settings, corpus) == {
        "train": {"not usable: no transcript": 2, "no features: shorter than one window": 1, "not aligned: … frames, shorter than its … states": 1},
        "train-sp1.1": {"no features: shorter than one window": 2},
        "teachers": {"member 1: loss not finite at step 1, left out": 1, "member 4: loss not finite at step 70, trained no further": 1},
        "student": {"member 1: loss not finite at step 9, trained no further": 1}}


def test_a_split_of_which_nothing_could_be_aligned_has_its_word_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    utterances = [Utterance(utt_id, 1.0, Path("x.wav"), "s", ("ZORB", "THE")) for utt_id in ("a", "b")]
    with FrameWriter(tmp_path / "features", (4,), np.float16) as writer:
        for utterance in utterances:
            writer.append(utterance.utt_id, np.zeros((5, 4)))
    FrameWriter(tmp_path / "targets", (), np.int32).__enter__().__exit__(None, None, None)
    hmm = untied_model(("SIL", "A"))
    shape = ModelShape(4, 1, 4, hmm.num_states)
    windows = Windows(FrameStore(tmp_path / "features"), left=0, right=0)
    right, half = (Decoded(dict.fromkeys("ab", words), 0.1, []) for words in (("ZORB", "THE"), ("THE",)))
    systems = results.Systems(Ensemble(shape, [1, 2]), {name: Ensemble(shape, [3]) for name in ("distilled", "control")},
                              {name: {"dev": own} for name, own in (("member_0", half), ("ensemble", right), ("distilled", right), ("control", half))})
    corpus = Corpus({"dev": utterances}, [], [], ["dev"], {})
    rows, _, calibration = results._score_split("dev", windows, corpus, Targets({"dev": FrameStore(tmp_path / "targets")}, hmm, {}), systems, seed=1)
    assert [rows[name]["wer"] for name in ("baseline", "ensemble", "distilled", "control")] == [0.5, 0.0, 0.0, 0.5]
    assert rows["gain_kept"] == {"frame_accuracy": None, "wer": 1.0}
    assert not any("frame_accuracy" in row for row in (*rows["members"], rows["baseline"], rows["ensemble"], rows["distilled"]))
    assert calibration == {}
    assert f"dev: no frame accuracy, for none of its 2 utterances could be aligned; see {tmp_path / 'targets' / 'exclusions.csv'}" in caplog.text
    assert write_report(tmp_path, {"splits": {"dev": rows}, "calibration": {"dev": calibration}}).is_file()


def test_calibration_of_the_baseline_is_the_mean_over_its_members() -> None:
    """One member is too sure and one too doubtful in the same bin: pooled, they would look nearly perfect."""
    correct = np.array([True] * 5 + [False] * 5)
    members = [PosteriorQuality(reliability(np.full(10, 0.85), correct, 1), 3.0, 1.0), PosteriorQuality(reliability(np.full(10, 0.25), correct, 1), 5.0, 2.0)]
    row = results._mean_calibration(members)
    assert row["ece"] == pytest.approx((0.35 + 0.25) / 2)
    assert (members[0] + members[1]).bins.expected_calibration_error == pytest.approx(0.05)
    assert (row["nll"], row["brier"]) == pytest.approx((0.4, 0.15))
    assert row["bins"] == [{"confidence": pytest.approx(0.55), "accuracy": 0.5, "frames": 20}]
