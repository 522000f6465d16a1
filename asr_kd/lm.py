"""N-gram language models: read and write ARPA, estimate by interpolated modified Kneser-Ney, score text.

>>> arpa = estimate_kneser_ney([("THE", "CAT"), ("THE", "DOG")], order=2)
>>> round(sum(10 ** arpa.log10_prob(("THE",), word) for word in ("THE", "CAT", "DOG", "</s>")), 9)
1.0
"""

from __future__ import annotations

import gzip
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TextIO, cast

from asr_kd.errors import AsrKdError
from asr_kd.stage import atomic_path

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
_UNKNOWNS = (UNKNOWN, "<UNK>")
MAX_ORDER = 4
_ZERO = -99.0  # how ARPA writes log10 of 0
_MAX_LOG10 = 1e-6  # rounding may leave a probability this little above 1
_LARGEST = 1e30  # finite in single precision too
_NUMBER = "0123456789+-.eE"
_RESERVED = frozenset({"<eps>", "#0"})  # the graph gives these a meaning of its own
GZIP = b"\x1f\x8b"  # how its files begin
_COUNT = re.compile(r"ngram\s+([1-9][0-9]*)\s*=\s*([0-9]+)")

Ngram = tuple[str, ...]


class Perplexity(NamedTuple):
    """`perplexity` over the `tokens` scored (words and sentence ends); words that the model does not know are `unknown` and left out."""

    perplexity: float
    tokens: int
    unknown: int


@dataclass(frozen=True)
class Arpa:
    """A back-off n-gram model.

    Attributes:
        ngrams: per order (index 0: unigrams), n-gram -> (log10 probability, log10 back-off weight; may be above 0).
    """

    ngrams: tuple[dict[Ngram, tuple[float, float]], ...]

    @property
    def order(self) -> int:
        """Longest n-gram."""
        return len(self.ngrams)

    @property
    def vocabulary(self) -> list[str]:
        """Words in the model's order, without the sentence marks."""
        return [word for (word,) in self.ngrams[0] if word not in (BEGIN, END)]

    def log10_prob(self, history: Sequence[str], word: str) -> float:
        """log10 P(word | history); only the last order - 1 words of the history count.

        A word outside the vocabulary has the probability of `<unk>` (or `<UNK>`), or -infinity in a model without it; in the history it counts as that.
        """
        unigrams = self.ngrams[0]
        ngram = (*tuple(history)[max(0, len(history) - self.order + 1) :], word)
        unknown = next((mark for mark in _UNKNOWNS if (mark,) in unigrams), None)
        if unknown is not None:
            ngram = tuple(token if (token,) in unigrams else unknown for token in ngram)
        elif (word,) not in unigrams:
            return -math.inf
        backoff = 0.0
        while True:
            found = self.ngrams[len(ngram) - 1].get(ngram)
            if found is not None:
                return backoff + found[0]
            backoff += self.ngrams[len(ngram) - 2].get(ngram[:-1], (0.0, 0.0))[1]
            ngram = ngram[1:]

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> Perplexity:
        """Perplexity of sentences, sentence ends included."""
        log10_total, tokens, unknown = 0.0, 0, 0
        for sentence in sentences:
            history = [BEGIN]
            for word in (*sentence, END):
                log10 = self.log10_prob(history, word)
                history.append(word)
                if math.isinf(log10):
                    unknown += 1
                else:
                    log10_total, tokens = log10_total + log10, tokens + 1
        return Perplexity(10 ** (-log10_total / tokens) if tokens else math.nan, tokens, unknown)


def read_arpa(path: Path | str) -> Arpa:
    """Read an ARPA file, plain or .gz.

    Raises:
        AsrKdError: the file is missing, cut off, a line is malformed, a word comes twice among the 1-grams, or `<s>` or `</s>` is not among them.
    """
    ngrams: list[dict[Ngram, tuple[float, float]]] = []
    for order, log10_prob, words, backoff in _entries(Path(path)):
        while order > len(ngrams):
            ngrams.append({})
        ngrams[-1][words] = (log10_prob, backoff)
    return Arpa(tuple(ngrams))


