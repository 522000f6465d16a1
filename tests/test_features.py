"""Filterbank against torchaudio, normalisation against plain means, windows against a slow loop."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd import features as module
from asr_kd.audio import read_audio
from asr_kd.errors import AsrKdError
from asr_kd.features import FbankOptions, Windows, extract_features, fbank
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.manifest import Utterance


def speech_like(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise of falling spectrum with a slow envelope and an offset, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    noise = np.cumsum(rng.normal(size=num_samples)) * 0.002 + rng.normal(size=num_samples) * 0.05
    return np.clip(noise * (1.1 + np.sin(np.arange(num_samples) / 2000)) + 0.01, -1, 1).astype(np.float32)


def reference(waveform: np.ndarray, options: FbankOptions) -> torch.Tensor:
    return torchaudio.compliance.kaldi.fbank(
        torch.from_numpy(waveform)[None], num_mel_bins=options.num_mels, sample_frequency=options.sample_rate, frame_length=options.window_ms,
        frame_shift=options.shift_ms, low_freq=options.low_freq_hz, high_freq=options.high_freq_hz, preemphasis_coefficient=options.preemphasis, dither=0.0)


@pytest.mark.parametrize("options", [
    FbankOptions(), FbankOptions(num_mels=80, high_freq_hz=-400), FbankOptions(num_mels=23, sample_rate=8000, low_freq_hz=64, high_freq_hz=3800),
    FbankOptions(window_ms=32, shift_ms=8, preemphasis=0.9), FbankOptions(sample_rate=22050, shift_ms=12.5)])
def test_fbank_is_torchaudios_kaldi_fbank(options: FbankOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.BLOCK_FRAMES, "cpu", 64)  # several blocks, utterances across their edges
    monkeypatch.setitem(module.GROUP_FRAMES, "cpu", 200)  # several groups, one utterance larger than that
    waveforms = [speech_like(n, n) for n in (options.window, 16000, options.window + options.shift - 1, options.window + options.shift, 12345, 30000)]
    waveforms.append(np.zeros(4000, np.float32))
    waveforms.append(speech_like(8000) * np.float32(32768))  # Kaldi's own scale
    for waveform, ours in zip(waveforms, fbank(waveforms, options), strict=True):
        expected = reference(waveform, options)
        assert ours.shape == expected.shape == (options.num_frames(len(waveform)), options.num_mels)
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)


def test_waveforms_too_short_for_a_window_have_no_frames() -> None:
    frames = fbank([np.zeros(0, np.float32), speech_like(399), speech_like(400), speech_like(1)])
    assert [len(part) for part in frames] == [0, 0, 1, 0]
    assert fbank([]) == []


def test_impossible_filterbanks_are_refused() -> None:
    with pytest.raises(AsrKdError, match="check the feature settings"):
        fbank([speech_like(800)], FbankOptions(high_freq_hz=9000))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    """Five usable utterances of two speakers."""
    folder = tmp_path_factory.mktemp("corpus")
    utterances = []
    for number, (spk, num_samples) in enumerate([("a", 4000), ("b", 6000), ("a", 400), ("a", 9000), ("b", 5000)]):
        path = folder / f"{spk}-{number}.wav"
        soundfile.write(path, speech_like(num_samples, number), 16000, subtype="FLOAT")
        utterances.append(Utterance(f"{spk}-{number}", num_samples / 16000, path, spk, ("WORD",)))
    return utterances


def test_a_kill_while_raw_features_are_removed(corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest file may be gone and its index still there."""
    extract_features(corpus, tmp_path / "expected")

    def killed(folder: Path, **_: object) -> None:
        for path in Path(folder).rglob("frames.npy"):
            path.unlink()
        if Path(folder).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_features(corpus, tmp_path / "f")
    monkeypatch.undo()
    extract_features(corpus, tmp_path / "f")
    np.testing.assert_array_equal(FrameStore(tmp_path / "f").frames, FrameStore(tmp_path / "expected").frames)


