"""Settings: types, overrides, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr_kd.errors import AsrKdError
from asr_kd.settings import load_settings, make_settings

HPARAMS = sorted((Path(__file__).parents[1] / "recipes" / "LibriSpeech" / "hparams").glob("*.yaml"))
BASE = {"output_folder": "out", "data_folder": "data", "train_splits": ["train"]}


@pytest.mark.parametrize("path", HPARAMS, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    settings = load_settings(path)
    assert settings.num_teachers == 10
    assert settings.temperature == 2.0
    assert settings.hard_weight == 0.5


def test_overrides_in_both_forms_and_references(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("output_folder: out\ndata_folder: !ref <output_folder>/data\ntrain_splits: [a]\ntemperature: 2\n")
    settings = load_settings(path, ["--temperature", "5", "--learning_rate=1e-4", "--tuning_speakers", '[19, "027"]', "--train_splits", "b"])
    assert settings.data_folder == "out/data"
    assert (settings.temperature, settings.learning_rate) == (5.0, 1e-4)
    assert settings.tuning_speakers == ["19", "027"]
    assert settings.train_splits == ["b"]


@pytest.mark.parametrize(("change", "message"), [
    ({"temprature": 2}, "did you mean 'temperature'"),
    ({"num_states": "many"}, "num_states is 'many', expected int"),
    ({"num_states": True}, "num_states is True, expected int"),
    ({"temperature": 0}, "temperature is 0.0, expected a number above 0"),
    ({"hard_weight": -1}, "hard_weight is -1.0"),
    ({"cmvn": "file"}, "cmvn is 'file', expected one of speaker, utterance, corpus, none"),
    ({"speeds": ["fast"]}, "speeds is 'fast', expected float"),
    ({"data_folder": None}, "no corpus"),
    ({"student_speeds": [0.9]}, "student_speeds is [0.9], expected some of speeds, [1.0]"),
])
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(AsrKdError) as error:
        make_settings(BASE | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "not a settings file"),
    ("- 1\n- 2\n", "expected `key: value` lines"),
    ("output_folder: !apply:os.system [true]\n", "not a settings file"),
    ("temperature: 2\n", "output_folder is missing"),
])
def test_broken_files_and_code_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(AsrKdError, match=message):
        load_settings(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"none\.yaml: could not be read"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(("arguments", "message"), [(["--seed"], "no value"), (["seed", "1"], "expected --key value")])
def test_broken_overrides(arguments: list[str], message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        load_settings(HPARAMS[0], arguments)
