"""A recogniser of tones, small enough to train here, as a bundle; its files, and its use on audio of every kind."""

from __future__ import annotations

import doctest
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from asr_kd import normalisation
from asr_kd.bundle import BUNDLE, InputSettings, load_bundle, save_bundle, transcribe
from asr_kd.cli import main
from asr_kd.const_fst import ARC, map_const_fst
from asr_kd.decode import DecodeSettings
from asr_kd.errors import AsrKdError
from asr_kd.features import FbankOptions, Windows, extract_features, fbank
from asr_kd.frame_data import load_frame_data
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.graph import build_graph
from asr_kd.hmm.model import untied_model
from asr_kd.lexicon import Lexicon
from asr_kd.lm import estimate_kneser_ney, write_arpa
from asr_kd.manifest import Utterance
from asr_kd.model import AcousticModel, ModelShape
from asr_kd.normalisation import LevelSums, MeanNormalisation, choose_pseudo_count, log_posteriors, make_normalisation, raw_features
from asr_kd.segments import MAX_SEGMENT_S, MIN_SEGMENT_S, quietest_sample, read_segments
from asr_kd.stage import file_fingerprint, read_json, write_json

RATE = 16000
TONES_HZ = {"A": 300.0, "B": 700.0, "D": 1200.0, "O": 2000.0, "S": 3300.0}
LEXICON = Lexicon({"BA": (("B", "A"),), "DO": (("D", "O"),), "SO": (("S", "O"),), "SAD": (("S", "A", "D"),)})
SENTENCES = [("BA", "DO"), ("SO", "SAD", "BA"), ("DO", "SO"), ("SAD", "DO", "BA"), ("BA", "SO", "DO"), ("SAD",), ("SO", "BA")]
OPTIONS = FbankOptions(num_mels=20)
LEFT, RIGHT = 3, 2
PHONE_S, PAUSE_S = 0.12, 0.15


def say(words, rate=RATE, gain=0.3, seed=0):
    """Waveform of words, each phone a tone, with pauses of faint noise around and between."""
    generator = np.random.default_rng(seed)
    parts = [np.zeros(round(PAUSE_S * rate))]
    for word in words:
        parts += [np.sin(2 * np.pi * TONES_HZ[phone] * np.arange(round(PHONE_S * rate)) / rate) for phone in LEXICON[word][0]]
        parts.append(np.zeros(round(PAUSE_S * rate)))
    samples = np.concatenate(parts)
    return (gain * (samples + 0.003 * generator.standard_normal(len(samples)))).astype(np.float32)


def states_of(words, hmm, num_frames):
    """State of each frame by the frame's middle: a phone's three states take a third of its time each."""
    spans, at = [], PAUSE_S
    for word in words:
        for phone in LEXICON[word][0]:
            spans.append((at, phone))
            at += PHONE_S
        at += PAUSE_S
    states = np.zeros(num_frames, np.int32)
    for frame in range(num_frames):
        time_s = 0.01 * frame + 0.0125
        states[frame] = frame % 3  # silence, id 1: its three states
        for start, phone in spans:
            if start <= time_s < start + PHONE_S:
                states[frame] = 3 * hmm.phones.index(phone) + min(2, int(3 * (time_s - start) / PHONE_S))
    return states


