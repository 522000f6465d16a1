"""The decoding graph HCLG from lexicon, ARPA language model and tied-state HMM (Mohri, Pereira & Riley 2008).

    G       n-gram model as an acceptor; back-off arcs carry the disambiguation symbol #0
    L o G   lexicon composed with it, determinised in the log semiring and minimised
    C       windows of three phones in place of phones
    H       each window becomes a chain of three self-looping states; input labels are state id + 1, output labels words

Folder written: `HCLG.fst` (ConstFst), `words.txt` (Kaldi's symbol table), `graph.json` (which belong together), and two
lists of words that cannot be recognised, `words_without_pronunciation.txt` and `words_not_in_lm.txt`.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kaldifst
import kaldilm
import numpy as np
from numpy.typing import NDArray

from asr_kd.const_fst import map_const_fst
from asr_kd.errors import AsrKdError
from asr_kd.hclg import write_hclg
from asr_kd.hmm.model import SIL, HmmModel
from asr_kd.lexicon import Lexicon, SpokenWords
from asr_kd.lm import read_vocabulary
from asr_kd.progress import progress
from asr_kd.stage import atomic_path, file_fingerprint, read_json, write_json, write_text

logger = logging.getLogger(__name__)

GRAPH = "HCLG.fst"
WORDS = "words.txt"
INFO = "graph.json"
_SPECIAL = ("<eps>", "#0", "<s>", "</s>")


@dataclass(frozen=True)
class GraphSettings:
    """Choices in the graph.

    Attributes:
        pseudo_count: of a word's n pronunciations, one that was seen c times out of C has probability (c + pseudo_count) / (C + n pseudo_count);
            those of a word never seen have 1 / n.
        transition_scale: factor on the log transition probabilities; like Kaldi's self-loop scale it is near the acoustic scale.
        silence_probability: p of silence after a word that was never seen; None takes the one between words that the HMM learned.
        silence_pseudo_count: after a word that was seen C times, c times with silence behind it, silence has probability
            (c + silence_pseudo_count p) / (C + silence_pseudo_count), as in Chen et al. (2015), Pronunciation and silence probability
            modeling for ASR.
    """

    pseudo_count: float = 1.0
    transition_scale: float = 0.1
    silence_probability: float | None = None
    silence_pseudo_count: float = 2.0


@dataclass(frozen=True)
class _LexiconFst:
    text: str  # OpenFst's text form
    num_disambig: int  # symbols #0 .. #(num_disambig - 1)


def build_graph(lexicon: Lexicon, arpa: Path | str, hmm: HmmModel, folder: Path | str, settings: GraphSettings | None = None,
                spoken: SpokenWords | None = None) -> dict[str, Any]:
    """Build HCLG and its word table in `folder`; returns what `graph.json` holds (sizes and counts of words left out).

    Words of the language model without pronunciation, and words of the lexicon that the language model lacks, cannot be
    recognised: they are counted, logged and listed in files.

    Args:
        lexicon: pronunciations in the HMM's phones.
        arpa: n-gram model, plain or .gz.
        hmm: gives state ids of triphones, transitions and the probability of silence between words.
        folder: written; whole only if `graph.json` is there, which is written last.
        settings: see `GraphSettings`.
        spoken: how words were said in training; without it a word's pronunciations are equally probable, and silence is as probable after every word.

    Raises:
        AsrKdError: cut-off or malformed ARPA, no word in common, phones the HMM does not have, or a full disk.
    """
    folder = Path(folder)
    settings = settings or GraphSettings()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build.part-") as scratch, progress(desc="graph", total=4, unit="step") as bar:
            plain, word_table = Path(scratch) / "lm.arpa", Path(scratch) / WORDS
            with open(plain, "w", encoding="utf-8") as copy:
                vocabulary = read_vocabulary(arpa, copy)
            words = [word for word in vocabulary if word in lexicon and word not in _SPECIAL]
            left_out = _report_left_out(folder, vocabulary, lexicon, len(words))
            word_table.write_text("".join(f"{word} {index}\n" for index, word in enumerate(_symbols(words))), encoding="utf-8")
            grammar = compile_grammar(plain, word_table)
            plain.unlink()
            bar.update(1)
            first_disambig = len(hmm.phones) + 1
            lexicon_fst = lexicon_fst_text(lexicon, words, hmm, settings, spoken or SpokenWords())
            lg = _compose_lexicon(lexicon_fst, grammar, first_disambig, len(words) + 1)
            del grammar
            bar.update(1)
            windows = _compose_context(lg, first_disambig, lexicon_fst.num_disambig, Path(scratch) / "CLG.fst")
            bar.update(1)
            with atomic_path(folder / GRAPH) as part:
                sizes = write_hclg(map_const_fst(Path(scratch) / "CLG.fst"), windows, hmm, part, settings.transition_scale)
            bar.update(1)
            write_text(folder / WORDS, word_table.read_text(encoding="utf-8"))
    except OSError as error:
        raise AsrKdError(f"{folder}: could not be written ({error.strerror or error}); free space or choose another output_folder") from error
    info = {
        "num_words": len(words),
        "num_state_ids": int(hmm.num_states),
        **sizes,
        **left_out,
        "words_fingerprint": file_fingerprint(folder / WORDS),
        "graph_bytes": (folder / GRAPH).stat().st_size,
    }
    write_json(folder / INFO, info)
    logger.info("graph: %d words, %d states, %d arcs", len(words), sizes["num_states"], sizes["num_arcs"])
    return info


def read_graph_info(folder: Path | str) -> tuple[dict[str, Any], list[str]]:
    """`graph.json` and the words by label (label 0 is `<eps>`), checked to belong to the graph beside them.

    Raises:
        AsrKdError: a file is missing, or the word table or the graph is not the one that was built with the other.
    """
    folder = Path(folder)
    info: dict[str, Any] = read_json(folder / INFO)
    found = file_fingerprint(folder / WORDS)
    if found != info["words_fingerprint"]:
        raise AsrKdError(f"{folder / WORDS}: fingerprint {found}, but the graph was built with {info['words_fingerprint']}; run the graph stage again")
    size = (folder / GRAPH).stat().st_size if (folder / GRAPH).is_file() else 0
    if size != info["graph_bytes"]:
        raise AsrKdError(f"{folder / GRAPH}: {size} bytes, expected {info['graph_bytes']}; run the graph stage again")
    lines = (folder / WORDS).read_text(encoding="utf-8").splitlines()
    return info, [line.split()[0] for line in lines]


def lexicon_fst_text(lexicon: Lexicon, words: Sequence[str], hmm: HmmModel, settings: GraphSettings, spoken: SpokenWords) -> _LexiconFst:
    """The lexicon transducer in OpenFst's text form: phone ids in, word labels (position in `words` + 1) out.

    State 0 starts, 1 is between words (final), 2 is before silence. A pronunciation that another equals or begins with
    ends in a disambiguation symbol of its own, as silence does (Kaldi's `add_lex_disambig` and `sildisambig`).
    """
    general = math.exp(hmm.log_optional_silence) if settings.silence_probability is None else settings.silence_probability
    for name, count in (("pseudo count", settings.pseudo_count), ("silence pseudo count", settings.silence_pseudo_count)):
        if not count > 0:
            raise AsrKdError(f"graph: {name} {count:g}, expected more than 0; change the settings")
    if not 0 < general < 1:
        raise AsrKdError(f"graph: silence probability {general:g}, expected a value between 0 and 1; change the settings")

    def costs_after(word: str) -> tuple[float, float]:
        """Costs of no silence and of silence."""
        with_silence, without, more = spoken.pauses[word, True], spoken.pauses[word, False], settings.silence_pseudo_count
        probability = (with_silence + more * general) / (with_silence + without + more)
        return -math.log1p(-probability), -math.log(probability)

    no_silence, silence = costs_after("<s>")
    entries = _entries(lexicon, words, hmm.phones, settings.pseudo_count, spoken)
    first_disambig = len(hmm.phones) + 1
    numbers = disambiguation_numbers([phones for _, phones, _ in entries])
    silence_symbol = first_disambig + max(numbers, default=0) + 1
    lines = [f"0 1 0 0 {no_silence:.6f}", f"0 2 0 0 {silence:.6f}", f"2 3 {SIL} 0 0", f"3 1 {silence_symbol} 0 0"]
    next_state = 4
    for (label, phones, cost), number in zip(entries, numbers, strict=True):
        symbols = [*phones, first_disambig + number] if number else list(phones)
        state = 1
        for position, symbol in enumerate(symbols[:-1]):
            lines.append(f"{state} {next_state} {symbol} {label if position == 0 else 0} {cost if position == 0 else 0.0:.6f}")
            state, next_state = next_state, next_state + 1
        last_label, last_cost = (label, cost) if len(symbols) == 1 else (0, 0.0)
        no_silence, silence = costs_after(words[label - 1])
        lines.append(f"{state} 1 {symbols[-1]} {last_label} {last_cost + no_silence:.6f}")
        lines.append(f"{state} 2 {symbols[-1]} {last_label} {last_cost + silence:.6f}")
    lines.append("1 0")
    return _LexiconFst("\n".join(lines) + "\n", silence_symbol - first_disambig + 1)


def disambiguation_numbers(pronunciations: Sequence[tuple[Any, ...]]) -> list[int]:
    """0 for a pronunciation that no other equals or begins with, else 1, 2, ... among the equal ones.

    >>> disambiguation_numbers([("R", "EH", "D"), ("R", "EH", "D"), ("R", "EH"), ("B", "IY")])
    [1, 2, 1, 0]
    """
    counts = Counter(pronunciations)
    prefixes = {phones[:length] for phones in pronunciations for length in range(1, len(phones))}
    used: Counter[tuple[Any, ...]] = Counter()
    numbers = []
    for phones in pronunciations:
        if counts[phones] > 1 or phones in prefixes:
            used[phones] += 1
        numbers.append(used[phones])
    return numbers


def _symbols(words: Sequence[str]) -> list[str]:
    return ["<eps>", *words, "#0", "<s>", "</s>"]


def _entries(lexicon: Lexicon, words: Sequence[str], phones: Sequence[str], pseudo_count: float,
             spoken: SpokenWords) -> list[tuple[int, tuple[int, ...], float]]:
    """Word label, phone ids and cost of every pronunciation."""
    phone_ids = {phone: index + 1 for index, phone in enumerate(phones)}
    unknown = sorted({phone for word in words for variant in lexicon[word] for phone in variant if phone not in phone_ids})
    if unknown:
        raise AsrKdError(f"lexicon: phones {' '.join(unknown[:10])} are not among the {len(phones)} phones of the HMM; "
                         "use the lexicon that the HMM was trained with")
    entries = []
    for label, word in enumerate(words, start=1):
        weights = [spoken.pronunciations[word, variant] + pseudo_count for variant in lexicon[word]]
        for variant, weight in zip(lexicon[word], weights, strict=True):
            entries.append((label, tuple(phone_ids[phone] for phone in variant), math.log(sum(weights) / weight)))
    return entries


def _report_left_out(folder: Path, vocabulary: Sequence[str], lexicon: Lexicon, num_words: int) -> dict[str, int]:
    known = set(vocabulary)
    lists = {"words_without_pronunciation": sorted(known - lexicon.pronunciations.keys() - set(_SPECIAL)),
             "words_not_in_lm": sorted(lexicon.pronunciations.keys() - known)}
    for name, words in lists.items():
        write_text(folder / f"{name}.txt", "".join(f"{word}\n" for word in words))
        if words:
            logger.warning("graph: %d %s cannot be recognised: %s ... (%s)", len(words), name.replace("_", " "), " ".join(words[:5]), folder / f"{name}.txt")
    if not num_words:
        raise AsrKdError(f"graph: none of the {len(vocabulary)} words of the language model is in the lexicon of {len(lexicon)} words; "
                         "check that both use the same case")
    return {name: len(words) for name, words in lists.items()}


def compile_grammar(plain: Path, word_table: Path) -> Any:
    """G from the copy that `read_vocabulary` made of an ARPA file; what kaldilm does not accept would abort the process.

    N-grams without their history among the shorter ones cannot be used; they are counted in the log.
    """
    messages = plain.with_name("arpa2fst.log")
    with _native_messages_to(messages):
        text = kaldilm.arpa2fst(str(plain), disambig_symbol="#0", read_symbol_table=str(word_table), max_arpa_warnings=-1)
    with open(messages, "rb") as lines:
        orphans = sum(b"no parent (n-1)-gram exists" in line for line in lines)
    if orphans:
        logger.warning("graph: %d n-grams of the language model are not used, as their histories are not among its shorter n-grams", orphans)
    grammar = kaldifst.compile(text)
    kaldifst.arcsort(grammar, "ilabel")
    return grammar


def _compose_lexicon(lexicon_fst: _LexiconFst, grammar: Any, phone_disambig: int, word_disambig: int) -> Any:
    fst = kaldifst.compile(lexicon_fst.text)
    kaldifst.add_self_loops(fst, [phone_disambig], [word_disambig])
    kaldifst.arcsort(fst, "olabel")
    lg = kaldifst.compose(fst, grammar)
    kaldifst.determinize_star(lg, use_log=True)
    kaldifst.minimize_encoded(lg)
    return lg


def _compose_context(lg: Any, first_disambig: int, num_disambig: int, path: Path) -> NDArray[np.int64]:
    """Write C o L o G to `path`; (K, 3) windows of phone ids by input label, -1 for epsilon and disambiguation symbols."""
    disambig = list(range(first_disambig, first_disambig + num_disambig))
    clg, labels = kaldifst.compose_context(disambig_syms=disambig, context_width=3, central_position=1, ifst=lg)
    if not kaldifst.StdConstFst(clg).write(str(path)):
        raise OSError(f"{path.name} is cut off")
    return np.array([label if len(label) == 3 else [-1, -1, -1] for label in labels], np.int64).reshape(-1, 3)


@contextmanager
def _native_messages_to(path: Path) -> Iterator[None]:
    """Send what a C++ library prints to standard error to a file, so that it does not cut into progress bars."""
    saved = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
