"""Language models: sums to one, hand-worked Kneser-Ney, ARPA files."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.errors import AsrKdError
from asr_kd.lm import Arpa, estimate_kneser_ney, kneser_ney_discounts, read_arpa, read_vocabulary, write_arpa

REAL = Path(__file__).parents[2] / "shared" / "data"
SENTENCES = st.lists(st.lists(st.sampled_from("ABCD"), max_size=6), min_size=1, max_size=12)

# Back-off weight of B is above 0, which is legal: P(. | B) = 0.1 for A, and 10^0.2 times the unigram for the others
BY_HAND = """
\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-99\t<s>\t-0.3
-0.5\t</s>
-0.4\tA\t-0.1
-0.6\tB\t0.2

\\2-grams:
-0.25\t<s> A
-1\tB A

\\end\\
"""


@settings(deadline=None, max_examples=40)
@given(SENTENCES, st.integers(1, 4))
def test_probabilities_sum_to_one_for_every_history(sentences: list[list[str]], order: int) -> None:
    arpa = estimate_kneser_ney(sentences, order, vocabulary=["E"])
    words = [*arpa.vocabulary, "</s>"]
    for length in range(order):
        for history in itertools.product(["<s>", *arpa.vocabulary], repeat=length):
            assert math.fsum(10 ** arpa.log10_prob(history, word) for word in words) == pytest.approx(1, abs=1e-9)


def test_bigram_worked_by_hand() -> None:
    arpa = estimate_kneser_ney([("A", "B"), ("A", "B"), ("A", "C"), ("C", "B")], order=2)
    # bigrams: <s>A 3, AB 2, B</s> 3, AC 1, C</s> 1, <s>C 1, CB 1: n1 = 4, n2 = 1, n3 = 2, n4 = 0, so one discount 4 / (4 + 2) = 2/3
    d = 2 / 3
    # distinct words before: A 1 (<s>), B 2 (A, C), C 2 (A, <s>), </s> 2 (B, C); n1 = 1, n2 = 3: discount 1/7; uniform over four
    freed = 4 * (1 / 7) / 7
    unigram = {word: (n - 1 / 7) / 7 + freed / 4 for word, n in (("A", 1), ("B", 2), ("C", 2), ("</s>", 2))}
    assert {word: 10 ** arpa.ngrams[0][(word,)][0] for word in unigram} == pytest.approx(unigram)
    assert 10 ** arpa.log10_prob(["A"], "B") == pytest.approx((2 - d) / 3 + (2 * d / 3) * unigram["B"])
    assert 10 ** arpa.log10_prob(["A"], "A") == pytest.approx((2 * d / 3) * unigram["A"])  # not seen
    assert 10 ** arpa.log10_prob(["<s>"], "C") == pytest.approx((1 - d) / 4 + (2 * d / 4) * unigram["C"])


def test_middle_orders_count_distinct_words_before() -> None:
    """The trigram model's bigram A B: seen three times, after two distinct words, of three such continuations of A."""
    text = [("X", "A", "B"), ("Y", "A", "B"), ("Y", "A", "B"), ("X", "A", "C")]
    arpa = estimate_kneser_ney(text, order=3)
    bigram_counts = {("A", "B"): 2, ("A", "C"): 1, ("B", "</s>"): 1, ("C", "</s>"): 1, ("X", "A"): 1, ("Y", "A"): 1, ("<s>", "X"): 2, ("<s>", "Y"): 2}
    d1, d2, _ = kneser_ney_discounts(bigram_counts.values())
    below = 10 ** arpa.ngrams[0][("B",)][0]
    assert 10 ** arpa.ngrams[1]["A", "B"][0] == pytest.approx((2 - d2) / 3 + (d1 + d2) / 3 * below)


def test_more_text_lowers_perplexity_on_more_of_the_same() -> None:
    text = [("THE", "CAT", "SAT"), ("THE", "DOG", "SAT"), ("A", "CAT", "RAN")] * 3
    perplexities = [estimate_kneser_ney(text, order).perplexity(text).perplexity for order in (1, 2, 3)]
    assert perplexities == sorted(perplexities, reverse=True)


def test_perplexity_by_hand(tmp_path: Path) -> None:
    (tmp_path / "hand.arpa").write_text(BY_HAND)
    found = read_arpa(tmp_path / "hand.arpa").perplexity([("A", "B", "B", "A"), ("A", "Z")])
    # <s> A -0.25, A B -0.1 - 0.6, B B 0.2 - 0.6, B A -1, A </s> -0.1 - 0.5; then <s> A -0.25, Z unknown, </s> after it -0.5
    assert found.perplexity == pytest.approx(10 ** ((0.25 + 0.7 + 0.4 + 1 + 0.6 + 0.25 + 0.5) / 7))
    assert (found.tokens, found.unknown) == (7, 1)


