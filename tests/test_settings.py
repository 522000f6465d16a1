"""Settings: types, overrides, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr_kd.errors import AsrKdError
from asr_kd.settings import _RANGES, _TYPES, load_settings, make_settings

HPARAMS = sorted((Path(__file__).parents[1] / "recipes" / "LibriSpeech" / "hparams").glob("*.yaml"))
BASE = {"output_folder": "out", "data_folder": "data", "train_splits": ["train"]}


@pytest.mark.parametrize("path", HPARAMS, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for key in ("data_folder", "output_folder", "train_splits", "tuning_speakers", "dev_splits", "test_splits", "lexicon", "lm", "seed", "num_teachers",
                "num_states", "hidden_layers", "hidden_units", "temperature", "hard_weight", "device", "precision"):
        assert f"\n{key}:" in text, key
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
    ({"temperature": 0}, "temperature is 0.0, expected a finite number, 1e-20 or more"),
    ({"hard_weight": -1}, "hard_weight is -1.0"),
    ({"cmvn": "file"}, "cmvn is 'file', expected one of speaker, utterance, corpus, none"),
    ({"speeds": ["fast"]}, "speeds is 'fast', expected float"),
    ({"data_folder": None}, "no corpus"),
    ({"synthetic_minutes": {"train": 1}}, "data_folder given beside synthetic_minutes, expected one of them"),
    ({"synthetic_minutes": {"train": 1}, "data_folder": None, "lexicon": ["a"], "lm": "b", "lm_text": "c", "download": True},
     "lexicon, lm, lm_text, download given beside synthetic_minutes"),
    ({"synthetic_minutes": {"train": 1}, "lm": "b"}, "give --synthetic_minutes null for speech of one's own"),
    ({"lm": "a.arpa", "lm_text": "b.txt"}, "lm and lm_text given, expected a language model or the text"),
    ({"student_speeds": [0.9]}, "student_speeds is [0.9], expected some of speeds, [1.0]"),
    ({"test_splits": ["a", "b"], "dev_splits": ["a"]}, "name a 2 times, expected once"),
    ({"test_splits": ["train"]}, "name train 2 times, expected once"),
    ({"test_splits": ["manifests/train.csv"]}, "name train 2 times, expected once"),
    ({"synthetic_minutes": {"train": "many"}}, "synthetic_minutes is 'many', expected float"),
    ({"synthetic_minutes": {10: 3}}, "synthetic_minutes: name of a split is 10, expected str"),
])
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(AsrKdError) as error:
        make_settings(BASE | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NAN, INF = float("nan"), float("inf")
BAD_NUMBERS: list[tuple[str, list[object]]] = [
    ("num_mels lm_order num_states num_gaussians mono_passes tri_passes hidden_layers hidden_units num_teachers batch_frames student_hidden_layers "
     "student_hidden_units max_active tuning_utterances decoded_members num_jobs", [0, -1]),
    ("teacher_epochs learning_rate student_epochs beam", [0, -1, NAN, INF]),
    ("temperature", [0, 1e-21, -1, NAN, INF]),
    ("sweep_temperatures acoustic_scales", [[], [1.0, 0], [1.0, -1e-21], [NAN], [INF], [1.0, 2.0, 1.0000001]]),
    ("left_context right_context network_realignments", [-1]),
    ("hard_weight frames_in_memory_gb", [-0.1, NAN, INF]),
    ("dropout student_dropout", [-0.1, 0.999, 1.0, NAN]),
    ("speeds student_speeds", [[], [1.0, 0], [-1.0], [0.4], [2.1], [NAN], [1.0, 1.0]]),
    ("seed", [-1, 10**16]),
    ("sample_rate", [0, 999]),
    ("low_freq_hz high_freq_hz", [NAN, INF]),
    ("word_insertion_penalties", [[], [NAN], [0.0, 0.0]]),
    ("synthetic_minutes", [{}, {"train": 0}, {"train": NAN}]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for names, values in BAD_NUMBERS for name in names.split() for value in values])
def test_number_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(AsrKdError, match=f"^settings: {name} is .*, expected .*$"):
        make_settings(BASE | {name: value})


def test_every_number_has_a_range() -> None:
    numbers = {name for name, kind in _TYPES.items() if "int" in str(kind) or "float" in str(kind)}
    assert sorted(name for *_, names in _RANGES for name in names) == sorted(numbers)
    assert numbers == set(" ".join(names for names, _ in BAD_NUMBERS).split())


def test_limits_themselves_are_allowed() -> None:
    limits = {"dropout": 0, "hard_weight": 0, "left_context": 0, "seed": 0, "num_mels": 1, "speeds": [0.5, 2], "word_insertion_penalties": [-0.5]}
    settings = make_settings(BASE | limits | {"student_hidden_units": None})
    assert settings.speeds == [0.5, 2.0]
    assert settings.student_hidden_units is None


@pytest.mark.parametrize("setting", ["train_splits", "dev_splits", "test_splits", "synthetic_minutes"])
@pytest.mark.parametrize("split", ["/data/speech/train", "../train", "a/b", "a\\b", "", ".", "..", "..csv", "x/...csv", "train/"])
def test_split_that_leads_out_of_the_output_folder(setting: str, split: str) -> None:
    with pytest.raises(AsrKdError, match=f"settings: {setting} names .*; give a plain name of a folder below data_folder"):
        make_settings(BASE | {setting: {split: 1.0} if setting == "synthetic_minutes" else [split]})


@pytest.mark.parametrize("split", ["record.csv", "started"])
def test_split_with_the_name_of_a_file_of_the_stages(split: str) -> None:
    with pytest.raises(AsrKdError, match=f"settings: dev_splits names '{split}', but the stages keep a .*json of their own; rename the split"):
        make_settings(BASE | {"dev_splits": [split]})


@pytest.mark.parametrize("split", ["train-clean-100", "manifests/train.csv", "/data/train.csv", "../train.csv", "train.v2.csv", "..train"])
def test_plain_names_and_paths_of_manifests(split: str) -> None:
    assert make_settings(BASE | {"train_splits": [split]}).train_splits == [split]


IDS = ["010", "003", "NO", "1_0", "0x1F", "12:30", "1e3", "2020-01-01", "null"]


def test_text_stays_as_written(tmp_path: Path) -> None:
    """YAML would read these ids as 8, 3, false, 10, 31, 750, ..."""
    path = tmp_path / "a.yaml"
    written = f"[{', '.join(IDS)}]"
    path.write_text(f"output_folder: 010\ndata_folder: on\ntrain_splits: {written}\ntuning_speakers: !ref <train_splits>\nlm: 1_0\nlm_text: ~\nnum_jobs: 3\n")
    settings = load_settings(path)
    assert (settings.output_folder, settings.data_folder, settings.lm, settings.lm_text, settings.num_jobs) == ("010", "on", "1_0", None, 3)
    assert settings.train_splits == settings.tuning_speakers == IDS
    path.write_text("output_folder: out\ndata_folder: data\ntrain_splits: [a]\nlm: b\n")
    settings = load_settings(path, ["--tuning_speakers", written, "--train_splits", "012", "--output_folder=1_0", "--lm", "null", "--speeds", "[1, 1.1]"])
    assert (settings.output_folder, settings.train_splits, settings.tuning_speakers, settings.lm) == ("1_0", ["012"], IDS, None)
    assert settings.speeds == [1.0, 1.1]


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "not a settings file"),
    ("- 1\n- 2\n", "expected `key: value` lines"),
    ("output_folder: !apply:os.system [true]\n", "line 1 has the tag '!apply:os.system', expected no tag but !ref"),
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


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seed"], "no value"),
    (["seed", "1"], "expected --key value"),
    (["--seed", "2", "--temperature", "{"], "^argument --temperature: '{' is no value in YAML .*; close its brackets or quote it$"),
    (["--beam=2020-13-01"], "^argument --beam: '2020-13-01' is no value in YAML"),
])
def test_broken_overrides(arguments: list[str], message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        load_settings(HPARAMS[0], arguments)


def test_speech_of_ones_own_in_place_of_the_synthetic_corpus() -> None:
    own = ["--data_folder", "mine", "--lexicon", "words.txt", "--test_splits", "[]"]
    demo = next(path for path in HPARAMS if path.stem == "demo")
    with pytest.raises(AsrKdError, match="data_folder, lexicon given beside synthetic_minutes"):
        load_settings(demo, own)
    assert load_settings(demo, [*own, "--synthetic_minutes", "null"]).data_folder == "mine"


@pytest.mark.parametrize("tag", ["!applyref:os.mkdir", "!new:pathlib.Path", "!name:os.mkdir", "!include:", "!!python/object/apply:os.mkdir"])
def test_a_settings_file_runs_no_code(tag: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "hparams.yaml").write_text(f"output_folder: out\nlm: {tag} ['{made}']\n")
    with pytest.raises(AsrKdError, match="line 2 has the tag"):
        load_settings(tmp_path / "hparams.yaml")
    with pytest.raises(AsrKdError):
        load_settings(tmp_path / "hparams.yaml", ["--lm", f"{tag} ['{made}']"])
    assert not made.exists()
