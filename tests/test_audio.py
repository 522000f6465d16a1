"""Reading audio: formats, sample rates, channels, and files that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from asr_kd.audio import audio_duration_s, read_audio, resample
from asr_kd.errors import AsrKdError
from asr_kd.segments import read_segments


def tone(frequency_hz: float, sample_rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(int(sample_rate * seconds)) / sample_rate)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_lossless_formats_give_the_samples_back(tmp_path: Path, suffix: str) -> None:
    samples = np.round(tone(440, 16000) * 32768) / 32768
    soundfile.write(tmp_path / f"a.{suffix}", samples, 16000, subtype="PCM_16")
    read = read_audio(tmp_path / f"a.{suffix}")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, samples, atol=1e-7)
    assert audio_duration_s(tmp_path / f"a.{suffix}") == 0.5


def test_opus_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.opus", tone(440, 16000), 16000, format="OGG", subtype="OPUS")
    read = read_audio(tmp_path / "a.opus")
    assert abs(len(read) - 8000) < 400
    assert np.corrcoef(read[1000:7000], tone(440, 16000)[1000:7000])[0, 1] > 0.99


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(440, 16000), tone(1000, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_any_sample_rate_arrives_at_the_one_wanted(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(440, rate), rate, subtype="FLOAT")
    read = read_audio(tmp_path / "a.wav")
    assert abs(len(read) - 8000) <= 1
    np.testing.assert_allclose(read[400:-400], tone(440, 16000)[400:len(read) - 400], atol=5e-3)


@pytest.mark.parametrize("rate", [15999, 44101])
def test_odd_sample_rates_do_not_need_a_giant_kernel(rate: int) -> None:
    resampled = resample(tone(440, rate), rate, 16000)
    assert abs(len(resampled) - 8000) <= 2
    np.testing.assert_allclose(resampled[400:1000], tone(440, 16000)[400:1000], atol=0.02)


def test_resampling_is_torchaudios() -> None:
    samples = tone(440, 44100)
    np.testing.assert_allclose(resample(samples, 44100, 16000), torchaudio.functional.resample(torch.from_numpy(samples), 44100, 16000).numpy(), atol=1e-5)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_length_and_pitch_alike(tmp_path: Path, speed: float) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1000, 16000, 1.0), 16000, subtype="FLOAT")
    read = read_audio(tmp_path / "a.wav", speed=speed)
    assert len(read) == pytest.approx(16000 / speed, abs=1)
    peak_hz = np.abs(np.fft.rfft(read)).argmax() * 16000 / len(read)
    assert peak_hz == pytest.approx(1000 * speed, abs=1.5)


def test_what_cannot_be_used_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"none\.wav: no such audio file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(AsrKdError, match=r"none\.wav: no such audio file"):
        audio_duration_s(tmp_path / "none.wav")
    (tmp_path / "text.flac").write_text("not audio")
    for read in (read_audio, audio_duration_s):
        with pytest.raises(AsrKdError, match=r"text\.flac: not readable as audio \(.+\); replace") as caught:
            read(tmp_path / "text.flac")
        assert "\n" not in str(caught.value)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    for read in (read_audio, audio_duration_s):
        with pytest.raises(AsrKdError, match=r"empty\.wav: no samples"):
            read(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(AsrKdError, match=r"nan\.wav: NaN"):
        read_audio(tmp_path / "nan.wav")


def test_flac_without_its_number_of_samples_is_an_error(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(1600), 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # STREAMINFO: 36 bits for the number of samples, 0 for unknown, as written into a pipe
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    for read in (read_audio, audio_duration_s, lambda path: list(read_segments(path))):
        with pytest.raises(AsrKdError, match=r"a\.flac: its header does not say how many samples it holds"):
            read(tmp_path / "a.flac")


@pytest.mark.parametrize("read", [read_audio, audio_duration_s, lambda path: list(read_segments(path))])
def test_audio_without_a_header_or_with_an_impossible_sample_rate_is_an_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(3200))
    with pytest.raises(AsrKdError, match=r"a\.raw: not readable as audio \(.+\); replace the file"):
        read(tmp_path / "a.raw")
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 1)
    with pytest.raises(AsrKdError, match=r"a\.wav: sample rate 1 Hz, expected 1000 Hz or more; replace the file"):
        read(tmp_path / "a.wav")
    with pytest.raises(AsrKdError, match=r"none\.wav: no such audio file; check the path$"):
        read(tmp_path / "none.wav")


def test_a_cut_off_flac_is_an_error_or_gives_what_is_there(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 32000), 16000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[:len(content) // 2])
    try:
        read = read_audio(tmp_path / "a.flac")
    except AsrKdError as error:
        assert "a.flac" in str(error)  # noqa: PT017 (either outcome is right, it depends on libsndfile)
    else:
        assert 0 < len(read) <= 32000
