"""Pronunciation lexicons: Kaldi's `WORD P1 P2 ...` and CMUdict's format, several files merged into one.

>>> lexicon = Lexicon({"READ": (("R", "IY", "D"), ("R", "EH", "D"))})
>>> "READ" in lexicon, "Read" in lexicon
(True, False)
>>> lexicon["READ"][1]
('R', 'EH', 'D')
>>> lexicon.phones
('D', 'EH', 'IY', 'R')
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from asr_kd.errors import AsrKdError
from asr_kd.stage import write_text

logger = logging.getLogger(__name__)

Pronunciation = tuple[str, ...]
# What a grapheme-to-phoneme converter is: words in; pronunciations out, () for a word that it cannot pronounce.
G2P = Callable[[Sequence[str]], Mapping[str, tuple[Pronunciation, ...]]]

SILENCE_PHONE = "SIL"
RESERVED_WORDS = frozenset({"<eps>", "<s>", "</s>", "#0"})  # the graph gives these a meaning of its own
VARIANT = re.compile(r"(.+)\(\d+\)")  # CMUdict's READ(1), READ(2)
STRESSED = re.compile(r"([A-Za-z]+)[0-2]")
PROBABILITY = re.compile(r"1(\.0*)?([eE]\+?0+)?|0?\.\d+([eE][-+]?\d+)?|\d(\.\d*)?[eE]-\d+")  # Kaldi's lexiconp.txt
MARKS = ".,:;!?()[]{}\"\u201c\u201d\u201e\u00ab\u00bb\u2026-\u2013\u2014"
"""Punctuation at the ends of words; an apostrophe is part of its word."""


@dataclass(frozen=True)
class Lexicon:
    """Pronunciations of words; words and phones are case-sensitive, silence is no phone of a lexicon.

    Raises:
        AsrKdError: a word has no pronunciation or an empty one.
    """

    pronunciations: dict[str, tuple[Pronunciation, ...]]

    def __post_init__(self) -> None:
        for word, variants in self.pronunciations.items():
            if not variants or not all(variants):
                raise AsrKdError(f"lexicon: word {word!r} has pronunciations {variants!r}, expected one or more of one or more phones; leave the word out")

    def __contains__(self, word: object) -> bool:
        return word in self.pronunciations

    def __getitem__(self, word: str) -> tuple[Pronunciation, ...]:
        """Every pronunciation of `word`, in the order of the files.

        Raises:
            AsrKdError: the word is not in the lexicon.
        """
        try:
            return self.pronunciations[word]
        except KeyError:
            hint = self._case_hint(word)
            raise AsrKdError(f"word {word!r} is not in the lexicon of {len(self)} words{hint}; add it, or have it generated (G2P)") from None

    def __len__(self) -> int:
        return len(self.pronunciations)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pronunciations)

    @cached_property
    def phones(self) -> tuple[str, ...]:
        """Every phone that occurs, sorted."""
        return tuple(sorted({phone for variants in self.pronunciations.values() for variant in variants for phone in variant}))

    def missing(self, words: Iterable[str]) -> list[str]:
        """The words that have no pronunciation here, each once, sorted."""
        return sorted({word for word in words if word not in self.pronunciations})  # a set minus all keys would look at every key

    def uncovered(self, transcripts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """utt_id -> its words without pronunciation, for the utterances that have any: those to leave out, and why."""
        missing = {utt_id: self.missing(words) for utt_id, words in transcripts.items()}
        return {utt_id: words for utt_id, words in missing.items() if words}

    def check_case(self, words: Iterable[str], source: str) -> None:
        """Raise `AsrKdError` when most of the distinct `words` of `source` are missing here, and most of those are here in another case."""
        words = set(words)
        missing = self.missing(words)
        recased = [word for word in missing if self._case_hint(word)]
        if 2 * len(missing) > len(words) and 2 * len(recased) > len(missing):
            raise AsrKdError(f"{source}: {len(missing)} of {len(words)} words are not in the lexicon of {len(self)} words, {len(recased)} of them "
                             f"but for their case, such as {recased[0]!r}{self._case_hint(recased[0], source)}; write both in the same case")

    def near_misses(self, words: Iterable[str]) -> list[str]:
        """Those of `words` that are missing here, but are here in another case or without marks at their ends.

        >>> Lexicon({"GIRL": (("G",),)}).near_misses(["GIRL", "girl", "GIRL,", "GIRLS'", "(GIRL)."])
        ['(GIRL).', 'GIRL,', 'girl']
        """
        bare = {word: word.strip(MARKS) for word in self.missing(words)}
        return [word for word, form in bare.items() if not {form, form.upper(), form.lower()}.isdisjoint(self.pronunciations)]

    def with_generated(self, words: Iterable[str], g2p: G2P) -> tuple[Lexicon, Lexicon]:
        """Pronounce by `g2p` those of `words` that are missing here; the extended lexicon, and the generated part alone.

        Words that `g2p` cannot pronounce stay missing. The phone set does not grow where `g2p` keeps to this lexicon's phones.
        """
        wanted = self.missing(words)
        found = g2p(wanted) if wanted else {}
        generated = Lexicon({word: found[word] for word in wanted if found.get(word)})
        if wanted:
            logger.info("pronunciations generated for %d of %d words that the lexicon lacks", len(generated), len(wanted))
        return Lexicon({**self.pronunciations, **generated.pronunciations}), generated

    def write(self, path: Path | str) -> None:
        """Write as Kaldi's `WORD P1 P2 ...`, one line per pronunciation, sorted by word."""
        lines = (f"{word} {' '.join(variant)}\n" for word in sorted(self.pronunciations) for variant in self.pronunciations[word])
        write_text(path, "".join(lines))

    def _case_hint(self, word: str, source: str = "the transcripts") -> str:
        other = next((form for form in (word.upper(), word.lower()) if form != word and form in self), None)
        return f" ({other!r} is: the lexicon and {source} differ in case)" if other else ""


