"""True times of words and phones, as NIST CTM files: `utt_id channel start_s duration_s label`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asr_kd.errors import AsrKdError
from asr_kd.espeak import Speech, SpokenPhone
from asr_kd.synthetic.phones import phone_of

SILENT = 0.005  # of the utterance's peak
LONGEST_CLOSURE_S = 0.1
SHORTEST_S = 0.01  # of a phone
CHANGE_S = 0.01  # spectra of so much on either side of a boundary are compared
LIQUID_S = 0.06
LIQUIDS = frozenset({"L", "R"})
SONORANTS = frozenset({"M", "N", "NG", "L", "EL", "R", "W", "Y"})
VOWEL_LETTERS = tuple("AEIOU")


class Timed(NamedTuple):
    """A word or phone with its times from the beginning of the recording."""

    label: str
    start_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        """Where it ends."""
        return self.start_s + self.duration_s


def read_ctm(path: Path | str) -> dict[str, list[Timed]]:
    """utt_id -> its words or phones in the order of the file.

    Raises:
        AsrKdError: the file is missing or a line is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AsrKdError(f"{path}: times could not be read ({error.strerror}); make the synthetic corpus again") from error
    times: dict[str, list[Timed]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            utt_id, _, start_s, duration_s, label = line.split()
            times.setdefault(utt_id, []).append(Timed(label, float(start_s), float(duration_s)))
        except ValueError as error:
            raise AsrKdError(f"{path}:{number}: {line!r} is no CTM line, expected 'utt_id channel start duration label'; mend the line") from error
    return times


def ctm_lines(utt_id: str, times: Iterable[Timed]) -> str:
    """The CTM lines of one utterance."""
    return "".join(f"{utt_id} 1 {start_s:.4f} {duration_s:.4f} {label}\n" for label, start_s, duration_s in times)


def true_times(words: tuple[str, ...], speech: Speech, lead_in_s: float) -> tuple[list[Timed], list[Timed]]:
    """Times of words and of phones in a recording that begins `lead_in_s` before `speech`.

    espeak's events lie on the sample, but not all where the sound changes. A word event comes before the closure of a
    word-initial stop, a phoneme event after it; the closure belongs to the word, and to the stop. A vowel after a nasal or liquid has its
    event at the end of the transition, and its word's event, if it begins one, at the start of the nasal ("in a"): there the
    sharpest change of the spectrum is taken.
    """
    starts, labels, word_of = _phone_boundaries(speech)
    ends = [*starts[1:], speech.samples.size]
    phones = [_timed(label, start, end, speech, lead_in_s) for label, start, end in zip(labels, starts, ends, strict=True) if label]
    timed_words = []
    for index, word in enumerate(words):
        own = [k for k, (label, of) in enumerate(zip(labels, word_of, strict=True)) if label and of == index]
        timed_words.append(_timed(word, starts[own[0]], ends[own[-1]], speech, lead_in_s))
    return timed_words, phones


def _timed(label: str, start: int, end: int, speech: Speech, lead_in_s: float) -> Timed:
    return Timed(label, lead_in_s + start / speech.sample_rate, (end - start) / speech.sample_rate)


def _phone_boundaries(speech: Speech) -> tuple[list[int], list[str], list[int]]:
    """Start sample, label ("" in a pause) and word index of each phone; marks that only colour a phone are dropped."""
    phones = [(phone, phone_of(phone.mnemonic)) for phone in speech.phones]
    kept = [(phone, label or "") for phone, label in phones if label or phone.mnemonic.startswith("_")]
    labels = [label for _, label in kept]
    starts: list[int] = []
    for (phone, label), before in zip(kept, ["", *labels], strict=False):
        start, earliest = phone.start_sample, starts[-1] + round(SHORTEST_S * speech.sample_rate) if starts else 0
        if label:
            new_word = not starts or phone.word_index != kept[len(starts) - 1][0].word_index
            start = _true_start(speech, phone, label, before, earliest, new_word)
        starts.append(max(start, min(earliest, phone.start_sample)))
    word_of = [phone.word_index for phone, _ in kept]
    return _with_whole_liquids(starts, labels, word_of, round(LIQUID_S * speech.sample_rate)), labels, word_of


def _with_whole_liquids(starts: list[int], labels: list[str], word_of: list[int], wanted: int) -> list[int]:
    """A liquid after a vowel sounds before its event: it gets `wanted` samples up to its end, at most half of the vowel and itself."""
    mended = list(starts)
    for k in range(1, len(starts) - 1):
        if labels[k] in LIQUIDS and labels[k - 1][:1] in VOWEL_LETTERS and word_of[k - 1] == word_of[k]:
            mended[k] = max(min(starts[k], starts[k + 1] - wanted), (mended[k - 1] + starts[k + 1]) // 2)
    return mended


def _true_start(speech: Speech, phone: SpokenPhone, label: str, before: str, earliest: int, new_word: bool) -> int:
    """espeak marks a vowel after a sonorant only when the transition is over, and its word when the sonorant begins."""
    if label[0] in VOWEL_LETTERS and before in SONORANTS:
        return _sharpest_change(speech, earliest + round(CHANGE_S * speech.sample_rate), phone.start_sample)
    return speech.word_starts[phone.word_index] if new_word else _closure_start(speech, phone.start_sample)


def _closure_start(speech: Speech, start: int) -> int:
    """Where the silence that leads up to sample `start` begins; `start` if there is none, or one too long for a closure."""
    first = max(0, start - int(LONGEST_CLOSURE_S * speech.sample_rate))
    loud = np.flatnonzero(np.abs(speech.samples[first:start]) > SILENT * speech.peak)
    return first + int(loud[-1]) + 1 if loud.size else start


def _sharpest_change(speech: Speech, low: int, high: int) -> int:
    """The sample between `low` and `high` where the log spectra of the `CHANGE_S` before and after differ most, or `high`."""
    size, step = round(CHANGE_S * speech.sample_rate), round(0.001 * speech.sample_rate)
    centres = np.arange(max(low, size), min(high, speech.samples.size - size) + 1, step)
    if centres.size == 0:
        return high
    around = centres[:, None] + np.arange(-size, size)  # (centres, 2 * size)
    halves = speech.samples[around].reshape(-1, 2, size) * np.hanning(size)
    spectra = np.log(np.abs(np.fft.rfft(halves)) + SILENT * speech.peak)  # (centres, 2, bins)
    return int(centres[np.argmax(((spectra[:, 1] - spectra[:, 0]) ** 2).sum(1))])