def read_vocabulary(path: Path | str, copy: TextIO | None = None) -> list[str]:
    """The words of an ARPA file without the sentence marks; the whole file is checked on the way.

    Args:
        copy: takes the file as plain text in the form that every reader knows: single spaces, no byte-order mark, no back-off weights in the
            highest order.

    Raises:
        AsrKdError: as `read_arpa`.
    """
    return [words[0] for order, _, words, _ in _entries(Path(path), copy) if order == 1 and words[0] not in (BEGIN, END)]


def write_arpa(arpa: Arpa, path: Path | str) -> None:
    """Write as ARPA, gzip-compressed where the name ends in .gz."""
    with atomic_path(path) as part, _open_text(part, "w", str(path).endswith(".gz")) as file:
        file.write("\\data\\\n")
        for order, ngrams in enumerate(arpa.ngrams, start=1):
            file.write(f"ngram {order}={len(ngrams)}\n")
        for order, ngrams in enumerate(arpa.ngrams, start=1):
            file.write(f"\n\\{order}-grams:\n")
            for ngram, (log10_prob, backoff) in ngrams.items():
                file.write(f"{log10_prob:.7g}\t{' '.join(ngram)}" + (f"\t{backoff:.7g}\n" if backoff else "\n"))
        file.write("\n\\end\\\n")


