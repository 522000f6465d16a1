"""Targets of speed-perturbed copies, against the sound itself; what each stage depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd import networks, targets
from asr_kd.corpus import Corpus, Text
from asr_kd.errors import AsrKdError
from asr_kd.features import FbankOptions, extract_features
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.hmm.align import SEGMENTS
from asr_kd.hmm.model import untied_model
from asr_kd.lexicon import Lexicon
from asr_kd.manifest import Utterance
from asr_kd.networks import TrainingData
from asr_kd.settings import make_settings
from asr_kd.stage import Record
from asr_kd.targets import Targets, prepare_features, prepare_targets, realign, stretch_targets

RATE = 16000


@pytest.fixture
def tones(tmp_path: Path) -> Utterance:
    """Five tones of 300 ms that rise, so that every frame tells which one sounds."""
    samples = np.concatenate([np.sin(2 * np.pi * f * np.arange(int(0.3 * RATE)) / RATE) for f in (300, 700, 1300, 2400, 4200)])
    soundfile.write(tmp_path / "tones.wav", 0.3 * samples, RATE)
    return Utterance("u", len(samples) / RATE, tmp_path / "tones.wav", "s", ("TONES",))


def loudest_tone(features: np.ndarray) -> np.ndarray:
    """Which of the five tones each frame holds, by its loudest filter, numbered in order of appearance."""
    loudest = features.argmax(1)
    return np.searchsorted(np.sort(np.unique(loudest, return_counts=True)[0][np.unique(loudest, return_counts=True)[1] > 10]), loudest)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_states_follow_the_sound(tones: Utterance, tmp_path: Path, speed: float) -> None:
    for name, factor in (("plain", 1.0), ("copy", speed)):
        extract_features([tones], tmp_path / name, cmvn="none", speed=factor)
    plain, copy = FrameStore(tmp_path / "plain"), FrameStore(tmp_path / "copy")
    prefix = f"sp{speed:g}-"
    with FrameWriter(tmp_path / "targets", (), np.int32) as writer:
        writer.append("u", loudest_tone(np.asarray(plain["u"])))
    stretch_targets(FrameStore(tmp_path / "targets"), copy, prefix, tmp_path / "stretched")
    stretched = np.asarray(FrameStore(tmp_path / "stretched")[prefix + "u"])
    heard = loudest_tone(np.asarray(copy[prefix + "u"]))
    assert len(stretched) == copy.length(prefix + "u")
    # within one frame at each of the four changes
    changes = [np.flatnonzero(np.diff(states)) for states in (stretched, heard)]
    assert len(changes[0]) == len(changes[1]) == 4
    assert np.abs(changes[0] - changes[1]).max() <= 1


class AnyStore:
    """In place of a store: it holds every utterance, and no frame."""

    utt_ids = frozenset[str]()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, _: str) -> bool:
        return True


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """(corpus, text) -> fingerprint of each stage by its folder and of what networks train on; no stage does its work, but alignments are asked
    whether they would go on after a cut."""
    usual = make_settings({"output_folder": str(tmp_path), "data_folder": "data", "train_splits": ["train"], "speeds": [0.9, 1.0],
                              "network_realignments": 1})
    stages: dict[str, str] = {}

    def run_stage(stage: str, folder: Path, choices: Mapping[str, Any], inputs: Mapping[str, str], work: Callable[[Path], None], **_: object) -> Record:
        record = Record(stage, dict(choices), dict(inputs), "", 0.0, {})
        stages[str(folder.relative_to(tmp_path))] = record.fingerprint
        if stage in ("align", "realign") and "-sp" not in folder.name:
            work(folder)
        return record

    def align(*arguments: Any, resume: bool = False, **_: object) -> None:
        assert resume, f"{arguments[5]}: what a cut-off alignment left is thrown away"

    monkeypatch.setattr(targets, "run_stage", run_stage)
    monkeypatch.setattr(targets, "align", align)
    monkeypatch.setattr(targets, "align_with_network", align)
    monkeypatch.setattr(targets, "Windows", lambda *_: None)
    monkeypatch.setattr(targets, "FrameStore", AnyStore)
    monkeypatch.setattr(targets.Aligner, "load", lambda _: SimpleNamespace(hmm=SimpleNamespace(num_states=3)))
    monkeypatch.setattr(targets, "with_state_priors", lambda hmm, *_: hmm)
    monkeypatch.setattr(networks, "load_frame_data", lambda *_: None)

    def run(corpus: Corpus, text: Text, **changes: Any) -> dict[str, str]:
        stages.clear()
        settings = replace(usual, **changes)
        features, _ = prepare_features(settings, corpus)
        first, _ = prepare_targets(settings, corpus, text, features)
        inputs = {f"first {name}": value for name, value in TrainingData.load(settings, corpus, features, first).inputs.items()}
        last, _ = realign(settings, corpus, text, features, first, None, "network", 1)  # type: ignore[arg-type]
        inputs |= {f"last {name}": value for name, value in TrainingData.load(settings, corpus, features, last).inputs.items()}
        return stages | inputs

    return run


def corpus_of(**transcripts: str) -> Corpus:
    splits = {name: [Utterance(name, 1.0, Path("x.wav"), "s", tuple(text.split()))] for name, text in transcripts.items()}
    return Corpus(splits, ["train"], ["train"], [name for name in splits if name != "train"], transcripts)


TEXT = Text(Lexicon({"THE": (("DH", "AH"),), "CAT": (("K", "AE"),), "SAT": (("S", "AE"),)}), Path("lm.arpa"), "text")
ALL = {"hmm", *(f"{folder}/{name}" for folder in ("features", "targets_0", "targets") for name in ("train", "train-sp0.9", "dev")),
       *(f"{which} {what}" for which in ("first", "last") for what in ("features", "targets"))}
CONTEXT = {"first context", "last context"}


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_settings_decide_the_filterbank() -> None:
    telephone = make_settings({"output_folder": "o", "data_folder": "d", "train_splits": ["t"], "sample_rate": 8000, "low_freq_hz": 100, "high_freq_hz": -200,
                               "num_mels": 30})
    assert targets.fbank_options(telephone) == FbankOptions(num_mels=30, sample_rate=8000, low_freq_hz=100, high_freq_hz=-200)
    assert targets.fbank_options(make_settings({"output_folder": "o", "data_folder": "d", "train_splits": ["t"]})) == FbankOptions()


def test_stages_depend_on_what_they_read_alone(dry_run: Any) -> None:
    corpus = corpus_of(train="THE CAT", dev="THE SAT")
    before = dry_run(corpus, TEXT)
    assert set(before) == ALL | CONTEXT
    # one more split, and pronunciations of its words
    more = replace(TEXT, lexicon=Lexicon(TEXT.lexicon.pronunciations | {"ZORB": (("S", "AH"),)}), fingerprint="other")
    after = dry_run(corpus_of(train="THE CAT", dev="THE SAT", test="ZORB"), more)
    assert changed(before, after) == set()
    assert set(after) - ALL - CONTEXT == {f"{folder}/test" for folder in ("features", "targets_0", "targets")}
    # another language model, with words of its own
    assert changed(before, dry_run(corpus, more)) == set()
    # other speech in a split
    assert changed(before, dry_run(corpus_of(train="THE CAT", dev="SAT"), TEXT)) == {"features/dev", "targets_0/dev", "targets/dev"}
    assert changed(before, dry_run(corpus_of(train="CAT", dev="THE SAT"), TEXT)) == ALL - {"features/dev", "targets/dev"}


def test_networks_depend_on_the_context_of_a_window_not_on_its_width_alone(dry_run: Any) -> None:
    corpus = corpus_of(train="THE CAT", dev="THE SAT")
    assert changed(dry_run(corpus, TEXT), dry_run(corpus, TEXT, left_context=5, right_context=20)) == CONTEXT


def test_another_aligner_of_the_same_settings_aligns_again(dry_run: Any, tmp_path: Path) -> None:
    corpus = corpus_of(train="THE CAT", dev="THE SAT")
    before = dry_run(corpus, TEXT)
    (tmp_path / "hmm" / "aligner").mkdir(parents=True)
    (tmp_path / "hmm" / "aligner" / "model").write_text("of another machine")
    aligned = {name for name in ALL if "targets_0/" in name} | {"first targets"}
    assert changed(before, dry_run(corpus, TEXT)) == aligned


def test_tuning_speakers_without_a_usable_utterance_are_told_before_anything_is_trained(dry_run: Any) -> None:
    corpus = corpus_of(train="THE CAT", dev="THE SAT", held="THE ZORB")
    with pytest.raises(AsrKdError, match="tuning_speakers: none of their 1 utterances has features and pronunciations"):
        dry_run(replace(corpus, tuning=["held"]), TEXT)


def test_tuning_speakers_of_whom_nothing_could_be_aligned(dry_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnyStore, "__contains__", lambda self, _: "targets" not in str(self.folder))
    with pytest.raises(AsrKdError, match="tuning_speakers: none of their 1 utterances could be aligned"):
        dry_run(corpus_of(train="THE CAT", dev="THE SAT"), TEXT)


def test_a_split_with_the_name_of_a_copy_is_refused(dry_run: Any) -> None:
    with pytest.raises(AsrKdError, match=r"train-sp0.9: a split has the name of the copy of train at another speed"):
        dry_run(corpus_of(**{"train": "THE CAT", "train-sp0.9": "CAT"}), TEXT)


def test_another_pronunciation_aligns_again_what_holds_the_word(dry_run: Any) -> None:
    corpus = corpus_of(train="THE CAT", dev="THE SAT")
    before = dry_run(corpus, TEXT)
    features = {name for name in ALL if "features" in name}
    for word, phone, expected in (("SAT", "S", {"targets_0/dev", "targets/dev"}), ("CAT", "K", ALL - features - {"targets/dev"})):
        other = replace(TEXT, lexicon=Lexicon(TEXT.lexicon.pronunciations | {word: ((phone,),)}))
        assert changed(before, dry_run(corpus, other)) == expected


def test_pronunciations_and_pauses_are_counted_where_the_aligner_found_them(tmp_path: Path) -> None:
    lexicon = Lexicon({"A": (("AH",), ("EY",)), "TEA": (("T", "IY"),)})
    hmm = untied_model(("SIL", *lexicon.phones))
    phones = {phone: number for number, phone in enumerate(hmm.phones, start=1)}
    rows = [[("SIL", -1), ("EY", 0), ("T", 1), ("IY", 1), ("AH", 2), ("SIL", -1)], [("AH", 0), ("EY", 1)]]
    for split, utt_ids in (("train", ("one", "two")), ("train-sp0.9", ("sp0.9-one",))):
        with FrameWriter(tmp_path / split, (), np.int32) as writer:
            for utt_id in utt_ids:
                writer.append(utt_id, np.zeros(9, np.int32))
    with FrameWriter(tmp_path / "train" / SEGMENTS, (4,), np.int32, {"phones": list(hmm.phones)}) as writer:
        for utt_id, own in zip(("one", "two"), rows, strict=True):
            writer.append(utt_id, np.array([[phones[phone], word, start, start + 1] for start, (phone, word) in enumerate(own)], np.int32))
    found = Targets({split: FrameStore(tmp_path / split) for split in ("train", "train-sp0.9")}, hmm, {})
    transcripts = {"one": ("A", "TEA", "A"), "two": ("A", "A"), "lost": ("TEA",)}
    spoken = found.spoken_words(transcripts)
    assert spoken.pronunciations == {("A", ("EY",)): 2, ("A", ("AH",)): 2, ("TEA", ("T", "IY")): 1}
    assert spoken.pauses == {("<s>", True): 1, ("<s>", False): 1, ("A", True): 1, ("A", False): 3, ("TEA", False): 1}
    alone = found.spoken_words({"one": transcripts["one"]})
    assert alone.pronunciations == {("A", ("EY",)): 1, ("A", ("AH",)): 1, ("TEA", ("T", "IY")): 1}
    assert alone.pauses == {("<s>", True): 1, ("A", True): 1, ("A", False): 1, ("TEA", False): 1}
    with pytest.raises(AsrKdError, match="two: 1 words in the transcript, 2 in the alignment"):
        found.spoken_words({"two": ("A",)})
