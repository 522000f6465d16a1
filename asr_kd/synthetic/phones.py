"""The phones of the synthetic corpus: one for each of espeak's phonemes, its allophones joined.

Names follow ARPAbet. One phoneme of espeak is one phone here, so that each has a true time: the vowel of "car", which
espeak speaks as one, is AAR (General American) whatever its accent makes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from asr_kd.errors import AsrKdError
from asr_kd.espeak import WORD_BOUNDARY, espeak
from asr_kd.lexicon import Lexicon, Pronunciation

PAUSES = frozenset({"_", "_:", "_|", "_!", ";", "", ":"})  # ";" and ":" only colour the phoneme before them

PHONES = {
    "p": "P", "b": "B", "t": "T", "t2": "T", "?": "T", "t#": "DX", "d": "D", "k": "K", "g": "G", "f": "F", "v": "V", "T": "TH", "t[": "TH",
    "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH", "h": "HH", "m": "M", "n": "N", "n-": "N", "N": "NG", "l": "L", "r": "R", "r-": "R",
    "w": "W", "w#": "W", "j": "Y", "tS": "CH", "dZ": "JH",
    "I": "IH", "I#": "IH", "I2": "IH", "i": "IY", "i:": "IY", "E": "EH", "a": "AE", "aa": "AE", "V": "AH", "0": "AA", "A:": "AA",
    "O:": "AO", "O2": "AO", "U": "UH", "u:": "UW", "3:": "ER", "VR": "ER", "IR": "ER", "3": "AXR", "@": "AX", "@2": "AX", "@-": "AX", "@5": "AX", "a#": "AX",
    "@L": "EL", "eI": "EY", "aI": "AY", "aI2": "AY", "oU": "OW", "aU": "AW", "OI": "OY",
    "A@": "AAR", "O@": "AOR", "o@": "AOR", "e@": "EHR", "i@3": "IHR", "i@": "IHR", "U@": "UHR", "aI@": "AYX", "aI3": "AYX",
}  # fmt: skip


def phone_of(mnemonic: str) -> str | None:
    """The phone for espeak's mnemonic (stress marks allowed); None for a pause.

    Raises:
        AsrKdError: the mnemonic is not one of English.
    """
    bare = mnemonic.lstrip("',%=")
    if bare in PAUSES:
        return None
    try:
        return PHONES[bare]
    except KeyError:
        raise AsrKdError(f"espeak-ng: unknown phoneme {mnemonic!r}, expected one of English; add it to asr_kd/synthetic/phones.py") from None


def spoken(words: Sequence[str]) -> list[Pronunciation]:
    """How espeak's present voice says each of `words` within their sentence.

    Raises:
        AsrKdError: espeak did not pronounce the words one by one.
    """
    said = espeak().phonemes_by_word(WORD_BOUNDARY.join(words).lower())
    if len(said) != len(words):
        raise AsrKdError(f"espeak-ng: {len(said)} pronunciations for {len(words)} words in {' '.join(words)!r}; leave this sentence out")
    return [tuple(filter(None, map(phone_of, mnemonics))) for mnemonics in said]


def observed_lexicon(sentences: Iterable[Sequence[str]], accents: Sequence[str], least_share: float = 0.05) -> Lexicon:
    """The pronunciations that the words of `sentences` have in the given accents, most frequent first.

    A pronunciation that makes up less than `least_share` of a word's occurrences is left out, except a word's most frequent one.
    """
    sentences = list(sentences)
    counts: dict[str, Counter[Pronunciation]] = {}
    for accent in accents:
        espeak().set_voice(accent)
        for words in sentences:
            for word, pronunciation in zip(words, spoken(words), strict=True):
                counts.setdefault(word, Counter())[pronunciation] += 1
    return Lexicon({word: _frequent(counts[word], least_share) for word in sorted(counts)})


def _frequent(counts: Counter[Pronunciation], least_share: float) -> tuple[Pronunciation, ...]:
    ordered = sorted(counts, key=lambda pronunciation: (-counts[pronunciation], pronunciation))
    return tuple(p for p in ordered if p == ordered[0] or counts[p] >= least_share * counts.total())
