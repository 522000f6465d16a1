"""The settings of an experiment: one flat YAML file, every key of which the command line can override."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hyperpyyaml.core import resolve_references

from asr_kd.errors import AsrKdError
from asr_kd.losses import LEAST_TEMPERATURE


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a recipe; `recipes/LibriSpeech/README.md` describes the keys that people change.

    Raises:
        AsrKdError: a value of the wrong type or out of range.
    """

    output_folder: str
    # corpus: a split is a folder name below data_folder (LibriSpeech layout) or the path of a CSV manifest
    data_folder: str | None = None
    train_splits: list[str] = field(default_factory=list)
    tuning_speakers: list[str] = field(default_factory=list)
    dev_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    synthetic_minutes: dict[str, float] | None = None
    download: bool = False
    # text
    lexicon: list[str] = field(default_factory=list)
    strip_stress: bool = False
    unknown_words: str = "exclude"
    lm: str | None = None
    lm_text: str | None = None
    lm_order: int = 3
    # features
    num_mels: int = 40
    sample_rate: int = 16000
    low_freq_hz: float = 20.0
    high_freq_hz: float = 0.0
    cmvn: str = "speaker"
    left_context: int = 20
    right_context: int = 5
    speeds: list[float] = field(default_factory=lambda: [1.0])
    # HMM-state targets
    num_states: int = 1200
    num_gaussians: int = 6000
    mono_passes: int = 20
    tri_passes: int = 12
    speaker_adaptation: bool = True
    network_realignments: int = 0
    # networks
    hidden_layers: int = 4
    hidden_units: int = 512
    dropout: float = 0.1
    num_teachers: int = 10
    teacher_epochs: float = 3
    batch_frames: int = 512
    learning_rate: float = 1e-3
    # distillation
    temperature: float = 2.0
    sweep_temperatures: list[float] = field(default_factory=lambda: [1.0, 2.0, 5.0, 10.0])
    hard_weight: float = 0.5
    teacher_mean: str = "arithmetic"
    soft_targets: str = "compact"
    student_speeds: list[float] | None = None
    student_hidden_layers: int | None = None
    student_hidden_units: int | None = None
    student_dropout: float | None = None
    student_epochs: float = 6
    # decoding
    beam: float = 11.0
    max_active: int = 3000
    acoustic_scales: list[float] = field(default_factory=lambda: [0.08, 0.1, 0.12, 0.15, 0.18])
    word_insertion_penalties: list[float] = field(default_factory=lambda: [-0.5, 0.0, 0.5, 1.0])
    tuning_utterances: int = 120
    decoded_members: int = 3
    # machine
    seed: int = 1
    device: str = "cpu"
    precision: str = "auto"
    num_jobs: int = 2
    frames_in_memory_gb: float = 8.0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_type(item.name, getattr(self, item.name), _TYPES[item.name])
        if self.synthetic_minutes is None and (self.data_folder is None or not self.train_splits):
            raise AsrKdError("settings: no corpus; give data_folder and train_splits (or synthetic_minutes for the synthetic corpus)")
        for low, high, expected, names in _RANGES:
            for name in names:
                _check_range(name, getattr(self, name), low, high, expected)
        if self.student_speeds is not None and not set(self.student_speeds) <= {1.0, *self.speeds}:
            raise AsrKdError(f"settings: student_speeds is {self.student_speeds}, expected some of speeds, {self.speeds}")
        for name in ("train_splits", "dev_splits", "test_splits"):
            _check_folder_names(name, getattr(self, name))
        _check_folder_names("synthetic_minutes", self.synthetic_minutes or {})
        splits = Counter(map(split_name, (*self.train_splits, *self.dev_splits, *self.test_splits)))
        for split, count in splits.items():
            if count > 1:
                raise AsrKdError(f"settings: train_splits, dev_splits and test_splits name {split} {count} times, expected once; "
                                 "remove all but one, or rename a manifest")
        ignored = [name for name in ("data_folder", "lexicon", "lm", "lm_text", "download") if getattr(self, name)]
        if self.synthetic_minutes is not None and ignored:
            raise AsrKdError(f"settings: {', '.join(ignored)} given beside synthetic_minutes, expected one of them, as the synthetic corpus brings its own; "
                             "give --synthetic_minutes null for speech of one's own")
        if self.lm and self.lm_text:
            raise AsrKdError("settings: lm and lm_text given, expected a language model or the text to estimate one from; give --lm null or --lm_text null")
        choices = {
            "cmvn": ("speaker", "utterance", "corpus", "none"),
            "precision": ("auto", "fp32", "bf16"),
            "soft_targets": ("compact", "sparse", "dense", "on_the_fly"),
            "teacher_mean": ("arithmetic", "geometric"),
            "unknown_words": ("exclude", "g2p"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise AsrKdError(f"settings: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")

    @property
    def output(self) -> Path:
        return Path(self.output_folder)


def split_name(split: str) -> str:
    """What a split is called in the output folder: the name of its folder, or of its CSV manifest without the path and `.csv`."""
    return Path(split).stem if split.endswith(".csv") else split


def load_settings(hparams: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file and apply command-line overrides in SpeechBrain's syntax (`--key value` or `--key=value`).

    `!ref <key>` works as in HyperPyYAML; tags that make objects are refused, for a settings file must not run code.

    Raises:
        AsrKdError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    try:
        text = Path(hparams).read_text(encoding="utf-8")
        _check_tags(text, hparams)
        values = _parse(resolve_references(text, _parse_overrides(overrides)).getvalue())
    except OSError as error:
        raise AsrKdError(f"{hparams}: could not be read ({error.strerror}); give the path of a settings file") from error
    except AsrKdError:
        raise
    except Exception as error:  # hyperpyyaml and its YAML readers raise a dozen unrelated types
        raise AsrKdError(f"{hparams}: not a settings file ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise AsrKdError(f"{hparams}: {type(values).__name__}, expected `key: value` lines")
    return make_settings(values)


def make_settings(values: dict[str, Any]) -> Settings:
    """Settings from a dictionary; an unknown key is an error that names the nearest known one."""
    for key in values:
        if key not in _TYPES:
            near = difflib.get_close_matches(str(key), _TYPES, n=1)
            raise AsrKdError(f"settings: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    if "output_folder" not in values:
        raise AsrKdError("settings: output_folder is missing; give --output_folder FOLDER")
    return Settings(**{key: _accept(value, _TYPES[key]) for key, value in values.items()})


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise AsrKdError(f"argument {word!r}: expected --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise AsrKdError(f"argument {word!r}: no value; expected --key value")
            text = words.pop(0)
        try:
            overrides[key] = _as_written(yaml.load(text, yaml.BaseLoader), yaml.safe_load(text), key)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-01
            raise AsrKdError(f"argument --{key}: {text!r} is no value in YAML ({' '.join(str(error).split())}); close its brackets or quote it") from error
    return overrides


def _check_tags(text: str, hparams: Path | str) -> None:
    """Raise `AsrKdError` for tags by which HyperPyYAML would call functions or read other files."""
    for token in yaml.scan(text):
        if isinstance(token, yaml.TagToken) and token.value != ("!", "ref"):
            raise AsrKdError(f"{hparams}: line {token.start_mark.line + 1} has the tag {''.join(filter(None, token.value))!r}, expected no tag but !ref; "
                             "a settings file runs no code: write the value itself")


def _parse(text: str) -> Any:
    """A YAML document; where `Settings` wants text, `010` and `NO` are text, not 8 and false as for YAML."""
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        return values
    texts = yaml.load(text, yaml.BaseLoader)
    return {key: _as_written(texts.get(key, value), value, key) for key, value in values.items()}


def _as_written(text: Any, value: Any, key: str) -> Any:
    """`text` for a setting that is text or a list of it (null stays none), else `value`, which YAML made of it."""
    return text if value is not None and _TYPES.get(key) in (str, str | None, list[str]) else value


def _accept(value: Any, kind: Any) -> Any:
    """Take `3` for a float, `1e-3` (which YAML reads as text) for a float, one item for a list of it, and numbers for speaker ids."""
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [str(item) if inner is str else _accept(item, inner) for item in items]
    if typing.get_origin(kind) is types.UnionType and value is not None:
        return _accept(value, typing.get_args(kind)[0])
    return value


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Raise `AsrKdError` unless `value` is of type `kind`: plain, optional, a list or a dictionary."""
    if typing.get_origin(kind) is types.UnionType:
        if value is None:
            return
        kind = typing.get_args(kind)[0]
    plain = typing.get_origin(kind) or kind
    accepted: Any = (int, float) if plain is float else plain
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        raise AsrKdError(f"settings: {name} is {value!r}, expected {getattr(kind, '__name__', kind)}")
    if plain is list:
        items: list[Any] = value
        for item in items:
            _check_type(name, item, typing.get_args(kind)[0])
    if plain is dict:
        for key, item in value.items():
            _check_type(f"{name}: name of a split", key, typing.get_args(kind)[0])
            _check_type(name, item, typing.get_args(kind)[1])


def _check_range(name: str, value: Any, low: float, high: float, expected: str) -> None:
    """Raise `AsrKdError` unless a number, or every one of a list or dictionary, lies in [`low`, `high`]; None is no number to check.

    A list needs a value, and values that differ in the six digits that names of folders hold.
    """
    if value is None:
        return
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if not all(low <= number <= high for number in values):
        raise AsrKdError(f"settings: {name} is {value}, expected {expected}")
    if not values or (isinstance(value, list) and len({f"{number:g}" for number in values}) < len(values)):
        raise AsrKdError(f"settings: {name} is {value}, expected at least one value, and none twice")


def _check_folder_names(setting: str, splits: Iterable[str]) -> None:
    """Raise `AsrKdError` for a split whose name would lead out of the folders that the stages write, and so to files of the user, or is a file's there."""
    for split in splits:
        name = split_name(split)
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise AsrKdError(f"settings: {setting} names {split!r}; give a plain name of a folder below data_folder, or the path of a .csv manifest")
        if name in ("record", "started"):
            raise AsrKdError(f"settings: {setting} names {split!r}, but the stages keep a {name}.json of their own; rename the split")


_ABOVE_0, _LARGEST = math.ulp(0.0), sys.float_info.max  # the limits are themselves allowed; neither infinity nor NaN is
_RANGES: tuple[tuple[float, float, str, tuple[str, ...]], ...] = (
    (1, _LARGEST, "1 or more", ("num_mels", "lm_order", "num_states", "num_gaussians", "mono_passes", "tri_passes", "hidden_layers", "hidden_units",
                                "num_teachers", "batch_frames", "student_hidden_layers", "student_hidden_units", "max_active", "tuning_utterances",
                                "decoded_members", "num_jobs")),
    (_ABOVE_0, _LARGEST, "a finite number above 0", ("synthetic_minutes", "teacher_epochs", "learning_rate", "student_epochs", "beam", "acoustic_scales")),
    (LEAST_TEMPERATURE, _LARGEST, f"a finite number, {LEAST_TEMPERATURE:g} or more", ("temperature", "sweep_temperatures")),
    (0, _LARGEST, "a finite number, 0 or more", ("left_context", "right_context", "network_realignments", "hard_weight", "frames_in_memory_gb")),
    (1000, _LARGEST, "1000 or more", ("sample_rate",)),
    (0, 0.99, "0 to 0.99", ("dropout", "student_dropout")),
    (0, 4e9, "0 to 4e9", ("seed",)),
    (0.5, 2.0, "numbers from 0.5 to 2", ("speeds", "student_speeds")),
    (-_LARGEST, _LARGEST, "finite numbers", ("word_insertion_penalties", "low_freq_hz", "high_freq_hz")),
)
_TYPES: dict[str, Any] = typing.get_type_hints(Settings)