def raw_features(utterances: list[Utterance]) -> dict[str, np.ndarray]:
    return {u.utt_id: reference(read_audio(u.wav), FbankOptions()).numpy() for u in utterances}


@pytest.mark.parametrize("cmvn", ["speaker", "utterance", "corpus", "none"])
def test_stored_features_are_normalised_over_the_group_asked_for(corpus: list[Utterance], tmp_path: Path, cmvn: str) -> None:
    assert extract_features(corpus, tmp_path / "f", cmvn=cmvn) == []
    store, raw = FrameStore(tmp_path / "f"), raw_features(corpus)
    assert store.frames.dtype == np.float16
    assert store.utt_ids == [u.utt_id for u in corpus]
    for utterance in corpus:
        same = {"speaker": [u for u in corpus if u.spk_id == utterance.spk_id], "utterance": [utterance], "corpus": corpus, "none": []}[cmvn]
        mean = np.concatenate([raw[u.utt_id] for u in same]).mean(0) if same else 0.0
        np.testing.assert_allclose(store[utterance.utt_id], raw[utterance.utt_id] - mean, atol=1e-3, rtol=5e-4)  # float16 rounding
        if cmvn == "speaker":
            np.testing.assert_allclose(store.attributes["means"][utterance.spk_id], mean, atol=1e-3)  # type: ignore[index]
    assert store.attributes["speakers"] == {u.utt_id: u.spk_id for u in corpus}
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["exclusions.csv", "frames.npy", "index.json"]


def test_speed_perturbed_copies_are_other_utterances_of_other_speakers(corpus: list[Utterance], tmp_path: Path) -> None:
    extract_features(corpus, tmp_path / "f")
    excluded = extract_features(corpus, tmp_path / "slow", speed=0.9)
    fast = extract_features(corpus, tmp_path / "fast", speed=1.1)
    assert excluded == []
    assert [(e.utt_id, e.reason) for e in fast] == [("sp1.1-a-2", "364 samples, shorter than one window of 400")]
    slow = FrameStore(tmp_path / "slow")
    assert slow.length("sp0.9-a-3") == FbankOptions().num_frames(10000)
    assert slow.attributes["speakers"]["sp0.9-a-3"] == "sp0.9-a"  # type: ignore[index]
    windows = Windows([FrameStore(tmp_path / "f"), slow, FrameStore(tmp_path / "fast")])
    assert len(windows.utt_ids) == 14


def test_audio_that_cannot_be_used_is_listed(corpus: list[Utterance], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.flac").write_text("not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(399), 16000)
    soundfile.write(tmp_path / "loud.wav", 1e25 * np.ones(16000), 16000, subtype="FLOAT")
    names = ["none.wav", "text.flac", "empty.wav", "short.wav", "loud.wav"]
    broken = [Utterance(name, 1.0, tmp_path / name, "c", ("WORD",)) for name in names]
    excluded = extract_features(broken + corpus, tmp_path / "f")
    assert [e.utt_id for e in excluded] == names
    reasons = ["no such audio file", "not readable as audio", "no samples", "399 samples, shorter", "features are infinite"]
    for exclusion, reason in zip(excluded, reasons, strict=True):
        assert reason in exclusion.reason
    with open(tmp_path / "f" / "exclusions.csv", newline="") as file:
        assert [row["ID"] for row in csv.DictReader(file)] == names
    assert "5 of 10 utterances left out" in caplog.text
    assert FrameStore(tmp_path / "f").utt_ids == [u.utt_id for u in corpus]
    with pytest.raises(AsrKdError, match=r"no usable utterance among 5 \(first: none\.wav"):
        extract_features(broken, tmp_path / "g")


