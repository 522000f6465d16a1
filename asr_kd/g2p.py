"""Pronunciations for words that a lexicon lacks, from espeak-ng's rules, in the lexicon's own ARPAbet phones."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak
from asr_kd.lexicon import Lexicon, Pronunciation
from asr_kd.manifest import Exclusion, Utterance

logger = logging.getLogger(__name__)

# espeak's mnemonics of English as ARPAbet; "" is none
ARPABET = {
    "p": "P", "b": "B", "t": "T", "d": "D", "k": "K", "g": "G", "f": "F", "v": "V", "T": "TH", "D": "DH", "s": "S", "z": "Z",
    "S": "SH", "Z": "ZH", "h": "HH", "m": "M", "n": "N", "N": "NG", "l": "L", "r": "R", "w": "W", "j": "Y", "tS": "CH", "dZ": "JH",
    "t#": "T", "t2": "T", "?": "T", "r-": "R", "n-": "AH N", "w#": "W", "x": "K", "t[": "TH", ";": "",
    "I": "IH", "I#": "IH", "I2": "IH", "i": "IY", "i:": "IY", "E": "EH", "a": "AE", "aa": "AE", "V": "AH", "0": "AA", "A:": "AA",
    "O:": "AO", "O": "AO", "O2": "AO", "U": "UH", "u:": "UW", "u": "UW", "3:": "ER", "3": "ER", "@": "AH", "@2": "AH", "@-": "AH", "a#": "AH",
    "@L": "AH L", "eI": "EY", "aI": "AY", "aI2": "AY", "oU": "OW", "aU": "AW", "OI": "OY", "VR": "ER", "IR": "ER",
    "A@": "AA R", "O@": "AO R", "o@": "AO R", "e@": "EH R", "i@3": "IH R", "U@": "UH R", "i@": "IY AH", "aI@": "AY AH", "aI3": "AY ER",
}  # fmt: skip

# What to say where the lexicon lacks an ARPAbet phone, nearest first
NEAREST = {
    "AA": "AO AH", "AE": "EH AA", "AH": "AX UH AA", "AO": "AA OW", "AW": "AA OW", "AY": "AA IY", "EH": "AE IH", "ER": "R AH", "EY": "EH IY",
    "IH": "IY EH", "IY": "IH", "OW": "AO UH", "OY": "AO OW", "UH": "UW AH", "UW": "UH",
    "B": "P", "CH": "SH T", "D": "T", "DH": "D TH Z", "DX": "T", "F": "V", "G": "K", "HH": "H", "JH": "CH ZH D", "K": "G", "L": "R", "M": "N",
    "N": "M", "NG": "N", "P": "B", "R": "L", "S": "Z", "SH": "S CH", "T": "D", "TH": "T F S", "V": "F", "W": "UW", "Y": "IY", "Z": "S",
    "ZH": "SH JH Z",
}  # fmt: skip
# Endings of a vowel by its stress, nearest first; "" is a vowel without a digit
NEAREST_STRESS = {"0": ("0", "", "1", "2"), "1": ("1", "", "2", "0"), "2": ("2", "", "1", "0")}
VOWELS = frozenset({"AA", "AE", "AH", "AO", "AW", "AX", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"})


def complete_lexicon(lexicon: Lexicon, utterances: Iterable[Utterance], use_g2p: bool = True,
                     lm_words: Collection[str] = ()) -> tuple[Lexicon, Lexicon, list[Exclusion]]:
    """Pronounce the words of `utterances` that `lexicon` lacks, or leave their utterances out; pronounce `lm_words` too.

    Returns:
        The extended lexicon; its generated part alone, to be written to a file; the utterances that still hold a word without
        pronunciation, each with those words. Nothing is generated without espeak-ng, for a lexicon that is not ARPAbet (both logged), or with `use_g2p` False.

    Raises:
        AsrKdError: the transcripts or the words of the language model are in another case than the lexicon.
    """
    transcripts = {utterance.utt_id: utterance.words for utterance in utterances}
    spoken = {word for words in transcripts.values() for word in words}
    lexicon.check_case(spoken, "the transcripts")
    lexicon.check_case(lm_words, "the language model")
    missing = lexicon.missing(spoken.union(lm_words))
    g2p = _generator(lexicon, missing) if missing and use_g2p else None
    extended, generated = lexicon.with_generated(missing, g2p) if g2p else (lexicon, Lexicon({}))
    uncovered = extended.uncovered(transcripts)
    if uncovered:
        logger.warning("%d of %d utterances left out for words without pronunciation", len(uncovered), len(transcripts))
    return extended, generated, [Exclusion(utt_id, "no pronunciation for: " + " ".join(words)) for utt_id, words in uncovered.items()]


def _generator(lexicon: Lexicon, missing: Sequence[str]) -> EspeakG2P | None:
    try:
        return EspeakG2P(lexicon.phones)
    except AsrKdError as error:
        logger.warning("%d words lack a pronunciation and none can be generated: %s", len(missing), error)
        return None


def _sounds(mnemonics: Sequence[str]) -> list[str]:
    """espeak's mnemonics without their marks of stress."""
    return [mnemonic.lstrip("',%=") for mnemonic in mnemonics]