@settings(deadline=None, max_examples=20)
@given(SENTENCES, st.integers(1, 4), st.booleans())
def test_arpa_round_trip(tmp_path_factory: pytest.TempPathFactory, sentences: list[list[str]], order: int, packed: bool) -> None:
    arpa = estimate_kneser_ney(sentences, order)
    path = tmp_path_factory.mktemp("lm") / ("lm.arpa.gz" if packed else "lm.arpa")
    write_arpa(arpa, path)
    again = read_arpa(path)
    assert [list(ngrams) for ngrams in again.ngrams] == [list(ngrams) for ngrams in arpa.ngrams]
    for ngrams, expected in zip(again.ngrams, arpa.ngrams, strict=True):
        assert all(ngrams[ngram] == pytest.approx(values, rel=1e-6) for ngram, values in expected.items())
    assert read_vocabulary(path) == arpa.vocabulary


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real language model at {REAL}")
def test_real_model_sums_to_one_and_has_its_published_perplexity() -> None:
    """30,000 words, rounded to three decimals in the file; its README gives perplexity 228 on dev-mini."""
    arpa = read_arpa(REAL / "lm" / "lm_small.arpa.gz")
    assert [len(ngrams) for ngrams in arpa.ngrams] == [30002, 366738, 221793]
    words = [*arpa.vocabulary, "</s>"]
    for history in ((), ("<s>", "THE"), ("THAT", "SORT")):  # the last has a back-off weight above 0
        assert math.fsum(10 ** arpa.log10_prob(history, word) for word in words) == pytest.approx(1, abs=1e-3)
    with tarfile.open(REAL / "mini-librispeech-opus.tar") as corpus:
        transcripts = [member for member in corpus.getmembers() if "/dev-mini/" in member.name and member.name.endswith(".trans.txt")]
        lines = [line for member in transcripts for line in io.TextIOWrapper(corpus.extractfile(member), encoding="utf-8")]
    found = arpa.perplexity(line.split()[1:] for line in lines)
    assert round(found.perplexity) == 228
    assert found.unknown == round(0.0198 * 4957)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda text: text[: text.index("-1\tB A")], r"cut off .*1 of 2 2-grams, no \\end\\"),
     (lambda text: text.replace("-1\tB A\n", ""), r"cut off .*1 of 2 2-grams\)"),
     (lambda text: text.replace("\\end\\", ""), r"cut off .*no \\end\\"),
     (lambda text: text.replace("-1\tB A", "-1\tB A C -1"), r"line 14 is '-1\\tB A C -1', expected a log10 probability \(finite, at most 0\), 2 words"),
     (lambda text: text.replace("-1\tB A", "x\tB A"), "line 14"),
     *((lambda text, value=value: text.replace("-1\tB A", f"{value}\tB A"), "line 14 .*expected a log10 probability")
       for value in ("-inf", "nan", "0.1", "-1e39", "-1_0", "-\u0661")),
     *((lambda text, value=value: text.replace("B\t0.2", f"B\t{value}"), "line 10 .*finite back-off weight") for value in ("inf", "nan", "-inf", "1e39")),
     (lambda text: text.replace("-1\tB A", "-1\tB \0A"), "line 14"),
     (lambda text: text.replace("-1\tB A", "-1\tB #0"), "line 14 .*not the reserved #0 or <eps>; remove it"),
     (lambda text: text.replace("-0.6\tB", "-0.6\tA"), "line 10 holds 'A' a second time"),
     (lambda text: text.replace("-99\t<s>\t-0.3\n", "").replace("1=4", "1=3"), "no <s> among the 3 1-grams, expected both <s> and </s>"),
     (lambda text: text.replace("-0.5\t</s>\n", "").replace("1=4", "1=3"), "no </s> among the 3 1-grams"),
     (lambda text: text.replace("2-grams:", "3-grams:"), r"line 12 is '\\\\3-grams:', expected '\\\\2-grams:'"),
     (lambda text: text.replace("ngram 2=2", "ngram 2=2\nngram 3=0"), "cut off .*0 of 0 3-grams"),
     (lambda text: text.replace("\\data\\", ""), "not an ARPA file"),
     (lambda text: text.replace("ngram 2=2", "ngram 2=2\nngram 0=0"), "line 5 is 'ngram 0=0'"),
     (lambda text: text.replace("ngram 2=2", "ngram 2"), "line 4"),
     (lambda text: "<html>", "not an ARPA file"),
     (lambda text: "", "not an ARPA file")],
)
def test_damaged_arpa_is_one_line_error(tmp_path: Path, spoil: Callable[[str], str], message: str) -> None:
    (tmp_path / "bad.arpa").write_text(spoil(BY_HAND))
    for read in (read_arpa, read_vocabulary):
        with pytest.raises(AsrKdError, match=message) as caught:
            read(tmp_path / "bad.arpa")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda text: "\ufeff" + text.lstrip(),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace(" ", "\u3000").replace("ngram\u3000", "ngram "),
    lambda text: text.replace("<s> A\n", "<s>  A \t0\n"),  # a back-off weight in the highest order
    lambda text: "ngram models are\n\n" + text.replace("ngram 1=", "made by hand\nngram 1 = ").replace("\\end\\\n", "\\end\\"),
])
def test_forms_of_arpa_are_read_alike_and_copied_in_the_plainest(tmp_path: Path, change: Callable[[str], str]) -> None:
    copies = []
    for name, text in (("plain.arpa", BY_HAND), ("odd.arpa", change(BY_HAND))):
        (tmp_path / name).write_bytes(text.encode())
        copy = io.StringIO()
        assert read_vocabulary(tmp_path / name, copy) == ["A", "B"]
        copies.append(copy.getvalue().replace("1 = 4", "1=4"))
    assert copies[0] == BY_HAND.replace("\t", " ").replace("\n\n", "\n").removeprefix("\n")
    assert copies[1] == copies[0]
    assert read_arpa(tmp_path / "odd.arpa") == read_arpa(tmp_path / "plain.arpa")