def test_audio_of_another_length_than_the_manifest_says_is_listed(corpus: list[Utterance], tmp_path: Path) -> None:
    """A row that points into a whole recording, and a file that was cut off; differences of half a second may be a codec's."""
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 20), 16000)
    said = {"part": 3.0, "cut": 60.0, "unknown": 0.0, "codec": 19.6, "tenth": 21.5}
    utterances = [Utterance(name, seconds, tmp_path / "long.wav", "c", ("WORD",)) for name, seconds in said.items()]
    excluded = extract_features(utterances + corpus, tmp_path / "f", speed=1.1)
    assert [exclusion.utt_id for exclusion in excluded] == ["sp1.1-part", "sp1.1-cut", "sp1.1-a-2"]
    assert "long.wav: 20.0 s of audio, expected 3.0 s as the manifest says; cut the recording" in excluded[0].reason


def test_audio_that_was_repaired_is_read_again_after_a_cut(corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_text("not audio")
    utterances = [Utterance("x", 0.0, path, "c", ("WORD",)), *corpus]

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_normalise", cut)
    with pytest.raises(KeyboardInterrupt):
        extract_features(utterances, tmp_path / "f")
    monkeypatch.undo()
    soundfile.write(path, speech_like(4000, 7), 16000, subtype="FLOAT")
    assert extract_features(utterances, tmp_path / "f") == []


def test_wrong_sample_rate_and_stereo_make_no_difference(corpus: list[Utterance], tmp_path: Path) -> None:
    samples = read_audio(corpus[3].wav)
    twice = torchaudio.functional.resample(torch.from_numpy(samples), 16000, 32000).numpy()
    soundfile.write(tmp_path / "stereo.wav", np.stack([twice, twice], 1), 32000, subtype="FLOAT")
    changed = replace(corpus[3], wav=tmp_path / "stereo.wav")
    for name, utterance in (("as it is", corpus[3]), ("changed", changed)):
        extract_features([utterance], tmp_path / name, cmvn="none")
    one, other = (FrameStore(tmp_path / name)[changed.utt_id].astype(np.float32) for name in ("as it is", "changed"))
    assert one.shape == other.shape
    np.testing.assert_allclose(one[2:-2, :34], other[2:-2, :34], atol=0.1)  # the highest filters lie in the resampler's roll-off


def test_duplicate_ids_nan_and_unknown_normalisation_are_errors(corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AsrKdError, match="a-0: utterance id occurs 2 times"):
        extract_features([corpus[0], corpus[0]], tmp_path / "f")
    with pytest.raises(AsrKdError, match="cmvn 'global': expected one of speaker, utterance, corpus, none"):
        extract_features(corpus, tmp_path / "f", cmvn="global")
    monkeypatch.setattr(module, "fbank", lambda waveforms, *_: [torch.full((3, 40), float("nan")) for _ in waveforms])
    with pytest.raises(AsrKdError, match=r"no usable utterance among 5 \(first: a-0, .*features are infinite"):
        extract_features(corpus, tmp_path / "f")
    with pytest.raises(AsrKdError, match="run the stage"):
        FrameStore(tmp_path / "f")


def test_a_cut_off_run_continues_from_its_last_shard(corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_UTTERANCES", 2)
    extract_features(corpus, tmp_path / "whole")
    read: list[Path] = []

    def cut_off(path: Path, *rest: object) -> np.ndarray:
        read.append(path)
        if path == corpus[4].wav and read.count(path) == 1:
            raise KeyboardInterrupt
        return read_audio(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "read_audio", cut_off)
    with pytest.raises(KeyboardInterrupt):
        extract_features(corpus, tmp_path / "cut", num_jobs=1)
    with pytest.raises(AsrKdError):
        FrameStore(tmp_path / "cut")
    read.clear()
    read.append(corpus[4].wav)
    extract_features(corpus, tmp_path / "cut", num_jobs=1)
    assert read[1:] == [corpus[4].wav]
    for name in ("frames.npy", "index.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_of_other_settings_are_not_taken_over(corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_normalise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract_features(corpus, tmp_path / "f", FbankOptions(low_freq_hz=100))
    extract_features(corpus, tmp_path / "f")
    extract_features(corpus, tmp_path / "g")
    np.testing.assert_array_equal(FrameStore(tmp_path / "f").frames, FrameStore(tmp_path / "g").frames)


def store_of(folder: Path, parts: dict[str, np.ndarray], **attributes: object) -> FrameStore:
    first = next(iter(parts.values()))
    with FrameWriter(folder, first.shape[1:], first.dtype, attributes) as writer:
        for utt_id, frames in parts.items():
            writer.append(utt_id, frames)
    return FrameStore(folder)


def slow_window(frames: np.ndarray, centre: int, left: int, right: int) -> np.ndarray:
    return np.concatenate([frames[min(max(t, 0), len(frames) - 1)] for t in range(centre - left, centre + right + 1)]).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), left=st.integers(0, 7), right=st.integers(0, 7), dim=st.integers(1, 3),
       split=st.integers(0, 6), dtype=st.sampled_from([torch.float16, torch.float32]), data=st.data())
def test_windows_are_those_of_a_slow_loop(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], left: int, right: int, dim: int, split: int,
                                          dtype: torch.dtype, data: st.DataObject) -> None:
    rng = np.random.default_rng(sum(lengths))
    parts = {f"u{n}": rng.normal(size=(length, dim)).astype(np.float16) for n, length in enumerate(lengths)}
    folder = tmp_path_factory.mktemp("stores")
    names = list(parts)
    groups = [group for group in (names[:split], names[split:]) if group]
    stores = [store_of(folder / str(n), {name: parts[name] for name in group}) for n, group in enumerate(groups)]
    chosen = data.draw(st.permutations(names).flatmap(lambda order: st.integers(1, len(order)).map(lambda n: list(order[:n]))))
    windows = Windows(stores, chosen, left, right, dtype=dtype)
    expected = [slow_window(parts[name], t, left, right) for name in chosen for t in range(len(parts[name]))]
    assert windows.num_frames == len(expected)
    frame_indices = torch.from_numpy(rng.permutation(len(expected)))
    gathered = windows.gather(frame_indices)
    assert gathered.dtype == torch.float32
    np.testing.assert_array_equal(gathered.numpy(), np.stack([expected[i] for i in frame_indices]))
    for name in chosen:
        start, end = windows.span(name)
        np.testing.assert_array_equal(windows.utterance(name).numpy(), np.stack(expected[start:end]))