class EspeakG2P:
    """Grapheme-to-phoneme conversion by espeak-ng (General American), one pronunciation per word.

    Emits only phones of `inventory`; where its vowels carry stress digits, so do those of the pronunciations, with the nearest
    digit that `inventory` has for the vowel. On 3,000 words of CMUdict (stress dropped) 4.5 % of phones differ from the nearest
    CMUdict variant, mostly IH for AH; 22 % of words differ somewhere: `pytest tests/test_g2p.py -k phone_error_rate -s`.

    Raises:
        AsrKdError: espeak-ng is not installed, or `inventory` is not ARPAbet.
    """

    def __init__(self, inventory: Iterable[str], voice: str = "en-us") -> None:
        self._inventory = frozenset(inventory)
        self._voice = voice
        self._espeak = espeak()
        self._espeak.set_voice(voice)
        self._roman = _sounds(self._espeak.phonemes("roman"))
        wanted = {phone for phones in ARPABET.values() for phone in phones.split()}
        self._phone = {(phone, stress): self._nearest(phone, stress) for phone in sorted(wanted) for stress in "012"}

    def __call__(self, words: Sequence[str]) -> dict[str, tuple[Pronunciation, ...]]:
        """Pronunciations of `words`; () where espeak finds none (a word of digits or signs), for marks such as <unk> or !SIL, for letters that are
        not Latin, which espeak names one by one, and for Roman numerals, of which it says that they are Roman."""
        self._espeak.set_voice(self._voice)
        return {word: self._pronounce(word) for word in words}

    def _pronounce(self, word: str) -> tuple[Pronunciation, ...]:
        word = unicodedata.normalize("NFC", word)
        letters = [character for character in word if character.isalpha()]
        if word[:1] in "<[({!#" or not letters or any(character.isdigit() for character in word):
            return ()
        if not all(unicodedata.name(letter, "").startswith("LATIN") for letter in letters):
            return ()
        phones: list[str] = []
        before = ""
        # lower case, for espeak spells out what it takes for an abbreviation
        mnemonics = self._espeak.phonemes(word.lower())
        sounds = _sounds(mnemonics)
        if set(word.upper()) <= set("IVXLCDM") and sounds[:len(self._roman)] == self._roman:
            return ()
        for mnemonic, sound in zip(mnemonics, sounds, strict=True):
            stress = "1" if mnemonic.startswith("'") else "2" if mnemonic.startswith(",") else "0"
            arpabet = ARPABET.get(sound)
            if arpabet is None:
                return ()  # a sound of another language
            if arpabet == "R" and before in ("R", "ER"):
                arpabet = ""  # espeak writes the r of "story" twice, as colour of the vowel and as linking r
            phones += [self._phone[phone, stress] for phone in arpabet.split()]
            before = arpabet.split()[-1] if arpabet else before
        return (tuple(phones),) if phones else ()

    def _nearest(self, phone: str, stress: str) -> str:
        for candidate in (phone, *NEAREST.get(phone, "").split()):
            for ending in NEAREST_STRESS[stress] if candidate in VOWELS else ("",):
                if candidate + ending in self._inventory:
                    return candidate + ending
        raise AsrKdError(f"G2P: the lexicon's {len(self._inventory)} phones hold none like ARPAbet {phone}, expected ARPAbet phones as in CMUdict; "
                         "add the missing pronunciations by hand")
