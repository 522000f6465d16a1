"""Manifests that notice changed audio, and a vocabulary that the reported splits do not extend."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.corpus import Corpus, prepare_corpus, prepare_text
from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak_is_installed
from asr_kd.lexicon import read_lexicon
from asr_kd.lm import estimate_kneser_ney, read_vocabulary, write_arpa
from asr_kd.manifest import Utterance
from asr_kd.settings import Settings
from asr_kd.stage import file_fingerprint

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
    assert prepare_corpus(settings, tmp_path)[0].fingerprint == first.fingerprint
    soundfile.write(tmp_path / "train-c.wav", np.zeros(1600), 16000)
    repaired, _ = prepare_corpus(settings, tmp_path)
    assert [u.utt_id for u in repaired.splits["train"]] == ["train-a", "train-b", "train-c", "train-e"]
    longer = audio.read_bytes() + bytes(2)
    audio.write_bytes(longer)
    replaced, _ = prepare_corpus(settings, tmp_path)
    os.utime(audio, ns=(0, audio.stat().st_mtime_ns + 1))
    touched, _ = prepare_corpus(settings, tmp_path)
    assert len({corpus.fingerprint for corpus in (first, repaired, replaced, touched)}) == 4


def test_the_fingerprint_of_a_librispeech_folder_stays_what_finished_runs_recorded(tmp_path: Path) -> None:
    for spk in "abc":
        chapter = tmp_path / "train" / spk / "7"
        chapter.mkdir(parents=True)
        (chapter / f"{spk}-7.trans.txt").write_text(f"{spk}-7-0 A B\n")
        soundfile.write(chapter / f"{spk}-7-0.wav", np.zeros(1600), 16000)
    _, record = prepare_corpus(Settings(output_folder=str(tmp_path / "out"), data_folder=str(tmp_path), train_splits=["train"]), tmp_path)
    assert record.inputs == {"train": "22289d669da14e0c"}


def corpus_of(train: str, dev: str) -> Corpus:
    splits = {name: [Utterance(name, 1.0, Path("x.wav"), "s", tuple(text.split()))] for name, text in (("train", train), ("dev", dev))}
    return Corpus(splits, ["train"], [], ["dev"], Path("."), "manifests")


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


def test_a_language_model_that_the_lexicon_covers_changes_no_fingerprint(tmp_path: Path) -> None:
    arpa, lexicon = tmp_path / "lm.arpa", lexicon_file(tmp_path)
    write_arpa(estimate_kneser_ney([("THE", "CAT", "SAT")], 2), arpa)
    _, record = prepare_text(settings_of(tmp_path, unknown_words="g2p"), corpus_of("THE CAT", "THE SAT"), [lexicon], arpa, None)
    assert record.inputs == {"manifests": "manifests", "lexicon 0": file_fingerprint(lexicon), "lm": file_fingerprint(arpa)}
    assert (tmp_path / "out" / "text" / "lexicon_generated.txt").read_text() == ""
    lexicon_file(tmp_path, "THE CAT")
    _, lacking = prepare_text(settings_of(tmp_path, unknown_words="g2p"), corpus_of("THE CAT", "THE CAT"), [lexicon], arpa, None)
    assert "lm_words" in lacking.inputs


def test_words_are_left_without_pronunciation_where_none_are_generated(tmp_path: Path) -> None:
    arpa, lexicon = tmp_path / "lm.arpa", lexicon_file(tmp_path)
    write_arpa(estimate_kneser_ney([("THE", "CAT", "ZORB")], 2), arpa)
    text, record = prepare_text(settings_of(tmp_path, unknown_words="exclude"), corpus_of("THE CAT", "THE ZORB"), [lexicon], arpa, None)
    assert text.lexicon == read_lexicon(lexicon)
    assert "lm_words" not in record.inputs


def test_lower_case_transcripts_beside_an_upper_case_lexicon_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"the transcripts: 3 of 3 words .* differ in case"):
        prepare_text(settings_of(tmp_path), corpus_of("the cat", "the sat"), [lexicon_file(tmp_path)], None, None)