def test_windows_refuse_what_does_not_fit_together(tmp_path: Path) -> None:
    one = store_of(tmp_path / "1", {"x": np.zeros((3, 2), np.float16)}, cmvn="speaker")
    with pytest.raises(AsrKdError, match=r"w: no features in .* \(2 utterances without\)"):
        Windows(one, ["w", "x", "v"])
    with pytest.raises(AsrKdError, match=r"x: in .*1 and in .*2; ids must be unique"):
        Windows([one, store_of(tmp_path / "2", {"x": np.zeros((3, 2), np.float16)}, cmvn="speaker")])
    with pytest.raises(AsrKdError, match=r"features made with .*'none'.* those at .*'speaker'"):
        Windows([one, store_of(tmp_path / "3", {"y": np.zeros((3, 2), np.float16)}, cmvn="none")])
    with pytest.raises(AsrKdError, match="other: not among the 1 utterances"):
        Windows(one).span("other")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(corpus: list[Utterance], tmp_path: Path) -> None:
    waveforms = [read_audio(u.wav) for u in corpus]
    for one, other in zip(fbank(waveforms, device="cuda"), fbank(waveforms), strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=0)
    extract_features(corpus, tmp_path / "f", device="cuda")
    store = FrameStore(tmp_path / "f")
    frame_indices = torch.arange(len(store.frames))
    torch.testing.assert_close(Windows(store, device="cuda").gather(frame_indices).cpu(), Windows(store).gather(frame_indices))