@dataclass(frozen=True)
class SpokenWords:
    """How words were said in aligned speech.

    Attributes:
        pronunciations: (word, pronunciation) -> how often.
        pauses: (word, whether silence follows it) -> how often; `<s>` stands for the start of an utterance.
    """

    pronunciations: Counter[tuple[str, Pronunciation]] = field(default_factory=Counter)
    pauses: Counter[tuple[str, bool]] = field(default_factory=Counter)


class _Entry(NamedTuple):
    line_number: int
    word: str
    fields: list[str]


def read_lexicon(paths: Path | str | Sequence[Path | str], strip_stress: bool = False) -> Lexicon:
    """Read one or more lexicon files into one `Lexicon`; a word's pronunciations are joined over the files, doubles removed.

    A line is `WORD P1 P2 ...` (Kaldi) or CMUdict's, where `WORD(1)`, `WORD(2)` are further pronunciations of WORD, a line
    that begins with `;;;` and what follows a field `#` are comments. A column of probabilities (Kaldi's lexiconp.txt) is
    recognised when every line of the file has one, and is not used: the graph has its own from the aligned training speech.
    Entries that stand for silence (`!SIL SIL`) are left out and logged, for silence is optional between any two words.
    Files are UTF-8, or Latin-1 as CMUdict 0.7b is, which is logged.

    Args:
        paths: files in order of preference; only the order of a word's pronunciations depends on it.
        strip_stress: drop the digits 0, 1, 2 from the end of phones, so that AH0 and AH1 are both AH.

    Raises:
        AsrKdError: a file is missing, holds no entry or is only partly UTF-8; a line is malformed (named by its number); all entries stand for silence.
    """
    pronunciations: dict[str, dict[Pronunciation, None]] = {}  # inner dict: an ordered set
    paths = [paths] if isinstance(paths, str | Path) else paths
    for path in paths:
        for word, phones in _read_file(Path(path), strip_stress):
            pronunciations.setdefault(word, {})[phones] = None
    if not paths:
        raise AsrKdError("lexicon: no file given, expected one or more; give the path of a lexicon")
    if not pronunciations:
        raise AsrKdError(f"{', '.join(map(str, paths))}: every entry stands for silence ({SILENCE_PHONE}), expected words; give a lexicon that holds words")
    return Lexicon({word: tuple(variants) for word, variants in pronunciations.items()})


