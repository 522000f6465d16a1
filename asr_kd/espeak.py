"""espeak-ng by ctypes: pronunciations of words, and speech with the sample at which every word and phoneme begins.

espeak-ng is under the GPL and no part of this package: the optional extra `demo` installs it (wheel `espeakng-loader`),
and it is called here at run time, through its public C interface (speak_lib.h), alone.

One process has one espeak, whose inner state (flutter, noise, filter memory) carries over from call to call and survives
even espeak_Terminate: the same calls give the same samples only in a fresh process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr_kd.errors import AsrKdError

INSTALL = "install it by: pip install 'asr-kd[demo]'"

# Constants of speak_lib.h
_SYNCHRONOUS = 2
_PHONEME_EVENTS, _DO_NOT_EXIT = 0x0001, 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_POSITION_CHARACTER, _UTF8 = 1, 1
_END_OF_EVENTS, _WORD, _PHONEME = 0, 1, 7

# espeak reads some pairs ("of the", "in the") as one word with one event; a zero-width space keeps them apart and changes
# neither phonemes nor durations (0.1 ms on average)
WORD_BOUNDARY = "\u200b"


class _Identifier(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Identifier),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class SpokenPhone:
    """One phoneme as espeak spoke it; `mnemonic` is espeak's name without stress marks, "_" or "_:" in a pause."""

    mnemonic: str
    start_sample: int
    word_index: int


@dataclass(frozen=True)
class Speech:
    """An utterance: int16 samples (N,) at `sample_rate` Hz, its phones in order, and the sample where each word begins."""

    samples: np.ndarray[Any, np.dtype[np.int16]]
    sample_rate: int
    word_starts: tuple[int, ...]
    phones: tuple[SpokenPhone, ...]

    @functools.cached_property
    def peak(self) -> int:
        """Largest absolute sample."""
        return int(np.abs(self.samples.astype(np.int32)).max(initial=0))


def espeak_is_installed() -> bool:
    """Whether the wheel `espeakng-loader` is there."""
    return importlib.util.find_spec("espeakng_loader") is not None


@functools.cache
def espeak() -> Espeak:
    """This process's espeak.

    Raises:
        AsrKdError: espeak-ng is not installed or does not start.
    """
    if not espeak_is_installed():
        raise AsrKdError(f"espeak-ng: not installed, expected for synthetic speech and for pronunciations of unknown words; {INSTALL}")
    return Espeak()


class Espeak:
    """The library, started; get it by `espeak()`, once per process."""

    def __init__(self) -> None:
        import espeakng_loader

        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise AsrKdError(f"espeak-ng: the library does not load ({error}); {INSTALL}") from error
        folder = espeakng_loader.get_data_path().encode()
        self.sample_rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, folder, _PHONEME_EVENTS | _DO_NOT_EXIT)
        if self.sample_rate <= 0:
            raise AsrKdError(f"espeak-ng: no voice data in {espeakng_loader.get_data_path()}; {INSTALL}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the breath in a voice; it starts with the second of the clock
        self._library.espeak_Info.restype = ctypes.c_char_p
        self._library.espeak_Info.argtypes = (ctypes.c_void_p,)
        self.version: str = self._library.espeak_Info(None).decode()
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._library.espeak_TextToPhonemes.argtypes = (ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int)
        self._callback = _Callback(self._receive)  # kept: the library holds a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)
        self._blocks: list[np.ndarray[Any, np.dtype[np.int16]]] = []
        self._events: list[tuple[int, int, int, str]] = []  # type, text position, sample, mnemonic
        self._voice_changes = 0  # since the last synthesis

    def set_voice(self, name: str) -> None:
        """Choose a voice: a language, or language and variant, such as "en-us+f3".

        Raises:
            AsrKdError: espeak has no such voice.
        """
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise AsrKdError(f"espeak-ng: no voice {name!r}; give one of its languages, such as en-us, with or without a variant, such as en-us+f3")
        self._voice_changes += 1

    def phonemes(self, text: str) -> list[str]:
        """The mnemonics of `text` in the present voice, in order, with their stress marks: "'" main, "," secondary."""
        return [mnemonic for word in self.phonemes_by_word(text) for mnemonic in word]

    def phonemes_by_word(self, text: str) -> list[list[str]]:
        """As `phonemes`, one list per word that espeak takes for one; marks of a change of language, such as "(fr)", are left out."""
        clause = ctypes.c_char_p(text.encode())
        words: list[list[str]] = []
        while clause.value:  # the call reads one clause and moves the pointer past it
            line = self._library.espeak_TextToPhonemes(ctypes.byref(clause), _UTF8, ord("\n") << 8).decode()
            words += [[mnemonic for mnemonic in word.split("\n") if mnemonic.strip("_:'") and not mnemonic.startswith("(")] for word in line.split(" ")]
        return [word for word in words if word]

    def speak(self, words: tuple[str, ...], rate_wpm: int, pitch: int, pitch_range: int = 50, pause_after: frozenset[int] = frozenset()) -> Speech:
        """Say `words` in the present voice.

        Args:
            words: without punctuation, in the case in which espeak shall read them.
            rate_wpm: words per minute, 80 to 450.
            pitch, pitch_range: 0 to 100, 50 is the voice's own.
            pause_after: indices of words that a comma follows.

        Raises:
            AsrKdError: espeak did not give each word its own event, so that their times are not known.
        """
        if self._voice_changes > 1:
            self._synthesize(" ")  # each change queues an event, and a full queue loses those of the first words
        for parameter, value in ((_RATE, rate_wpm), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        pieces = [word + ("," if index in pause_after else "") for index, word in enumerate(words)]
        text = WORD_BOUNDARY.join(pieces).replace("," + WORD_BOUNDARY, ", ")
        self._synthesize(text)
        return self._collect(words, pieces)

    def _synthesize(self, text: str) -> None:
        self._blocks, self._events, self._voice_changes = [], [], 0
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()

    def _collect(self, words: tuple[str, ...], pieces: list[str]) -> Speech:
        starts = np.cumsum([1] + [len(piece) + 1 for piece in pieces])[:-1].tolist()  # text positions count from 1
        heard = [(position, sample) for kind, position, sample, _ in self._events if kind == _WORD]
        if [position for position, _ in heard] != starts:
            raise AsrKdError(f"espeak-ng: {len(heard)} word events for {len(words)} words in {' '.join(words)!r}; leave this sentence out")
        phones, word_index = [], -1
        for kind, _, sample, mnemonic in self._events:
            if kind == _WORD:
                word_index += 1
            elif kind == _PHONEME:
                phones.append(SpokenPhone(mnemonic, sample, word_index))
        samples = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.int16)
        return Speech(samples, self.sample_rate, tuple(sample for _, sample in heard), tuple(phones))

    def _receive(self, wave: Any, num_samples: int, events: Any) -> int:
        if num_samples > 0 and wave:
            self._blocks.append(np.ctypeslib.as_array(wave, (num_samples,)).copy())  # espeak reuses its buffer
        index = 0
        while (event := events[index]).type != _END_OF_EVENTS:
            mnemonic = bytes(event.id.string).decode(errors="replace").lstrip("',%=") if event.type == _PHONEME else ""
            self._events.append((event.type, event.text_position, event.sample, mnemonic))
            index += 1
        return 0
