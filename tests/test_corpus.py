"""Manifests that notice changed audio, and a vocabulary that the reported splits do not extend."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.corpus import Corpus, Text, prepare_corpus, prepare_text
from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak_is_installed
from asr_kd.lexicon import Lexicon, read_lexicon
from asr_kd.lm import estimate_kneser_ney, read_vocabulary, write_arpa
from asr_kd.manifest import Utterance
from asr_kd.settings import Settings

PHONES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
needs_espeak = pytest.mark.skipif(not espeak_is_installed(), reason="espeakng-loader is not installed (extra: demo)")


def settings_of(folder: Path, **more: str) -> Settings:
    return Settings(output_folder=str(folder / "out"), data_folder=str(folder), train_splits=["train.csv"], dev_splits=["dev.csv"], **more)  # type: ignore[arg-type]


def make_manifests(folder: Path) -> None:
    for split, speakers in (("train", "abce"), ("dev", "d")):
        rows = [f"{split}-{speaker},0.1,$data_root/{split}-{speaker}.wav,{speaker},A B\n" for speaker in speakers]
        (folder / f"{split}.csv").write_text("ID,duration,wav,spk_id,wrd\n" + "".join(rows))
        for speaker in speakers:
            soundfile.write(folder / f"{split}-{speaker}.wav", np.zeros(1600), 16000)


def test_audio_of_a_csv_manifest_that_is_repaired_or_replaced_is_noticed(tmp_path: Path) -> None:
    make_manifests(tmp_path)
    settings, audio = settings_of(tmp_path), tmp_path / "dev-d.wav"
    (tmp_path / "train-c.wav").unlink()
    first, _ = prepare_corpus(settings, tmp_path)
    assert [u.utt_id for u in first.splits["train"]] == ["train-a", "train-b", "train-e"]
    assert prepare_corpus(settings, tmp_path)[0].fingerprints == first.fingerprints
    soundfile.write(tmp_path / "train-c.wav", np.zeros(1600), 16000)
    repaired, _ = prepare_corpus(settings, tmp_path)
    assert [u.utt_id for u in repaired.splits["train"]] == ["train-a", "train-b", "train-c", "train-e"]
    longer = audio.read_bytes() + bytes(2)
    audio.write_bytes(longer)
    replaced, _ = prepare_corpus(settings, tmp_path)
    os.utime(audio, ns=(0, audio.stat().st_mtime_ns + 1))
    touched, _ = prepare_corpus(settings, tmp_path)
    assert [len({corpus.fingerprints[split] for corpus in (first, repaired, replaced, touched)}) for split in ("train", "dev")] == [2, 3]


def test_speakers_with_least_speech_cannot_be_chosen_by_unknown_durations(tmp_path: Path) -> None:
    make_manifests(tmp_path)
    manifest = tmp_path / "train.csv"
    manifest.write_text(manifest.read_text().replace("train-c,0.1", "train-c,0"))
    with pytest.raises(AsrKdError, match=r"train-c: its duration is 0, .* give durations in the manifest or choose tuning_speakers"):
        prepare_corpus(settings_of(tmp_path), tmp_path)
    chosen = prepare_corpus(replace(settings_of(tmp_path), tuning_speakers=["c"]), tmp_path)[0]
    assert chosen.tuning == ["train-c"]


def make_folders(folder: Path) -> None:
    for split, speakers in (("train", "abce"), ("dev", "d")):
        for spk in speakers:
            chapter = folder / split / spk / "7"
            chapter.mkdir(parents=True)
            (chapter / f"{spk}-7.trans.txt").write_text(f"{spk}-7-0 A B\n")
            soundfile.write(chapter / f"{spk}-7-0.wav", np.zeros(1600), 16000)


def test_speech_of_a_librispeech_folder_that_is_changed_is_noticed_in_its_split_alone(tmp_path: Path) -> None:
    make_folders(tmp_path)
    settings = Settings(output_folder=str(tmp_path / "out"), data_folder=str(tmp_path), train_splits=["train"], dev_splits=["dev"])
    corpora = [prepare_corpus(settings, tmp_path)[0]]
    assert prepare_corpus(settings, tmp_path)[0] == corpora[0]
    audio = tmp_path / "train" / "a" / "7" / "a-7-0.wav"
    changed = audio.stat().st_mtime_ns + 1

    def replace_audio_by_as_long() -> None:
        soundfile.write(audio, np.full(1600, 0.1), 16000)
        os.utime(audio, ns=(0, changed))

    for change in (replace_audio_by_as_long, lambda: (tmp_path / "train" / "b").rename(tmp_path / "train" / "bb"),
                   lambda: (tmp_path / "train" / "c" / "7" / "c-7.trans.txt").write_text("c-7-0 B A\n"), audio.unlink):
        change()
        corpora.append(prepare_corpus(settings, tmp_path)[0])
    assert len({corpus.fingerprints["train"] for corpus in corpora}) == 5
    assert len({corpus.fingerprints["dev"] for corpus in corpora}) == 1
    assert {u.spk_id for u in corpora[2].splits["train"]} == {"a", "bb", "c", "e"}


def test_hidden_files_and_notes_are_no_speech(tmp_path: Path) -> None:
    make_folders(tmp_path)
    settings = Settings(output_folder=str(tmp_path / "out"), data_folder=str(tmp_path), train_splits=["train"], dev_splits=["dev"])
    first = prepare_corpus(settings, tmp_path)[0]
    chapter = tmp_path / "train" / "a" / "7"
    (chapter / ".DS_Store").write_bytes(b"\0\xff")
    (chapter / "._a-7.trans.txt").write_bytes(b"\0\xff")
    (chapter / ".cache").mkdir()
    (chapter / ".cache" / "a-7.trans.txt").write_bytes(b"\0\xff")
    (chapter / "notes.txt").write_text("a good speaker")
    assert prepare_corpus(settings, tmp_path)[0] == first


@pytest.mark.parametrize("splits", [("train", "dev"), ("train.csv", "dev.csv")])
def test_a_corpus_that_is_moved_is_the_same_speech_at_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, str]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "data").mkdir(parents=True)
    (make_folders if splits[0] == "train" else make_manifests)(here / "data")
    settings = Settings(output_folder="out", data_folder="data", train_splits=[splits[0]], dev_splits=[splits[1]])
    monkeypatch.chdir(here)
    before = prepare_corpus(settings, Path("data"))[0]
    here.rename(there)
    monkeypatch.chdir(there)
    after = prepare_corpus(settings, Path("data"))[0]
    assert after.fingerprints == before.fingerprints
    assert all(utterance.wav.is_file() for split in after.splits.values() for utterance in split)


def test_a_dangling_link_is_left_out_and_listed(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "dev" / "d" / "7" / "d-7.trans.txt").write_text("d-7-0 A B\nd-7-1 A B\n")
    (tmp_path / "dev" / "d" / "7" / "d-7-1.wav").symlink_to(tmp_path / "nowhere.wav")
    settings = Settings(output_folder=str(tmp_path / "out"), data_folder=str(tmp_path), train_splits=["train"], dev_splits=["dev"])
    assert [u.utt_id for u in prepare_corpus(settings, tmp_path)[0].splits["dev"]] == ["d-7-0"]
    assert "d-7-1.wav: no such audio file" in (tmp_path / "out" / "manifests" / "dev.exclusions.csv").read_text()


def corpus_of(train: str, dev: str) -> Corpus:
    splits = {name: [Utterance(name, 1.0, Path("x.wav"), "s", tuple(text.split()))] for name, text in (("train", train), ("dev", dev))}
    return Corpus(splits, ["train"], [], ["dev"], {"train": train, "dev": dev})


def lexicon_file(folder: Path, words: str = "THE CAT SAT") -> Path:
    path = folder / "lexicon.txt"
    path.write_text("".join(f"{word} {PHONES}\n" for word in words.split()))
    return path


@needs_espeak
@pytest.mark.parametrize("form", ["arpa", "text"])
def test_transcripts_of_reported_splits_do_not_extend_the_vocabulary(tmp_path: Path, form: str) -> None:
    """Words that the graph would hold are those of the language model with a pronunciation: the same whatever the dev split says."""
    sentences = [("THE", "CAT", "SAT"), ("THE", "ZORB", "SANG"), ("THE", "QUUX")]
    arpa = lm_text = None
    if form == "arpa":
        arpa = tmp_path / "lm.arpa"
        write_arpa(estimate_kneser_ney(sentences, 2), arpa)
    else:
        lm_text = tmp_path / "lm.txt"
        lm_text.write_text("".join(" ".join(words) + "\n" for words in sentences))
    vocabularies = []
    for dev in ("THE CAT", "THE ZORB VEX"):
        settings = settings_of(tmp_path / dev.replace(" ", "_"), unknown_words="g2p")
        text, _ = prepare_text(settings, corpus_of("THE SANG", dev), [lexicon_file(tmp_path)], arpa, lm_text)
        assert all(word in text.lexicon for word in dev.split())  # for alignment
        vocabularies.append({word: text.lexicon[word] for word in read_vocabulary(text.arpa) if word in text.lexicon})
    assert vocabularies[0] == vocabularies[1]
    assert set(vocabularies[0]) == {"THE", "CAT", "SAT", "ZORB", "SANG", "QUUX"}


@needs_espeak
def test_alignments_depend_on_the_words_of_their_transcripts_and_the_graph_on_all(tmp_path: Path) -> None:
    texts = {}
    for name, dev, sentence in (("first", "THE CAT", "THE SAT"), ("lm", "THE CAT", "SAT THE"), ("lm words", "THE CAT", "THE ZORB"),
                                ("split", "VEX", "THE SAT")):
        arpa = tmp_path / f"{name}.arpa"
        write_arpa(estimate_kneser_ney([sentence.split()], 2), arpa)
        texts[name], _ = prepare_text(settings_of(tmp_path, unknown_words="g2p"), corpus_of("THE QUUX", dev), [lexicon_file(tmp_path)], arpa, None)
    assert ["ZORB" in text.lexicon for text in texts.values()] == [False, False, True, False]
    assert ["VEX" in text.lexicon for text in texts.values()] == [False, False, False, True]
    assert len({text.pronunciations_fingerprint([("THE", "QUUX")]) for text in texts.values()}) == 1
    assert texts["split"].pronunciations_fingerprint([("VEX",)]) != texts["first"].pronunciations_fingerprint([("VEX",)])
    assert len({text.fingerprint for text in texts.values()}) == 4
    lexicon = texts["first"].lexicon.pronunciations
    for other in (lexicon | {"QUUX": (("K",),)}, lexicon | {"NEW": (("NG", "NEW"),)}):  # other pronunciations, another phone
        assert replace(texts["first"], lexicon=Lexicon(other)).pronunciations_fingerprint([("THE", "QUUX")]) != texts["first"].pronunciations_fingerprint(
            [("THE", "QUUX")])


@pytest.mark.parametrize("unknown_words", ["exclude", "g2p"])
@pytest.mark.parametrize(("name", "content", "message"), [
    ("lm.arpa", b"", "cut off or not an ARPA file"),
    ("lm.arpa", b"\\data\\\nngram 1=2\n\n\\1-grams:\n-1\tTHE\n", r"1 of 2 1-grams|cut off"),
    ("lm.arpa.gz", b"\\data\\", "could not be read"),
])
def test_a_broken_language_model_is_an_error_before_anything_is_trained(tmp_path: Path, unknown_words: str, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AsrKdError, match=rf"{name}: .*{message}") as error:
        prepare_text(settings_of(tmp_path, unknown_words=unknown_words), corpus_of("THE CAT", "THE SAT"), [lexicon_file(tmp_path)], tmp_path / name, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["lm", "lm_text"])
def test_lexicon_and_language_model_without_a_word_in_common(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    if form == "lm":
        write_arpa(estimate_kneser_ney([("LE", "CHAT")], 2), path)
    else:
        path.write_text("LE CHAT\n")
    paths = (path, None) if form == "lm" else (None, path)
    with pytest.raises(AsrKdError, match=rf"{form}: none of the 2 words \(such as 'CHAT'\) is among the 3 of the lexicon \(such as 'CAT'\)"):
        prepare_text(settings_of(tmp_path), corpus_of("THE CAT", "THE SAT"), [lexicon_file(tmp_path)], *paths)


def test_text_for_the_language_model_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    lm_text = tmp_path / "lm.txt"
    lm_text.write_text("\ufeffTHE CAT\n", encoding="utf-8")
    text, _ = prepare_text(settings_of(tmp_path), corpus_of("THE CAT", "THE SAT"), [lexicon_file(tmp_path)], None, lm_text)
    assert set(read_vocabulary(text.arpa)) == {"THE", "CAT"}
    with gzip.open(tmp_path / "lm.txt.gz", "wt") as file:
        file.write("THE CAT\n")
    packed, _ = prepare_text(settings_of(tmp_path), corpus_of("THE CAT", "THE SAT"), [lexicon_file(tmp_path)], None, tmp_path / "lm.txt.gz")
    assert packed.arpa.read_text() == text.arpa.read_text()
    lm_text.write_text("THE CAT\n", encoding="utf-16")
    with pytest.raises(AsrKdError, match=r"lm\.txt: not readable as text .*; save it as UTF-8"):
        prepare_text(settings_of(tmp_path), corpus_of("THE CAT", "THE SAT"), [lexicon_file(tmp_path)], None, lm_text)


def test_a_language_model_of_the_training_transcripts_follows_the_choice_of_tuning_speakers(tmp_path: Path) -> None:
    corpus = replace(corpus_of("THE CAT", "THE SAT"), evaluation=[])
    vocabularies = []
    for train in (["train"], ["train", "dev"]):
        text, _ = prepare_text(settings_of(tmp_path), replace(corpus, train=train), [lexicon_file(tmp_path)], None, None)
        vocabularies.append(set(read_vocabulary(text.arpa)))
    assert vocabularies == [{"THE", "CAT"}, {"THE", "CAT", "SAT"}]


@needs_espeak
def test_installing_espeak_makes_the_text_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arpa = tmp_path / "lm.arpa"
    write_arpa(estimate_kneser_ney([("THE", "CAT", "ZORB")], 2), arpa)

    def prepare() -> Text:
        return prepare_text(settings_of(tmp_path, unknown_words="g2p"), corpus_of("THE CAT", "THE ZORB"), [lexicon_file(tmp_path)], arpa, None)[0]

    def refuse(_: object) -> None:
        raise AsrKdError("espeak-ng: not installed")

    with monkeypatch.context() as without:
        without.setattr("asr_kd.corpus.espeak_is_installed", lambda: False)
        without.setattr("asr_kd.g2p.EspeakG2P", refuse)
        assert "ZORB" not in prepare().lexicon
    assert "ZORB" in prepare().lexicon


def test_words_are_left_without_pronunciation_where_none_are_generated(tmp_path: Path) -> None:
    arpa, lexicon = tmp_path / "lm.arpa", lexicon_file(tmp_path)
    write_arpa(estimate_kneser_ney([("THE", "CAT", "ZORB")], 2), arpa)
    text, _ = prepare_text(settings_of(tmp_path, unknown_words="exclude"), corpus_of("THE CAT", "THE ZORB"), [lexicon], arpa, None)
    assert text.lexicon == read_lexicon(lexicon)


def test_lower_case_transcripts_beside_an_upper_case_lexicon_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"the transcripts of train: 2 of 2 words .* differ in case"):
        prepare_text(settings_of(tmp_path), corpus_of("the cat", "the sat"), [lexicon_file(tmp_path)], None, None)


def test_a_small_split_in_another_case_is_an_error(tmp_path: Path) -> None:
    corpus = corpus_of("THE CAT", "SAT")
    spoken = [Utterance("d", 1.0, tmp_path / "d.wav", "d", ("the", "cat"))]
    corpus = replace(corpus, splits={**corpus.splits, "dev": spoken})
    with pytest.raises(AsrKdError, match=r"the transcripts of dev: 2 of 2 words .* differ in case"):
        prepare_text(settings_of(tmp_path), corpus, [lexicon_file(tmp_path)], None, None)


def test_words_that_case_or_punctuation_keeps_apart_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_text(settings_of(tmp_path), corpus_of("THE CAT SAT, sat", "THE CAT"), [lexicon_file(tmp_path)], None, None)
    assert "train: 2 words of the transcripts, such as 'SAT,', are in the lexicon but for case or punctuation" in caplog.text
    assert "dev:" not in caplog.text


def test_words_of_a_reported_split_that_can_never_be_recognised_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_text(settings_of(tmp_path, unknown_words="exclude"), corpus_of("THE CAT", "THE CAT SAT ZORB"), [lexicon_file(tmp_path)], None, None)
    assert "dev: 2 of 4 words (50 %) are not in the lexicon and the language model, and can never be recognised" in caplog.text


def test_a_recording_that_is_trained_on_is_not_reported_and_known_speakers_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_manifests(tmp_path)
    whole = (tmp_path / "dev.csv").read_text()
    (tmp_path / "dev.csv").write_text(whole.replace(",d,", ",a,"))
    prepare_corpus(settings_of(tmp_path), tmp_path)
    assert "dev: speakers a are in the training splits too" in caplog.text
    (tmp_path / "dev.csv").write_text(whole.replace("dev-d.wav", "train-a.wav"))
    with pytest.raises(AsrKdError, match=r"train-a\.wav: dev-d of dev and train-a of the training splits, expected speech that was not trained on"):
        prepare_corpus(settings_of(tmp_path), tmp_path)


def test_too_few_states_for_the_phones_are_an_error_before_any_feature(tmp_path: Path) -> None:
    settings = replace(settings_of(tmp_path), num_states=100)
    with pytest.raises(AsrKdError, match=f"num_states: got 100, expected at least {3 * 40} .three for each of 40 phones.; raise it"):
        prepare_text(settings, corpus_of("THE CAT", "THE CAT"), [lexicon_file(tmp_path)], None, None)


@pytest.mark.parametrize("word", ["<eps>", "#0", "A\0"])
def test_reserved_words_of_a_transcript_are_an_error_before_any_training(tmp_path: Path, word: str) -> None:
    with pytest.raises(AsrKdError, match=r"language model: sentence 1 is .*, expected words, not the reserved"):
        prepare_text(settings_of(tmp_path), corpus_of(f"THE {word}", "THE CAT"), [lexicon_file(tmp_path)], None, None)
