"""The scripts of data_prep: from a folder in the LibriSpeech layout to manifests and features."""

from __future__ import annotations

import runpy
import sys
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
    for split in (tmp_path / "LibriSpeech" / "tiny", "tiny/", "tiny.csv"):  # where it is written would be the user's own files
        with pytest.raises(AsrKdError, match="expected the name of a folder below"):
            run("librispeech.py", tmp_path, split, "--manifests", tmp_path / "manifests")
    with pytest.raises(AsrKdError, match="none: not found"):
        run("librispeech.py", tmp_path, "none")


def test_features_lists_what_the_manifest_and_what_the_audio_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    (tmp_path / "b.wav").write_text("not audio")
    (tmp_path / "m.csv").write_text("ID,duration,wav,spk_id,wrd\n" + "".join(f"{name},0.5,{name}.wav,s,A\n" for name in "abc"))
    run("features.py", tmp_path / "m.csv", tmp_path / "features")
    assert ", 2 left out" in capsys.readouterr().out
    listed = (tmp_path / "features" / "exclusions.csv").read_text()
    assert f"c,no audio at {tmp_path}/c.wav" in listed
    assert f"b,{tmp_path}/b.wav: not readable as audio" in listed


def test_features_replace_those_of_an_earlier_run_only(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    (tmp_path / "m.csv").write_text("ID,duration,wav,spk_id,wrd\na,0.5,a.wav,s,A\n")
    for num_mels in (40, 23):
        run("features.py", tmp_path / "m.csv", tmp_path / "features", "--num_mels", num_mels)
        assert FrameStore(tmp_path / "features").frames.shape == (48, num_mels)
    np.save(tmp_path / "frames.npy", np.zeros(3))
    with pytest.raises(AsrKdError, match=r"frames\.npy: expected features that an earlier run wrote"):
        run("features.py", tmp_path / "m.csv", tmp_path)
    assert np.load(tmp_path / "frames.npy").shape == (3,)


@pytest.mark.parametrize(("words", "message"), [
    (["--speed", "0"], r"speeds is \[0.0\], expected numbers from 0.5 to 2"),
    (["--speed", "nan"], r"speeds is \[nan\]"),
    (["--num_mels", "0"], "num_mels is 0, expected 1 or more"),
    (["--num_jobs", "0"], "num_jobs is 0"),
    (["--device", "foo"], "device: foo cannot be used"),
])
def test_features_refuses_what_the_recipe_refuses(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        run("features.py", "m.csv", tmp_path / "features", *words)


@pytest.mark.parametrize(("words", "message"), [
    (["--seed", "-1"], "settings: seed is -1"),
    (["--minutes", "../up=1"], "synthetic_minutes names '../up'"),
])
def test_the_synthetic_corpus_refuses_what_the_recipe_refuses(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        run("synthetic.py", tmp_path / "corpus", *words)


def test_minutes_of_the_synthetic_corpus_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for minutes in ("train", "train=nan", "train=many"):
        with pytest.raises(SystemExit):
            run("synthetic.py", tmp_path / "corpus", "--minutes", minutes)
        assert minutes in capsys.readouterr().err.splitlines()[-1]


def test_the_scripts_say_in_one_line_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for script, words in (("synthetic.py", ["corpus", "--seed", "-1"]), ("features.py", ["m.csv", "f", "--num_mels", "0"]), ("librispeech.py", [".", "none"])):
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("asr-kd: ")
        assert error.count("\n") == 1