def estimate_kneser_ney(sentences: Iterable[Sequence[str]], order: int = 3, vocabulary: Iterable[str] = ()) -> Arpa:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1998, section 3), written as a back-off model.

    Orders below the highest count the distinct words before an n-gram (n-grams that begin with `<s>` keep their own counts);
    unigrams are interpolated with the uniform distribution. P(. | history) sums to one over the vocabulary and `</s>`.
    Where counts of counts are too few for three discounts, one is used.

    Args:
        sentences: words without sentence marks.
        order: 1 to 4; less comes out where every sentence is shorter.
        vocabulary: words to include beside those of the text; they share the uniform part.

    Raises:
        AsrKdError: order out of range, no sentence, or a sentence holds a sentence mark.
    """
    if not 1 <= order <= MAX_ORDER:
        raise AsrKdError(f"language model: order {order}, expected 1 to {MAX_ORDER}; change the settings")
    counts = _continuation_counts([ngrams for ngrams in _count_ngrams(sentences, order) if ngrams])  # short sentences have no long n-grams
    words = sorted({word for (word,) in counts[0]} | set(vocabulary) - {BEGIN})
    lower: dict[Ngram, float] = {(): 1 / len(words)}
    probabilities: list[dict[Ngram, float]] = []
    backoffs: list[dict[Ngram, float]] = []
    for ngram_counts in counts:
        if not probabilities:
            ngram_counts = Counter({(word,): ngram_counts[(word,)] for word in words})
        probability, backoff = _interpolate(ngram_counts, lower)
        probabilities.append(probability)
        backoffs.append(backoff)
        lower = probability
    backoffs.append({})
    probabilities[0][(BEGIN,)] = 0.0
    return Arpa(tuple(
        {ngram: (_log10(p), _log10(backoff.get(ngram, 1.0))) for ngram, p in sorted(probability.items())}
        for probability, backoff in zip(probabilities, backoffs[1:], strict=True)
    ))


def kneser_ney_discounts(counts: Iterable[int]) -> tuple[float, float, float]:
    """Discounts for counts of one, two, and three or more (Chen & Goodman 1998, eq. 26).

    >>> kneser_ney_discounts([1] * 8 + [2] * 4 + [3] * 2 + [4])  # Y = 1/2
    (0.5, 1.25, 2.0)
    >>> kneser_ney_discounts([1, 1, 2])  # too few for three: Y = 2/4
    (0.5, 0.5, 0.5)
    """
    n = Counter(counts)
    if not (n[1] and n[2]):
        return 0.5, 0.5, 0.5
    y = n[1] / (n[1] + 2 * n[2])
    if not (n[3] and n[4]):
        return y, y, y
    first, second, third = (c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
    if not (0 < first <= 1 and 0 < second <= 2 and 0 < third <= 3):
        return y, y, y
    return first, second, third


def _interpolate(counts: Counter[Ngram], lower: dict[Ngram, float]) -> tuple[dict[Ngram, float], dict[Ngram, float]]:
    """n-gram -> probability, and history -> weight of the next lower order; `lower` has the probabilities of that order."""
    discounts = (0.0, *kneser_ney_discounts(counts.values()))
    totals: Counter[Ngram] = Counter()
    freed: dict[Ngram, float] = {}
    for ngram, count in counts.items():
        totals[ngram[:-1]] += count
        freed[ngram[:-1]] = freed.get(ngram[:-1], 0.0) + discounts[min(count, 3)]
    weights = {history: mass / totals[history] for history, mass in freed.items()}
    uniform = lower.get(())
    probability = {}
    for ngram, count in counts.items():
        history = ngram[:-1]
        below = lower[ngram[1:]] if uniform is None else uniform
        probability[ngram] = (count - discounts[min(count, 3)]) / totals[history] + weights[history] * below
    return probability, weights


def _count_ngrams(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Ngram]]:
    """Counts of the n-grams of each order in `<s> sentence </s>`; `<s>` alone is not counted, for it is never predicted."""
    counts: list[Counter[Ngram]] = [Counter() for _ in range(order)]
    for number, sentence in enumerate(sentences, start=1):
        if BEGIN in sentence or END in sentence:
            raise AsrKdError(f"language model: sentence {number} holds a sentence mark ({' '.join(sentence)[:60]}), expected words only; "
                             f"remove {BEGIN} and {END}")
        if not _RESERVED.isdisjoint(sentence) or any("\0" in word for word in sentence):
            raise AsrKdError(f"language model: sentence {number} is {' '.join(sentence)[:60]!r}, expected words, not the reserved "
                             f"{' or '.join(sorted(_RESERVED))} or a zero byte; remove it")
        tokens = (BEGIN, *sentence, END)
        for length in range(1, order + 1):
            counts[length - 1].update(zip(*(tokens[start:] for start in range(length)), strict=False))
    del counts[0][(BEGIN,)]
    if not counts[0]:
        raise AsrKdError("language model: no text, expected at least one sentence; check the transcripts")
    return counts


def _continuation_counts(counts: list[Counter[Ngram]]) -> list[Counter[Ngram]]:
    """Below the highest order, the number of distinct words before each n-gram; n-grams that begin with `<s>` keep their counts."""
    result = []
    for ngrams, longer in pairwise(counts):
        distinct = Counter(ngram[1:] for ngram in longer)
        distinct.update({ngram: count for ngram, count in ngrams.items() if ngram[0] == BEGIN})
        result.append(distinct)
    return [*result, counts[-1]]


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else _ZERO


def _entries(path: Path, copy: TextIO | None = None) -> Iterator[tuple[int, float, Ngram, float]]:
    """(order, log10 probability, words, log10 back-off weight) of every n-gram; raises where counts or the end are not as announced.

    `copy` takes every line that counts, see `read_vocabulary`.
    """
    announced: dict[int, int] = {}
    found: Counter[int] = Counter()
    unigrams: set[str] = set()
    order = highest = -1  # order 0 from \data\ on
    ended = False
    for number, line in text_lines(path):
        if not line or (order < 0 and line != "\\data\\"):
            continue
        if line[0] == "\\":
            ended = line == "\\end\\"
            order = order if ended else _section(path, number, line, order)
            highest = max(announced, default=-1)
        elif order:
            entry = _entry(path, number, line, order)
            if order == 1:
                (word,) = entry[1]
                if word in unigrams:
                    raise AsrKdError(f"{path}: line {number} holds {word!r} a second time, expected each word once among the 1-grams; correct the file")
                unigrams.add(word)
            found[order] += 1
            yield order, *entry
        elif line.startswith("ngram "):
            announced.update([_announced(path, number, line)])
        else:
            continue
        if copy is not None:
            fields = line.split()
            copy.write(" ".join(fields[: order + 1] if order == highest else fields) + "\n")
        if ended:
            break
    if not announced or not ended or found != Counter(announced) or order != max(announced):
        counts = ", ".join(f"{found[n]} of {announced[n]} {n}-grams" for n in sorted(announced)) or "no \\data\\ section"
        end = "" if ended else ", no \\end\\"
        raise AsrKdError(f"{path}: cut off or not an ARPA file ({counts}{end}); copy or download it again")
    if missing := [mark for mark in (BEGIN, END) if mark not in unigrams]:
        raise AsrKdError(f"{path}: no {' and no '.join(missing)} among the {len(unigrams)} 1-grams, expected both {BEGIN} and {END}; "
                         "estimate the model with sentence marks")


def _announced(path: Path, number: int, line: str) -> tuple[int, int]:
    match = _COUNT.fullmatch(line)
    if not match:
        raise AsrKdError(f"{path}: line {number} is {line[:60]!r}, expected 'ngram ORDER=COUNT'; correct the file")
    return int(match.group(1)), int(match.group(2))


def _section(path: Path, number: int, line: str, order: int) -> int:
    """The order of the n-grams that follow a line such as \\1-grams:; 0 after \\data\\."""
    expected = "\\data\\" if order < 0 else f"\\{order + 1}-grams:"
    if line != expected:
        raise AsrKdError(f"{path}: line {number} is {line[:60]!r}, expected {expected!r}; correct the file")
    return order + 1


def _entry(path: Path, number: int, line: str, order: int) -> tuple[float, Ngram, float]:
    fields = line.split()
    try:
        if len(fields) - order not in (1, 2) or "\0" in line:
            raise ValueError
        log10_prob, words = float(fields[0]), tuple(fields[1 : order + 1])
        backoff = float(fields[-1]) if len(fields) == order + 2 else 0.0
        if not (-_LARGEST < log10_prob <= _MAX_LOG10 and -_LARGEST < backoff < _LARGEST):
            raise ValueError
        if fields[0].strip(_NUMBER) or (len(fields) == order + 2 and fields[-1].strip(_NUMBER)):  # Python alone reads 1_0
            raise ValueError
    except ValueError:
        raise AsrKdError(f"{path}: line {number} is {line[:60]!r}, expected a log10 probability (finite, at most 0), {order} words and perhaps "
                         "a finite back-off weight; correct the file") from None
    if not _RESERVED.isdisjoint(words):
        raise AsrKdError(f"{path}: line {number} is {line[:60]!r}, expected words, not the reserved {' or '.join(sorted(_RESERVED))}; remove it")
    return log10_prob, words, backoff


def _open_text(path: Path, mode: Literal["r", "w"], packed: bool) -> TextIO:
    encoding = "utf-8-sig" if mode == "r" else "utf-8"  # a byte-order mark is read, not written
    if packed:
        return cast(TextIO, gzip.open(path, f"{mode}t", encoding=encoding))
    return open(path, mode, encoding=encoding)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered, stripped lines of a file of text, gzipped or not, with composed accents (NFC).

    Raises:
        AsrKdError: the file cannot be read, is cut off or is not UTF-8.
    """
    try:
        with open(path, "rb") as beginning:
            packed = beginning.read(2) == GZIP
        with _open_text(path, "r", packed or path.suffix == ".gz") as file:
            for number, line in enumerate(file, start=1):
                yield number, unicodedata.normalize("NFC", line.strip())
    except (EOFError, zlib.error) as error:
        raise AsrKdError(f"{path}: cut off ({error}); copy or download it again") from error
    except UnicodeDecodeError as error:
        raise AsrKdError(f"{path}: not readable as text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise AsrKdError(f"{path}: could not be read ({error.strerror or error}); check the path of the language model") from error