def test_a_probability_rounded_to_just_above_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "rounded.arpa").write_text(BY_HAND.replace("-1\tB A", "5e-7\tB A"))
    assert read_arpa(tmp_path / "rounded.arpa").ngrams[1]["B", "A"] == (5e-7, 0.0)


def test_cut_off_gzip_and_missing_file(tmp_path: Path) -> None:
    packed = gzip.compress(BY_HAND.encode())
    (tmp_path / "cut.arpa.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(AsrKdError, match=r"cut\.arpa\.gz: cut off"):
        read_arpa(tmp_path / "cut.arpa.gz")
    (tmp_path / "packed.arpa").write_bytes(packed)
    (tmp_path / "unpacked.arpa").write_text(BY_HAND)
    assert read_arpa(tmp_path / "packed.arpa") == read_arpa(tmp_path / "unpacked.arpa")
    (tmp_path / "plain.arpa.gz").write_text(BY_HAND)
    with pytest.raises(AsrKdError, match=r"plain\.arpa\.gz: could not be read"):
        read_arpa(tmp_path / "plain.arpa.gz")
    with pytest.raises(AsrKdError, match=r"none\.arpa: could not be read \(No such file"):
        read_arpa(tmp_path / "none.arpa")
    (tmp_path / "latin.arpa").write_bytes(BY_HAND.replace("B", "\u00c9").encode("latin-1"))
    with pytest.raises(AsrKdError, match=r"latin\.arpa: not readable as text .*; save it as UTF-8"):
        read_arpa(tmp_path / "latin.arpa")
    (tmp_path / "apart.arpa").write_text(BY_HAND.replace("B", "E\u0301"))
    assert ("\u00c9",) in read_arpa(tmp_path / "apart.arpa").ngrams[0]


@pytest.mark.parametrize(
    ("sentences", "order", "message"),
    [([("A",)], 5, "order 5, expected 1 to 4"), ([], 2, "no text"), ([("A",), ("<s>", "A")], 2, "sentence 2")],
)
def test_bad_text_is_refused(sentences: list[tuple[str, ...]], order: int, message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        estimate_kneser_ney(sentences, order)


def test_unknown_word_without_unk() -> None:
    assert Arpa(({("</s>",): (0.0, 0.0)},)).log10_prob((), "Z") == -math.inf
    assert Arpa(({("</s>",): (-0.1, 0.0), ("<unk>",): (-0.7, 0.0)},)).log10_prob((), "Z") == -0.7
    assert Arpa(({("</s>",): (-0.1, 0.0), ("<UNK>",): (-0.6, 0.0)},)).log10_prob((), "Z") == -0.6


def test_unknown_words_of_the_history_count_as_unk() -> None:
    unigrams = {("A",): (-0.3, 0.0), ("<unk>",): (-0.7, -0.2), ("</s>",): (-0.5, 0.0)}
    arpa = Arpa((unigrams, {("<unk>", "A"): (-0.1, 0.0), ("<unk>", "<unk>"): (-0.4, 0.0)}))
    assert arpa.log10_prob(("A", "Z"), "A") == -0.1
    assert arpa.log10_prob(("Z",), "Y") == -0.4
    assert arpa.log10_prob(("Z",), "</s>") == pytest.approx(-0.7)