def _read_file(path: Path, strip_stress: bool) -> list[tuple[str, Pronunciation]]:
    entries = list(_entries(path))
    if not entries:
        raise AsrKdError(f"{path}: no entry found, expected lines such as 'WORD P1 P2'; check that this is a lexicon")
    skip = 1 if all(_is_probability(entry) for entry in entries) else 0
    pronounced = [(entry.word, _phones(path, entry, skip, strip_stress)) for entry in entries]
    spoken = [(word, phones) for word, phones in pronounced if phones != (SILENCE_PHONE,)]
    if len(spoken) < len(pronounced):
        left_out = sorted({word for word, phones in pronounced if phones == (SILENCE_PHONE,)})
        logger.info("%s: left out as silence: %s", path, " ".join(left_out))
    return spoken


def _entries(path: Path) -> Iterator[_Entry]:
    for line_number, line in enumerate(_decoded(path).split("\n"), start=1):
        fields = line.split()
        if not fields or line.startswith(";;;"):
            continue
        if "#" in fields[1:]:
            fields = fields[: fields.index("#", 1)]
        variant = VARIANT.fullmatch(fields[0])
        word = variant[1] if variant else fields[0]
        if word in RESERVED_WORDS:
            raise AsrKdError(f"{path}:{line_number}: {word!r} is reserved, expected a word; remove the line")
        yield _Entry(line_number, word, fields[1:])


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AsrKdError(f"{path}: lexicon could not be read ({error.strerror}); check the path given as lexicon") from error
    if b"\0" in content:
        raise AsrKdError(f"{path}: holds zero bytes, expected a text file; unpack it first, or check the path")
    try:
        return unicodedata.normalize("NFC", content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        pass
    lines = content.split(b"\n")
    foreign = [number for number, line in enumerate(lines, start=1) if not _is_utf8(line)]
    if any(not line.isascii() and _is_utf8(line) for line in lines):
        raise AsrKdError(f"{path}:{foreign[0]}: not UTF-8, expected UTF-8 as in other lines of the file; mend this line ({len(foreign)} such lines)")
    logger.warning("%s: read as Latin-1, for line %d is not UTF-8", path, foreign[0])
    return content.decode("latin-1")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_probability(entry: _Entry) -> bool:
    return len(entry.fields) > 1 and PROBABILITY.fullmatch(entry.fields[0]) is not None


def _phones(path: Path, entry: _Entry, skip: int, strip_stress: bool) -> Pronunciation:
    phones = entry.fields[skip:]
    where = f"{path}:{entry.line_number}: word {entry.word!r}"
    if not phones:
        raise AsrKdError(f"{where} has no phones, expected 'WORD P1 P2 ...'; add its pronunciation or remove the line")
    if PROBABILITY.fullmatch(phones[0]) and not phones[0].isdigit():  # "1" is a phone in X-SAMPA
        if skip:
            raise AsrKdError(f"{where} has more than one number before its phones, expected one probability or none; "
                             "give lexicon.txt or lexiconp.txt, not lexiconp_silprob.txt")
        raise AsrKdError(f"{where} has {phones[0]!r} for its first phone, a probability that other lines lack; give all lines one or none")
    if SILENCE_PHONE in phones and len(phones) > 1:
        raise AsrKdError(f"{where} has the silence phone {SILENCE_PHONE} among others, expected phones of speech; remove it")
    reserved = next((phone for phone in phones if phone.startswith("#") or phone == "<eps>"), None)
    if reserved:
        raise AsrKdError(f"{where} has the reserved symbol {reserved!r} as a phone, expected a lexicon without disambiguation symbols; remove it")
    return tuple(STRESSED.sub(r"\1", phone) if strip_stress and STRESSED.fullmatch(phone) else phone for phone in phones)
