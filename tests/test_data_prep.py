"""The scripts of data_prep: from a folder in the LibriSpeech layout to manifests and features."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.errors import AsrKdError
from asr_kd.features import extract_features
from asr_kd.frames import FrameStore
from asr_kd.manifest import load_split, read_manifest

SCRIPTS = Path(__file__).resolve().parents[1] / "data_prep"


def run(script: str, *words: object) -> None:
    runpy.run_path(str(SCRIPTS / script))["main"]([str(word) for word in words])


def test_manifests_and_features_of_a_librispeech_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chapter = tmp_path / "LibriSpeech" / "tiny" / "84" / "1"
    chapter.mkdir(parents=True)
    (chapter / "84-1.trans.txt").write_text("84-1-0000 HELLO\n84-1-0001 NO AUDIO\n")
    soundfile.write(chapter / "84-1-0000.flac", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    run("librispeech.py", tmp_path, "tiny", "--manifests", tmp_path / "manifests")
    assert capsys.readouterr().out == "tiny: 1 utterances of 1 speakers, 0.00 h, 1 left out\n"
    assert read_manifest(tmp_path / "manifests" / "tiny.csv") == load_split("tiny", tmp_path)[0]
    assert "84-1-0001,no audio beside" in (tmp_path / "manifests" / "tiny.exclusions.csv").read_text()

    run("features.py", tmp_path / "manifests" / "tiny.csv", tmp_path / "features", "--cmvn", "utterance")
    extract_features(load_split("tiny", tmp_path)[0], tmp_path / "expected", cmvn="utterance")
    np.testing.assert_array_equal(FrameStore(tmp_path / "features").frames, FrameStore(tmp_path / "expected").frames)
    with pytest.raises(AsrKdError, match="none: not found"):
        run("librispeech.py", tmp_path, "none")
