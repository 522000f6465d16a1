"""Log-mel filterbank features: Kaldi's filterbank in batches, mean normalisation, and windows of frames cut on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asr_kd.audio import read_audio
from asr_kd.errors import AsrKdError
from asr_kd.frames import INDEX, FrameStore, FrameWriter
from asr_kd.manifest import Exclusion, Utterance, check_unique, write_exclusions
from asr_kd.progress import progress
from asr_kd.stage import file_state, fingerprint, remove_folder

CMVN = ("speaker", "utterance", "corpus", "none")
SHARD_UTTERANCES = 2000
BATCH_UTTERANCES = 16
# rows of the spectrum held at once: fits a core's cache, or is large enough to keep a GPU busy
BLOCK_FRAMES = {"cpu": 1024, "cuda": 65536}
# frames of waveforms that are joined: the samples of a group stay in the cache, a GPU takes all that it is given
GROUP_FRAMES = {"cpu": 4096, "cuda": 1 << 40}
LONGEST_DIFFERENCE_S, LONGEST_DIFFERENCE = 0.5, 0.1  # between the audio and what a manifest says of its length: the larger of the two
BANK_FILTERS = 8  # neighbours, which look at nearly the same bins

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FbankOptions:
    """Settings of the filterbank, with Kaldi's defaults; frames never reach beyond the samples (`snip_edges`), no dither."""

    num_mels: int = 40
    sample_rate: int = 16000
    window_ms: float = 25.0
    shift_ms: float = 10.0
    low_freq_hz: float = 20.0
    high_freq_hz: float = 0.0  # 0 or less: counted from the Nyquist frequency
    preemphasis: float = 0.97

    @property
    def window(self) -> int:
        """Samples per frame."""
        return int(self.sample_rate * self.window_ms * 0.001)

    @property
    def shift(self) -> int:
        """Samples between frames."""
        return int(self.sample_rate * self.shift_ms * 0.001)

    @property
    def fft_size(self) -> int:
        """Samples per frame after zero padding to a power of two."""
        return 1 << (self.window - 1).bit_length()

    def num_frames(self, num_samples: int) -> int:
        """Frames that fit in so many samples.

        >>> FbankOptions().num_frames(16000), FbankOptions().num_frames(400), FbankOptions().num_frames(399)
        (98, 1, 0)
        """
        return max(0, 1 + (num_samples - self.window) // self.shift)


def fbank(waveforms: Sequence[NDArray[np.float32] | Tensor], options: FbankOptions | None = None,
          device: torch.device | str = "cpu") -> list[Tensor]:
    """Log-mel energies (natural log) of several waveforms, each (N,) -> (T, num_mels) float32 on `device`.

    Equal to `torchaudio.compliance.kaldi.fbank` with dither 0 and Kaldi's povey window. Samples are taken in [-1, 1] as they are:
    Kaldi's own values, made from 16-bit integers, are larger by 2 ln 2^15, and the floor at float32's epsilon lies at
    the level of 16-bit rounding noise. T is 0 for a waveform shorter than a window.

    Raises:
        AsrKdError: options that make no filterbank.
    """
    options = options or FbankOptions()
    device = torch.device(device)
    frame_counts = [options.num_frames(len(waveform)) for waveform in waveforms]
    rows_each = [len(waveform) // options.shift + 1 for waveform in waveforms]  # at least one zero between two
    starts = np.concatenate([[0], np.cumsum(rows_each)]).astype(np.int64)
    log_mel = torch.empty(int(starts[-1]), options.num_mels, device=device)  # (rows, F)
    first, most = 0, GROUP_FRAMES.get(device.type, GROUP_FRAMES["cpu"])
    for last in range(1, len(waveforms) + 1):
        if last == len(waveforms) or starts[last + 1] - starts[first] > most:
            _log_mel(_joined(waveforms[first:last], rows_each[first:last], options).to(device), log_mel[starts[first]:starts[last]], options)
            first = last
    return [log_mel[start:start + count] for start, count in zip(starts, frame_counts, strict=False)]


def _joined(waveforms: Sequence[NDArray[np.float32] | Tensor], rows_each: Sequence[int], options: FbankOptions) -> Tensor:
    """Waveforms one after another, each starting at a multiple of the shift, so that one strided view holds every frame of all of them.

    One zero before them stands for the sample before the first.
    """
    pieces = [torch.zeros(1)]
    for waveform, rows in zip(waveforms, rows_each, strict=True):
        pieces += [torch.as_tensor(waveform), torch.zeros(rows * options.shift - len(waveform))]
    return torch.cat([*pieces, torch.zeros(options.window)])


def _log_mel(samples: Tensor, log_mel: Tensor, options: FbankOptions) -> None:
    """Fill `log_mel` (rows, F) from frames that start at every multiple of the shift, after one leading zero, of `samples` (1 + N,)."""
    window, banks = _tables(options)
    window, banks = window.to(samples.device), [bank.to(samples.device) for bank in banks]
    rows, block = len(log_mel), BLOCK_FRAMES.get(samples.device.type, BLOCK_FRAMES["cpu"])
    emphasised = torch.sub(samples[1:], samples[:-1], alpha=options.preemphasis)
    frames, raw_frames = (signal.as_strided((rows, options.window), (options.shift, 1)) for signal in (emphasised, samples[1:]))  # overlapping views
    padded = torch.zeros(min(block, rows), options.fft_size, device=samples.device)
    energies = torch.empty(options.num_mels, len(padded), device=samples.device)
    for own_frames, own_raw_frames, own_log_mel in zip(*(torch.split(tensor, block) for tensor in (frames, raw_frames, log_mel)), strict=True):
        if len(own_log_mel) < len(padded):
            padded, energies = padded[:len(own_log_mel)], energies[:, :len(own_log_mel)].contiguous()
        part = padded[:, :options.window]
        # Kaldi removes each frame's mean before it emphasises; how the first sample is emphasised does not matter, the window is 0 there
        torch.sub(own_frames, own_raw_frames.sum(1, keepdim=True), alpha=(1.0 - options.preemphasis) / options.window, out=part)
        part *= window
        powers = torch.view_as_real(torch.fft.rfft(padded)).square_().flatten(1)  # (rows, 2 * bins)
        for bank in banks:  # real² + imaginary² is summed by the product, which is fastest this way round
            torch.mm(bank.weights, powers[:, bank.bins].t(), out=energies[bank.filters])
        own_log_mel.copy_(energies.clamp_(min=torch.finfo(torch.float32).eps).log_().t())


@dataclass(frozen=True)
class _Bank:
    """Neighbouring mel filters and the spectrum that they look at: `weights` (filters, bins), each bin twice, real and imaginary."""

    filters: slice
    bins: slice
    weights: Tensor

    def to(self, device: torch.device) -> _Bank:
        return replace(self, weights=self.weights.to(device))


@lru_cache(maxsize=8)
def _tables(options: FbankOptions) -> tuple[Tensor, list[_Bank]]:
    """Povey window (window,), and triangular mel filters in banks of a few, each of which looks at few bins."""
    window = torch.hann_window(options.window, periodic=False).pow(0.85)
    high_freq_hz = options.high_freq_hz + (options.sample_rate / 2 if options.high_freq_hz <= 0 else 0.0)
    if not 0 <= options.low_freq_hz < high_freq_hz <= options.sample_rate / 2 or not 0 < options.shift <= options.window:
        raise AsrKdError(f"features from {options.low_freq_hz} to {high_freq_hz} Hz at {options.sample_rate} Hz, shift {options.shift_ms} ms of "
                         f"{options.window_ms} ms: expected low < high <= half the sample rate and shift <= window; check the feature settings")
    edges = np.linspace(_mel(options.low_freq_hz), _mel(high_freq_hz), options.num_mels + 2)  # left, centre, right of each filter
    bins = _mel(np.arange(options.fft_size // 2 + 1) * options.sample_rate / options.fft_size)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    filters = np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))  # (bins, F)
    weights = torch.from_numpy(filters.repeat(2, axis=0)).float().t().contiguous()  # (F, 2 * bins)
    return window, [_bank(weights, slice(start, start + BANK_FILTERS)) for start in range(0, options.num_mels, BANK_FILTERS)]


def _bank(weights: Tensor, filters: slice) -> _Bank:
    """These filters with the bins from the first to the last that one of them looks at; a filter without a bin is all zeros."""
    used = (weights[filters] != 0).any(0).nonzero()[:, 0].tolist() or [0]
    bins = slice(used[0], used[-1] + 1)
    return _Bank(filters, bins, weights[filters, bins].contiguous())


def _mel(frequency_hz: Any) -> Any:
    """Mel scale, 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(frequency_hz, dtype=np.float64) / 700.0)


def extract_features(utterances: Sequence[Utterance], folder: Path | str, options: FbankOptions | None = None, cmvn: str = "speaker",
                     device: torch.device | str = "cpu", speed: float = 1.0, num_jobs: int = 2) -> list[Exclusion]:
    """Write mean-normalised log-mel features as a `FrameStore` at `folder`, (N, num_mels) float16; return what was left out.

    Left out, listed in `folder`/exclusions.csv too: audio that is missing, unreadable, without samples, of another length
    than the manifest says, or shorter than a window.
    Memory use does not depend on the amount of speech. A cut-off run continues from its last shard when called again.

    Args:
        utterances: with unique ids.
        folder: attributes of its store are `options`, `cmvn`, `speed`, `speakers` (utt_id -> spk_id) and `means` (spk_id -> (F,)
            list for cmvn "speaker", "corpus" -> list for "corpus").
        options: of the filterbank.
        cmvn: subtract the mean over each "speaker", each "utterance", all of them ("corpus"), or not ("none").
        device: where the filterbank is computed.
        speed: 0.9 or 1.1 make perturbed copies; ids of utterances and speakers get the prefix "sp0.9-" as in Kaldi.
        num_jobs: threads that decode audio.

    Raises:
        AsrKdError: unknown `cmvn`, options that make no filterbank, duplicate ids, no usable utterance, NaN in the features (names the
            utterance), or the disk is full.
    """
    folder, options = Path(folder), options or FbankOptions()
    if cmvn not in CMVN:
        raise AsrKdError(f"cmvn {cmvn!r}: expected one of {', '.join(CMVN)}")
    check_unique(utterances)
    raw_folder = folder / ".raw.part-0"
    prefix = "" if speed == 1.0 else f"sp{speed:g}-"
    shards = [list(utterances[start:start + SHARD_UTTERANCES]) for start in range(0, len(utterances), SHARD_UTTERANCES)]
    with progress(desc=f"features {folder.name}", total=sum(u.duration_s for u in utterances) / 3600, unit="h") as bar:
        stores = [_raw_shard(shard, raw_folder / f"{number:05d}", prefix, options, device, speed, num_jobs, lambda seconds: bar.update(seconds / 3600))
                  for number, shard in enumerate(shards)]
    exclusions = [Exclusion(*pair) for store in stores for pair in store.attributes["exclusions"]]  # type: ignore[attr-defined]
    if exclusions:
        log.warning("%s: %d of %d utterances left out, see %s", folder, len(exclusions), len(utterances), folder / "exclusions.csv")
    if not any(len(store) for store in stores):
        raise AsrKdError(f"{folder}: no usable utterance among {len(utterances)}"
                         + (f" (first: {exclusions[0].utt_id}, {exclusions[0].reason})" if exclusions else "") + "; check the data folder")
    speakers = {prefix + utterance.utt_id: prefix + utterance.spk_id for utterance in utterances}
    _normalise(stores, folder, speakers, cmvn, {"options": asdict(options), "cmvn": cmvn, "speed": speed})
    write_exclusions(folder / "exclusions.csv", exclusions)
    remove_folder(raw_folder)
    return exclusions


def _raw_shard(utterances: list[Utterance], folder: Path, prefix: str, options: FbankOptions, device: torch.device | str, speed: float, num_jobs: int,
               tell: Callable[[float], object]) -> FrameStore:
    """Unnormalised float32 features of some utterances; an earlier run's result of the same settings is kept."""
    key = fingerprint([asdict(options), speed, [(u.utt_id, u.wav, u.duration_s, file_state(u.wav)) for u in utterances]])
    if (folder / INDEX).is_file() and (earlier := FrameStore(folder)).attributes.get("key") == key:
        tell(sum(utterance.duration_s for utterance in utterances))
        return earlier
    exclusions: list[tuple[str, str]] = []
    with FrameWriter(folder, (options.num_mels,), np.float32, {"key": key, "exclusions": exclusions}) as writer:
        for batch, waveforms in _decoded(utterances, options.sample_rate, speed, num_jobs):
            usable: list[tuple[Utterance, NDArray[np.float32]]] = []
            for utterance, waveform in zip(batch, waveforms, strict=True):
                if isinstance(waveform, AsrKdError):
                    exclusions.append((prefix + utterance.utt_id, str(waveform)))
                elif (problem := _problem(utterance, len(waveform), options, speed)) is not None:
                    exclusions.append((prefix + utterance.utt_id, problem))
                else:
                    usable.append((utterance, waveform))
            for (utterance, _), log_mel in zip(usable, fbank([waveform for _, waveform in usable], options, device), strict=True):
                frames = log_mel.cpu().numpy()
                if np.isfinite(frames).all():
                    writer.append(prefix + utterance.utt_id, frames)
                else:
                    exclusions.append((prefix + utterance.utt_id, f"{utterance.wav}: samples too large, its features are infinite"))
            tell(sum(utterance.duration_s for utterance in batch))
    return FrameStore(folder)


def _decoded(utterances: list[Utterance], sample_rate: int, speed: float,
             num_jobs: int) -> Iterator[tuple[list[Utterance], list[NDArray[np.float32] | AsrKdError]]]:
    """Batches of utterances with their waveforms (or why there is none), the next batch being decoded meanwhile."""
    def read(utterance: Utterance) -> NDArray[np.float32] | AsrKdError:
        try:
            return read_audio(utterance.wav, sample_rate, speed)
        except AsrKdError as error:
            return error

    batches = [utterances[start:start + BATCH_UTTERANCES] for start in range(0, len(utterances), BATCH_UTTERANCES)]
    with ThreadPoolExecutor(max(1, num_jobs)) as pool:
        coming = [pool.submit(read, utterance) for utterance in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            current = coming
            coming = [pool.submit(read, utterance) for utterance in batches[number + 1]] if number + 1 < len(batches) else []
            yield batch, [future.result() for future in current]


def _problem(utterance: Utterance, num_samples: int, options: FbankOptions, speed: float) -> str | None:
    """Why audio that could be read is of no use; None where it is."""
    if not options.num_frames(num_samples):
        return f"{num_samples} samples, shorter than one window of {options.window}"
    said_s, found_s = utterance.duration_s, num_samples / options.sample_rate * speed
    if said_s > 0 and abs(found_s - said_s) > max(LONGEST_DIFFERENCE_S, LONGEST_DIFFERENCE * said_s):
        return (f"{utterance.wav}: {found_s:.1f} s of audio, expected {said_s:.1f} s as the manifest says; cut the recording, "
                "replace a file that is cut off, or correct the duration")
    return None


def _normalise(stores: Sequence[FrameStore], folder: Path, speakers: dict[str, str], cmvn: str, attributes: dict[str, object]) -> None:
    """Subtract means from raw features and write them as the final store."""
    def group(utt_id: str) -> str:
        return {"speaker": speakers[utt_id], "utterance": utt_id}.get(cmvn, "corpus")

    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for store in stores:
        for utt_id in store:
            name, frames = group(utt_id), store[utt_id]
            sums[name] = sums.get(name, np.zeros(frames.shape[1])) + frames.sum(axis=0, dtype=np.float64)
            counts[name] = counts.get(name, 0) + len(frames)
    means = {name: (sums[name] / counts[name] if cmvn != "none" else np.zeros_like(sums[name])) for name in sums}
    used = {utt_id: speakers[utt_id] for store in stores for utt_id in store}
    listed = {name: mean.tolist() for name, mean in means.items()} if cmvn in ("speaker", "corpus") else {}
    num_mels = stores[0].frames.shape[1]
    with FrameWriter(folder, (num_mels,), np.float16, {**attributes, "speakers": used, "means": listed}) as writer:
        for store in stores:
            for utt_id in store:
                writer.append(utt_id, np.subtract(store[utt_id], means[group(utt_id)], dtype=np.float32, casting="same_kind"))


class Windows:
    """Windows of `left + 1 + right` frames around any frame of a set of utterances, cut on the device when asked for.

    Features lie on the device once, each utterance with its first and last frame repeated `left` and `right` times, so that
    a batch of windows is one gather of rows.

    Attributes:
        utt_ids: utterances in the order of their frames.
        num_frames: N, over all utterances; frame indices are 0..N-1.
        dim: (left + 1 + right) * F, width of a window.

    Args:
        stores: one feature store, or several read together (speed-perturbed copies), or what `store_of_each` made of them.
        utt_ids: which utterances, in which order; all of them by default.
        left: frames of context before.
        right: frames of context after.
        device: where the features are kept.
        dtype: kept as float16 (half the memory) or float32.

    Raises:
        AsrKdError: an utterance id occurs in two stores or in none, or the stores were made with different settings.
    """

    def __init__(self, stores: FrameStore | Sequence[FrameStore] | Mapping[str, FrameStore], utt_ids: Sequence[str] | None = None, left: int = 20,
                 right: int = 5, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> None:
        store_of = stores if isinstance(stores, Mapping) else store_of_each(stores)
        self.utt_ids = list(store_of if utt_ids is None else utt_ids)
        check_present(self.utt_ids, store_of)
        self.left, self.right = left, right
        self.device = torch.device(device)
        lengths = np.array([store_of[utt_id].length(utt_id) for utt_id in self.utt_ids], dtype=np.int64)
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_frames = int(self.offsets[-1])
        self._position = {utt_id: u for u, utt_id in enumerate(self.utt_ids)}
        frame_dim = next(iter(store_of.values())).frames.shape[1]
        self.dim = (left + 1 + right) * frame_dim
        padded = self._padded([store_of[utt_id][utt_id] for utt_id in self.utt_ids], frame_dim, dtype)
        rows = np.arange(self.num_frames, dtype=np.int64) + np.repeat(np.arange(len(lengths)), lengths) * (left + right)
        self._row_of_frame = torch.from_numpy(rows).to(self.device)  # (N,), first row of the frame's window
        self._rows = padded.to(self.device)  # (N + U * (left + right), F)
        self._windows = self._rows.as_strided((len(padded) - left - right, self.dim), (frame_dim, 1))  # overlapping: a window is a run of rows

    def gather(self, frame_indices: Tensor) -> Tensor:
        """Windows around these frames: (B,) int64 -> (B, dim) float32."""
        return self._windows.index_select(0, self._row_of_frame[frame_indices.to(self.device)]).float()

    def utterance(self, utt_id: str) -> Tensor:
        """Windows around every frame of an utterance, (T, dim) float32; errors as `span`."""
        start, end = self.span(utt_id)
        frame_dim = self._rows.shape[1]
        first = start + self._position[utt_id] * (self.left + self.right)
        return self._rows.as_strided((end - start, self.dim), (frame_dim, 1), first * frame_dim).float()

    def span(self, utt_id: str) -> tuple[int, int]:
        """First frame index and one past the last of an utterance.

        Raises:
            AsrKdError: an utterance that these windows do not hold.
        """
        if utt_id not in self._position:
            raise AsrKdError(f"{utt_id}: not among the {len(self.utt_ids)} utterances of these windows; check the split")
        u = self._position[utt_id]
        return int(self.offsets[u]), int(self.offsets[u + 1])

    def _padded(self, parts: list[NDArray[np.generic]], frame_dim: int, dtype: torch.dtype) -> Tensor:
        context = self.left + self.right
        padded = torch.empty(self.num_frames + len(parts) * context, frame_dim, dtype=dtype)
        start = 0
        for part in parts:
            if len(part) == 0:
                raise AsrKdError("an utterance without frames; run the features stage again")
            frames = torch.from_numpy(np.array(part))
            end = start + self.left + len(part)
            padded[start:start + self.left] = frames[0]
            padded[start + self.left:end] = frames
            padded[end:end + self.right] = frames[-1]
            start = end + self.right
        return padded


def store_of_each(stores: FrameStore | Sequence[FrameStore]) -> dict[str, FrameStore]:
    """Utterance id -> feature store.

    Raises:
        AsrKdError: an utterance id occurs in two stores, or the stores were made with different settings.
    """
    stores = [stores] if isinstance(stores, FrameStore) else list(stores)
    settings = [{key: store.attributes.get(key) for key in ("options", "cmvn")} for store in stores]
    for store, other in zip(stores, settings, strict=True):
        if other != settings[0]:
            raise AsrKdError(f"{store.folder}: features made with {other}, those at {stores[0].folder} with {settings[0]}; run the features stage again")
    store_of: dict[str, FrameStore] = {}
    for store in stores:
        for utt_id in store:
            if utt_id in store_of:
                raise AsrKdError(f"{utt_id}: in {store_of[utt_id].folder} and in {store.folder}; ids must be unique across the splits read together")
            store_of[utt_id] = store
    return store_of


def check_present(utt_ids: Sequence[str], store_of: Mapping[str, FrameStore]) -> None:
    """Raise `AsrKdError` when an utterance has no features."""
    missing = [utt_id for utt_id in utt_ids if utt_id not in store_of]
    if missing:
        folders = sorted({str(store.folder) for store in store_of.values()})
        raise AsrKdError(f"{missing[0]}: no features in {', '.join(folders)} ({len(missing)} utterances without); run the features stage again")
