"""The synthetic corpus: the same for the same seed, splits that share no voice and no sentence, and times that are true."""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak, espeak_is_installed
from asr_kd.lexicon import read_lexicon
from asr_kd.manifest import librispeech_utterances
from asr_kd.synthetic import SyntheticCorpus, make_corpus, read_ctm
from asr_kd.synthetic.acoustics import SAMPLE_RATE, SNR_SPREAD_DB, Room, noise, record, resample
from asr_kd.synthetic.corpus import _parts, _tasks
from asr_kd.synthetic.grammar import distinct_sentences, vocabulary
from asr_kd.synthetic.times import true_times
from asr_kd.synthetic.voices import FEMALE, MALE, draw_speakers

needs_espeak = pytest.mark.skipif(not espeak_is_installed(), reason="espeakng-loader is not installed (extra: demo)")
MINUTES = {"train": 0.5, "dev": 0.2, "test": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpus:
    return make_corpus(tmp_path_factory.mktemp("synthetic") / "corpus", minutes=MINUTES, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "record.json")  # holds the seconds it took
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@needs_espeak
def test_same_seed_gives_the_same_bytes_whatever_was_cut_off(corpus: SyntheticCorpus, tmp_path: Path) -> None:
    wanted = digests(corpus.data_folder)
    again = tmp_path / "again"
    make_corpus(again, minutes=MINUTES, seed=3, num_jobs=2)
    assert digests(again) == wanted

    # as a kill -9 would leave it: started but not recorded, one speaker missing, another half written
    record_values = json.loads((again / "record.json").read_text())
    (again / "started.json").write_text(json.dumps({key: record_values[key] for key in ("stage", "settings", "inputs", "version", "seconds")}))
    (again / "record.json").unlink()
    (again / "lm_text.txt").unlink()
    shutil.rmtree(next((again / "dev").iterdir()))
    (again / "test" / ".part-007-1" / "1").mkdir(parents=True)
    kept = next((again / "train").glob("*/1/*.flac"))
    before = kept.stat().st_mtime_ns
    make_corpus(again, minutes=MINUTES, seed=3)
    assert digests(again) == wanted
    assert kept.stat().st_mtime_ns == before


@needs_espeak
def test_a_breathy_voice_does_not_depend_on_the_clock() -> None:
    program = (
        "from asr_kd.espeak import espeak; from hashlib import sha256\n"
        "espeak().set_voice('en-us+f2'); print(sha256(espeak().speak(('outside', 'summer'), 150, 50).samples.tobytes()).hexdigest())"
    )
    said = set()
    for _ in range(2):
        said.add(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        time.sleep(1.01)  # espeak's own seed is the second of the clock
    assert len(said) == 1


@needs_espeak
def test_another_seed_gives_other_speech(corpus: SyntheticCorpus, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", minutes={"train": 0.1}, seed=4)
    assert not set(digests(other.data_folder).values()) & set(digests(corpus.data_folder / "train").values())


@needs_espeak
def test_layout_and_amount(corpus: SyntheticCorpus) -> None:
    for split, minutes in MINUTES.items():
        utterances, exclusions = librispeech_utterances(corpus.data_folder / split)
        assert exclusions == []
        assert 0.95 * minutes * 60 < sum(utterance.duration_s for utterance in utterances) < 1.05 * minutes * 60 + 2 * 7
        assert {soundfile.info(utterance.wav).samplerate for utterance in utterances} == {SAMPLE_RATE}
    table = [line.split(" | ") for line in (corpus.data_folder / "SPEAKERS.TXT").read_text().splitlines()[1:]]
    assert {(split, spk_id) for spk_id, _, split, _, _ in table} == {(path.parent.name, path.name) for path in corpus.data_folder.glob("*/???")}


@needs_espeak
def test_splits_share_no_voice_and_no_sentence(corpus: SyntheticCorpus) -> None:
    table = [line.split(" | ") for line in (corpus.data_folder / "SPEAKERS.TXT").read_text().splitlines()[1:]]
    variants = {split: {row[4].split("+")[1] for row in table if row[2] == split} for split in MINUTES}
    said = {split: {utterance.words for utterance in librispeech_utterances(corpus.data_folder / split)[0]} for split in MINUTES}
    for one, other in itertools.combinations(MINUTES, 2):
        assert not variants[one] & variants[other]
        assert not said[one] & said[other]
    text = {tuple(line.split()) for line in corpus.lm_text.read_text().splitlines()}
    assert len(text) == 20_000
    assert not text & (said["dev"] | said["test"])


@needs_espeak
def test_lexicon_covers_grammar_and_what_was_spoken(corpus: SyntheticCorpus) -> None:
    lexicon = read_lexicon(corpus.lexicon)
    assert lexicon.missing(vocabulary()) == []
    assert 40 <= len(lexicon.phones) <= 50
    known = total = 0
    for split in MINUTES:
        phones = read_ctm(corpus.phone_times(split))
        for utt_id, words in read_ctm(corpus.word_times(split)).items():
            for word in words:
                inside = tuple(p.label for p in phones[utt_id] if word.start_s - 1e-3 < p.start_s and p.end_s < word.end_s + 1e-3)
                known += inside in lexicon[word.label]
                total += 1
    assert known > 0.95 * total  # what is left out is rarer than one in twenty of its word


@needs_espeak
def test_times_are_ordered_and_inside_the_audio(corpus: SyntheticCorpus) -> None:
    for split in MINUTES:
        utterances, _ = librispeech_utterances(corpus.data_folder / split)
        words, phones = read_ctm(corpus.word_times(split)), read_ctm(corpus.phone_times(split))
        assert words.keys() == phones.keys() == {utterance.utt_id for utterance in utterances}
        for utterance in utterances:
            assert tuple(word.label for word in words[utterance.utt_id]) == utterance.words
            for times in (words[utterance.utt_id], phones[utterance.utt_id]):
                assert times[0].start_s >= 0.149
                assert times[-1].end_s <= utterance.duration_s - 0.14
                assert all(time.duration_s > 0 for time in times)
                assert all(after.start_s >= before.end_s - 2e-4 for before, after in itertools.pairwise(times))


@needs_espeak
def test_true_word_starts_agree_with_energy_onsets_after_silence() -> None:
    """Each word follows a pause: silence up to its start, then sound within 5 ms, or after the closure that belongs to a consonant."""
    closures_ms = {"apple": 5, "man": 5, "river": 5, "lamp": 5, "water": 5, "yellow": 5, "uncle": 5, "sheep": 20, "dog": 20, "people": 65, "table": 65}
    for voice in ("en-us", "en-gb-scotland+m3", "en-029+linda"):
        espeak().set_voice(voice)
        words = tuple(closures_ms)
        speech = espeak().speak(words, 150, 50, pause_after=frozenset(range(len(words) - 1)))
        timed, _ = true_times(words, speech, lead_in_s=0.0)
        loud = np.abs(speech.samples.astype(float)) > 0.02 * speech.peak
        for word in timed[1:]:
            start = round(word.start_s * speech.sample_rate)
            assert not loud[start - 1300 : start - 22].any()
            assert np.argmax(loud[start:]) / speech.sample_rate * 1e3 < closures_ms[word.label]


@needs_espeak
def test_pairs_that_espeak_reads_as_one_word_have_times_of_their_own() -> None:
    espeak().set_voice("en-us")
    words = tuple("the end of the day in the house for a man".split())  # noqa: SIM905
    assert len(espeak().speak(words, 170, 50).word_starts) == len(words)


@needs_espeak
def test_many_changes_of_voice_lose_no_event() -> None:
    for _ in range(100):
        espeak().set_voice("en")
    assert espeak().speak(("one", "man"), 170, 50).word_starts[0] == 0


@needs_espeak
def test_a_vowel_after_a_nasal_begins_where_the_nasal_ends() -> None:
    """espeak has the event of "apple" in "an apple" at the beginning of the n."""
    espeak().set_voice("en-us")
    speech = espeak().speak(("an", "apple"), 150, 50)
    timed, _ = true_times(("an", "apple"), speech, lead_in_s=0.0)
    nasal, vowel = (phone.start_sample / speech.sample_rate for phone in speech.phones[1:3])
    assert nasal + 0.03 < timed[1].start_s < vowel
    spectra = [np.abs(np.fft.rfft(speech.samples[int((timed[1].start_s + shift) * speech.sample_rate) :][:200])) for shift in (-0.012, 0.003)]
    high = [spectrum[20:40].sum() for spectrum in spectra]  # 2.2 to 4.4 kHz: weak in the nasal
    assert high[1] > 1.5 * high[0]


@needs_espeak
def test_words_that_espeak_takes_apart_are_refused() -> None:
    espeak().set_voice("en-us")
    with pytest.raises(AsrKdError, match="word events for 2 words in 'a a, b'"):
        espeak().speak(("a", "a, b"), 170, 50)


@needs_espeak
def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AsrKdError, match="holds files that no stage wrote"):
        make_corpus(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@needs_espeak
def test_failure_in_a_speaking_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr_kd.synthetic.voices.ACCENTS", ("xx-nowhere",))
    with pytest.raises(AsrKdError, match=r"speaking train 001 to 002 failed \(espeak-ng: no voice 'xx-nowhere"):
        make_corpus(tmp_path / "corpus", minutes={"train": 0.1})


@needs_espeak
def test_script(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "data_prep" / "synthetic.py"
    arguments = [sys.executable, str(script), str(tmp_path / "corpus"), "--minutes", "train=0"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a positive number for each split" in done.stderr


def test_without_espeak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("asr_kd.espeak.espeak_is_installed", lambda: False)
    espeak.cache_clear()
    with pytest.raises(AsrKdError, match=r"pip install 'asr-kd\[demo\]'"):
        make_corpus(tmp_path / "corpus")


def test_malformed_times_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.ctm").write_text("u 1 0.0 0.1 A\nu 1 0.0\n")
    with pytest.raises(AsrKdError, match=r"a.ctm:2: 'u 1 0.0' is no CTM line"):
        read_ctm(tmp_path / "a.ctm")


def test_sentences_have_varied_lengths_and_known_words() -> None:
    sentences = distinct_sentences(np.random.default_rng(0), 5000, set())
    lengths = {len(words) for words in sentences}
    assert (min(lengths), max(lengths)) == (3, 12)
    assert {word for words in sentences for word in words} <= set(vocabulary())
    assert 300 <= len(vocabulary()) <= 600
    assert not any(a == "A" and b[0] in "AEIOU" for words in sentences for a, b in itertools.pairwise(words))


@settings(deadline=None, max_examples=20)
@given(numbers=st.tuples(st.integers(2, 120), st.integers(2, 20), st.integers(2, 20)), seed=st.integers(0, 5))
def test_speakers_of_splits_are_different_voices(numbers: tuple[int, int, int], seed: int) -> None:
    wanted = dict(zip(MINUTES, numbers, strict=True))
    speakers = draw_speakers(wanted, np.random.default_rng(seed))
    assert {split: len(drawn) for split, drawn in speakers.items()} == wanted
    variants = [{speaker.voice.split("+")[1] for speaker in drawn} for drawn in speakers.values()]
    assert sum(map(len, variants)) == len(set().union(*variants)) <= len(FEMALE + MALE)
    ids = [speaker.spk_id for drawn in speakers.values() for speaker in drawn]
    assert len(set(ids)) == len(ids)
    assert all({speaker.sex for speaker in drawn[:8]} == {"F", "M"} for drawn in speakers.values() if len(drawn) >= 8)


def test_parts_do_not_depend_on_anything_but_the_tasks() -> None:
    speakers = draw_speakers({"train": 14}, np.random.default_rng(0))["train"]
    tasks = _tasks("train", speakers, 14 * 40.0, 0, (5.0, 20.0), np.random.default_rng(0), set())
    assert [len(part) for part in _parts(tasks)] == [6, 6, 2]


def test_resampling_keeps_time_and_amplitude_of_a_tone() -> None:
    seconds = np.arange(22050) / 22050
    window = np.hanning(22050)
    resampled = resample(np.sin(2 * np.pi * 440 * seconds) * window, 22050)
    wanted = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * np.interp(np.arange(16000) / 16000, seconds, window)
    assert resampled.shape == (16000,)
    np.testing.assert_allclose(resampled, wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ["white", "pink", "babble"])
def test_noise_has_unit_power_and_its_colour(kind: str) -> None:
    rng = np.random.default_rng(0)
    drawn = noise(kind, 50_000, np.sin(np.arange(7000) / 5), rng)
    assert np.mean(drawn**2) == pytest.approx(1.0)
    power = np.abs(np.fft.rfft(drawn)) ** 2
    octave_ratio = power[3125:6250].mean() / power[6250:12500].mean()  # 1-2 kHz over 2-4 kHz
    assert octave_ratio == pytest.approx({"white": 1.0, "pink": 2.0}.get(kind, octave_ratio), rel=0.1)


def test_recording_does_not_delay_and_keeps_the_ratio_of_speech_to_noise() -> None:
    rng = np.random.default_rng(0)
    speech = np.zeros(32_000)
    speech[8000:24_000] = rng.standard_normal(16_000) * 1000
    room = Room(tilt_db=3.0, bump_db=-3.0, bump_at=0.3, corner_hz=100.0, noise="white", snr_db=20.0)
    samples = record(speech, room, np.ones(10), np.random.default_rng(1)).astype(float)
    before, during = np.mean(samples[500:7900] ** 2), np.mean(samples[8100:23_900] ** 2)
    assert 10 * np.log10(during / before) == pytest.approx(20.0, abs=SNR_SPREAD_DB + 0.5)
    lags = range(-3, 4)
    assert max(lags, key=lambda lag: float(np.dot(np.roll(speech, lag), samples))) == 0