class Tones:
    """Corpus, features, targets, network and graph of the toy task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hmm = untied_model(("SIL", *LEXICON.phones))
        self.words = {f"{speaker}-{i}": words for speaker in ("loud", "soft") for i, words in enumerate(SENTENCES)}
        self.store = self.features()
        with FrameWriter(folder / "targets", (), np.int32) as writer:
            for utt_id, words in self.words.items():
                writer.append(utt_id, states_of(words, self.hmm, self.store.length(utt_id)))
        self.targets = FrameStore(folder / "targets")
        self.model = self.train()
        write_arpa(estimate_kneser_ney(SENTENCES, order=2), folder / "lm.arpa")
        build_graph(LEXICON, folder / "lm.arpa", self.hmm, folder / "graph")
        self.inputs = InputSettings(OPTIONS, LEFT, RIGHT, make_normalisation("speaker", [self.store], 50.0))
        self.bundle = self.save(folder / "bundle")

    def features(self):
        utterances = []
        for utt_id, words in self.words.items():
            speaker, number = utt_id.split("-")
            path = self.folder / f"{utt_id}.wav"
            samples = say(words, gain=0.6 if speaker == "loud" else 0.05, seed=int(number))
            soundfile.write(path, samples, RATE)
            utterances.append(Utterance(utt_id, len(samples) / RATE, path, speaker, words))
        extract_features(utterances, self.folder / "features", OPTIONS)
        return FrameStore(self.folder / "features")

    def train(self):
        data = load_frame_data(self.store, self.targets, self.store.utt_ids, LEFT, RIGHT, torch.device("cpu"))
        inputs, states = data.windows.gather(torch.arange(data.num_frames)), data.targets.long()
        model = AcousticModel(ModelShape(inputs.shape[1], 1, 48, self.hmm.num_states), seed=1)
        model.input_mean.copy_(inputs.mean(0))
        model.input_scale.copy_(1 / inputs.std(0))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(120):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), states).backward()
            optimizer.step()
        return model

    def save(self, folder, **changes):
        parts = {"model": self.model, "hmm": self.hmm, "lexicon": LEXICON, "graph_folder": self.folder / "graph", "inputs": self.inputs,
                 "decoding": DecodeSettings(acoustic_scale=0.5)}
        save_bundle(folder, **(parts | changes))
        return folder


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return Tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def bundle(tones):
    return load_bundle(tones.bundle)


# -- use -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "channels", "gain", "name"), [
    (16000, 1, 0.3, "plain.wav"), (44100, 2, 0.3, "stereo.flac"), (8000, 1, 0.3, "telephone.wav"), (48000, 1, 0.02, "soft.flac"), (22050, 2, 0.9, "loud.aiff")])
def test_any_file_of_any_speaker(bundle, tmp_path, rate, channels, gain, name):
    words = ("SAD", "BA", "DO", "SO", "BA")
    samples = say(words, rate, gain, seed=9)
    soundfile.write(tmp_path / name, np.stack([samples] * channels, axis=1), rate)
    assert transcribe(bundle, tmp_path / name) == words


def test_low_sample_rate_is_told(bundle, tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", say(("BA",), 8000), 8000)
    transcribe(bundle, tmp_path / "a.wav")
    assert "a.wav: 8000 Hz, the model was trained at 16000 Hz" in caplog.text


def test_long_file_is_cut_and_nothing_is_lost(bundle, tmp_path):
    words = tuple(word for number in range(60) for word in SENTENCES[number % len(SENTENCES)])
    samples = say(words)
    assert len(samples) > 1.3 * MAX_SEGMENT_S * RATE
    soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="FLOAT")
    segments = list(read_segments(tmp_path / "long.wav"))
    assert len(segments) > 1
    assert all(MIN_SEGMENT_S * RATE <= len(segment) <= MAX_SEGMENT_S * RATE for segment in segments[:-1])
    assert np.array_equal(np.concatenate(segments), samples)
    assert transcribe(bundle, tmp_path / "long.wav") == words


def test_short_file_is_one_segment(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(int(MAX_SEGMENT_S * 8000)), 8000)
    assert [len(segment) for segment in read_segments(tmp_path / "a.wav", 8000)] == [MAX_SEGMENT_S * 8000]


def test_lossy_compression_is_read_in_blocks_too(tmp_path):
    """Vorbis takes what the ear does not hear, and so what the bands between these tones hold: samples are compared, not words."""
    samples = say(("BA", "DO") * 15)
    soundfile.write(tmp_path / "a.ogg", np.stack([samples, samples], axis=1), RATE)
    (segment,) = read_segments(tmp_path / "a.ogg")
    assert len(segment) == len(samples)
    assert np.corrcoef(segment, samples)[0, 1] > 0.99


def test_cut_lies_in_the_pause():
    samples = np.random.default_rng(0).standard_normal(8000 * 3).astype(np.float32)
    samples[10000:11600] *= 0.01
    assert quietest_sample(samples, 8000) == 10800


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "no such audio file"),
    (lambda path: path.write_text("not audio"), "not readable as audio"),
    (lambda path: soundfile.write(path, np.zeros(0), RATE), "no samples"),
    (lambda path: soundfile.write(path, np.zeros(300), RATE), "shorter than one window of 25 ms"),
    (lambda path: soundfile.write(path, np.full(RATE, np.nan), RATE, subtype="FLOAT"), "NaN or infinity"),
])
def test_files_that_hold_no_speech(bundle, tmp_path, make, message):
    make(tmp_path / "a.wav")
    with pytest.raises(AsrKdError, match=f"a.wav: .*{message}") as caught:
        transcribe(bundle, tmp_path / "a.wav")
    assert "\n" not in str(caught.value)


def test_file_cut_off_in_the_middle(bundle, tmp_path):
    soundfile.write(tmp_path / "a.flac", say(("BA", "DO") * 30, seed=3), RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(AsrKdError, match=r"a\.flac: not readable as audio to its end"):
        transcribe(bundle, tmp_path / "a.flac")


def test_bad_files_do_not_keep_the_others_from_being_transcribed(tones, tmp_path, capsys):
    good, missing, text = tones.folder / "loud-1.wav", tmp_path / "missing.wav", tmp_path / "text.wav"
    text.write_text("not audio")
    with pytest.raises(SystemExit) as stop:
        main(["transcribe", str(tones.bundle), str(good), str(missing), str(text), str(good)])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == 2 * f"{good}\t{' '.join(SENTENCES[1])}\n"
    errors = [line for line in err.splitlines() if line.startswith("asr-kd: ")]
    assert [line.split(":")[1].strip() for line in errors[:2]] == [str(missing), str(text)]
    assert errors[2:] == ["asr-kd: 2 of 4 files were not transcribed, see above"]
    assert "Traceback" not in err


def test_one_bad_file_is_one_line(tones, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["transcribe", str(tones.bundle), str(tmp_path / "missing.wav")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"asr-kd: {tmp_path}/missing.wav: no such audio file; check the path"


def test_headerless_audio_is_one_line(tones, tmp_path, capsys):
    (tmp_path / "a.raw").write_bytes(bytes(3200))
    with pytest.raises(SystemExit) as stop:
        main(["transcribe", str(tones.bundle), str(tmp_path / "a.raw")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"asr-kd: {tmp_path}/a.raw: not readable as audio (")


# -- the folder ----------------------------------------------------------------------------------------------------------


def test_round_trip(tones, bundle):
    assert bundle.inputs == tones.inputs
    assert bundle.lexicon.pronunciations == LEXICON.pronunciations
    windows = Windows(tones.store, left=LEFT, right=RIGHT)
    for utt_id in list(tones.store)[:3]:
        expected = tones.model(windows.utterance(utt_id)).log_softmax(-1).detach().numpy()
        np.testing.assert_allclose(bundle.log_posteriors(tones.store[utt_id]), expected, atol=1e-5)


def test_bundle_stands_alone(tones, tmp_path):
    """Moved elsewhere, with the run it came from gone."""
    shutil.copytree(tones.folder / "graph", tmp_path / "run" / "graph")
    tones.save(tmp_path / "run" / "bundle", graph_folder=tmp_path / "run" / "graph")
    shutil.move(tmp_path / "run" / "bundle", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run")
    assert transcribe(load_bundle(tmp_path / "moved"), tones.folder / "loud-1.wav") == SENTENCES[1]


def test_graph_by_reference(tones, tmp_path):
    shutil.copytree(tones.folder / "graph", tmp_path / "run" / "graph")
    tones.save(tmp_path / "run" / "student" / "bundle", graph_folder=tmp_path / "run" / "graph", copy_graph=False)
    assert not (tmp_path / "run" / "student" / "bundle" / "graph").exists()
    assert read_json(tmp_path / "run" / "student" / "bundle" / BUNDLE)["graph"] == "../../graph"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert transcribe(load_bundle(tmp_path / "moved" / "student" / "bundle"), tones.folder / "loud-1.wav") == SENTENCES[1]


@pytest.mark.parametrize("name", ["model.safetensors", "hmm.json", "hmm.safetensors", "lexicon.txt", "graph/HCLG.fst", "graph/words.txt", "graph/graph.json"])
def test_changed_or_missing_file_is_refused(tones, tmp_path, name):
    folder = tmp_path / "bundle"
    shutil.copytree(tones.bundle, folder, copy_function=shutil.copyfile)  # no hard links: the originals must stay
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(AsrKdError, match=f"{name}: fingerprint"):
        load_bundle(folder)
    os.remove(folder / name)
    with pytest.raises(AsrKdError, match=f"{name}: could not be read"):
        load_bundle(folder)


@pytest.mark.parametrize(("name", "value"), [("ilabel", 99), ("ilabel", -1), ("olabel", 99), ("next_state", 10**6)])
def test_a_graph_that_leads_nowhere_is_refused(tones, tmp_path, name, value):
    """Its sender gave the fingerprints too; the search would end the process."""
    folder = tmp_path / "bundle"
    shutil.copytree(tones.bundle, folder, copy_function=shutil.copyfile)
    path = folder / "graph" / "HCLG.fst"
    states, content = len(map_const_fst(path).states), bytearray(path.read_bytes())
    arcs = np.frombuffer(content, ARC, offset=len(content) - len(map_const_fst(path).arcs) * ARC.itemsize)
    arcs.flags.writeable = True
    assert states < 10**6
    arcs[name][3] = value
    path.write_bytes(content)
    notes = read_json(folder / BUNDLE)
    notes["files"]["graph/HCLG.fst"] = file_fingerprint(path)
    write_json(folder / BUNDLE, notes)
    with pytest.raises(AsrKdError, match=r"HCLG\.fst: labels, states or weights out of range"):
        load_bundle(folder)


def test_a_search_without_an_end_is_told(bundle, tones, tmp_path, caplog):
    narrow = replace(bundle, decoder=SimpleNamespace(decode=lambda *_: SimpleNamespace(words=("BA",), reached_final=False)))
    assert transcribe(narrow, tones.folder / "loud-1.wav") == ("BA",)
    assert "loud-1.wav: in 1 of 1 segments the search ended in no final state" in caplog.text


def test_no_bundle_and_other_format(tones, tmp_path):
    with pytest.raises(AsrKdError, match=r"no bundle\.json here"):
        load_bundle(tmp_path)
    write_json(tmp_path / BUNDLE, read_json(tones.bundle / BUNDLE) | {"format": 99})
    with pytest.raises(AsrKdError, match="format 99, expected 2"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("spoil", [lambda notes: notes.pop("files"), lambda notes: notes["decoding"].update(beams=3), lambda notes: notes.update(inputs=[]),
                                   lambda notes: notes["inputs"].update(left="many")])
def test_damaged_description(tones, tmp_path, spoil):
    notes = read_json(tones.bundle / BUNDLE)
    spoil(notes)
    write_json(tmp_path / BUNDLE, notes)
    with pytest.raises(AsrKdError, match=r"bundle\.json: not what asr_kd writes"):
        load_bundle(tmp_path)


def test_parts_of_different_runs_are_refused(tones, tmp_path):
    other = AcousticModel(ModelShape(tones.inputs.dim, 1, 8, 7))
    with pytest.raises(AsrKdError, match="7 states in the network, 18 in the HMM, 18 in the graph"):
        tones.save(tmp_path / "a", model=other)
    narrow = InputSettings(OPTIONS, LEFT, RIGHT + 1, tones.inputs.normalisation)
    with pytest.raises(AsrKdError, match="the network takes 120 inputs, the features make 140"):
        tones.save(tmp_path / "b", inputs=narrow)
    assert not (tmp_path / "b" / BUNDLE).exists()


# -- mean normalisation --------------------------------------------------------------------------------------------------


def test_shrunk_mean_and_its_limits():
    assert doctest.testmod(normalisation).failed == 0
    frames = np.random.default_rng(0).normal(3, 1, (40, 2))
    prior = (1.0, -1.0)
    by_hand = (60 * np.array(prior) + frames.sum(0)) / 100
    np.testing.assert_allclose(frames - MeanNormalisation(prior, 60.0)(frames), np.broadcast_to(by_hand, (40, 2)), atol=1e-6)
    np.testing.assert_allclose(MeanNormalisation(prior, 0.0).mean(frames.sum(0), 40), frames.mean(0))
    assert MeanNormalisation(prior, math.inf).mean(frames.sum(0), 40).tolist() == list(prior)


def test_of_quiet_frames_as_many_count_as_in_training():
    rng = np.random.default_rng(0)
    loud, quiet = rng.normal(2, 0.3, (80, 3)), rng.normal(-6, 0.3, (200, 3))
    levels = LevelSums(3).add(loud).add(quiet[:50]).add(quiet[50:])
    assert (len(levels), levels.num_loud()) == (280, 80)
    total, number = levels.counted(0.8)
    assert number == 100
    loudest = quiet[np.argsort(-np.exp(quiet).sum(1))[:20]]
    np.testing.assert_allclose(total, loud.sum(0) + loudest.sum(0), atol=20 * normalisation.LEVEL_STEP)  # of one level those that come
    np.testing.assert_allclose(LevelSums(3).add(loud).add(quiet[:10]).counted(0.8)[0], loud.sum(0) + quiet[:10].sum(0))  # fewer than in training: all
    zeros = np.full((500, 3), np.log(np.finfo(np.float32).eps))
    np.testing.assert_allclose(levels.add(zeros).counted(0.8)[0], total)
    assert LevelSums(3).add(zeros).counted(0.8)[1] == 500


def test_share_of_loud_frames_by_hand(tones):
    loud = total = 0
    for utt_id in tones.words:
        level = np.log(np.exp(raw_features(tones.store, utt_id)).mean(1))
        top = np.sort(level)[-max(1, min(50, len(level) // 4))]
        loud, total = loud + (level > top - 6.0).sum(), total + len(level)
    assert tones.inputs.normalisation.loud_share == pytest.approx(loud / total, abs=0.02)
    assert 0.2 < tones.inputs.normalisation.loud_share < 0.9


@pytest.mark.parametrize("cmvn", ["speaker", "utterance", "corpus", "none"])
def test_every_way_of_normalising_has_a_share_of_loud_frames(tones, tmp_path, cmvn):
    utterances = [Utterance(utt_id, 1.0, tones.folder / f"{utt_id}.wav", "s", ("A",)) for utt_id in tones.words]
    extract_features(utterances, tmp_path / "features", OPTIONS, cmvn)
    store = FrameStore(tmp_path / "features")
    expected = 1.0 if cmvn == "none" else pytest.approx(normalisation.loud_share([tones.store]), abs=0.02)
    assert make_normalisation(cmvn, [store], 50.0).loud_share == expected


@pytest.mark.parametrize("pause", ["zeros", "noise"])
def test_a_long_pause_changes_no_word(tones, bundle, tmp_path, pause):
    words = SENTENCES[1]
    noise = {"zeros": 0.0, "noise": 0.003}[pause] * np.random.default_rng(5).standard_normal(30 * RATE)
    samples = say(words, seed=3)
    soundfile.write(tmp_path / "a.wav", np.concatenate([0.3 * noise, samples, 0.3 * noise]).astype(np.float32), RATE)
    assert transcribe(bundle, tmp_path / "a.wav") == words


def test_training_mean_is_that_of_all_frames_before_normalisation(tones):
    raw = {utt_id: fbank([soundfile.read(tones.folder / f"{utt_id}.wav", dtype="float32")[0]], OPTIONS)[0].numpy() for utt_id in tones.words}
    np.testing.assert_allclose(normalisation.training_mean([tones.store]), np.concatenate(list(raw.values())).mean(0), atol=1e-3)
    for utt_id in tones.words:
        np.testing.assert_allclose(raw_features(tones.store, utt_id), raw[utt_id], atol=0.02)  # float16


def test_other_ways_of_training_have_their_counterpart(tones, tmp_path):
    assert make_normalisation("none", [tones.store], 50.0) == MeanNormalisation((0.0,) * 20, math.inf)
    assert make_normalisation("utterance", [tones.store], 50.0).pseudo_count_frames == 0.0
    assert make_normalisation("corpus", [tones.store], 50.0).pseudo_count_frames == math.inf
    endless = InputSettings(OPTIONS, LEFT, RIGHT, make_normalisation("corpus", [tones.store], 50.0))
    assert load_bundle(tones.save(tmp_path / "corpus", inputs=endless)).inputs == endless
    with FrameWriter(tmp_path / "bare", (20,), np.float16) as writer:
        writer.append("u1", np.zeros((3, 20)))
    with pytest.raises(AsrKdError, match=r"u1: .* notes no mean"):
        normalisation.training_mean([FrameStore(tmp_path / "bare")])


def test_pseudo_count_with_the_most_correct_frames(tones, tmp_path):
    def network(frames):
        return log_posteriors(tones.model, frames, LEFT, RIGHT)

    prior = tones.inputs.normalisation
    halves = []
    for number in range(2):  # the speakers may be in several splits; in the second the features of an utterance without states
        stores = []
        for name, store in (("features", tones.store), ("states", tones.targets)):
            with FrameWriter(tmp_path / f"{name}{number}", store.frames.shape[1:], store.frames.dtype, store.attributes) as writer:
                for utt_id in store.utt_ids[number::2]:
                    writer.append(utt_id, store[utt_id])
            stores.append(FrameStore(tmp_path / f"{name}{number}"))
        halves.append((stores[0], stores[1]))
    best, counts = choose_pseudo_count(network, halves, [*tones.words, "without-states"], prior, (0.0, 100.0, math.inf))
    for pseudo_count, count in counts.items():
        correct = sum(int((network(replace(prior, pseudo_count_frames=pseudo_count)(raw_features(tones.store, u))).argmax(1) == tones.targets[u]).sum())
                      for u in tones.words)
        assert (count.correct, count.frames) == (correct, tones.store.frames.shape[0])
    assert counts[best].correct == max(count.correct for count in counts.values())
