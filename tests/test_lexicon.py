"""Lexicons: formats, merging, errors with file and line, words without pronunciation."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.errors import AsrKdError
from asr_kd.lexicon import Lexicon, read_lexicon

SHARED = Path(__file__).parents[2] / "shared" / "data" / "lm"

CMUDICT = """\
;;; # CMUdict  --  Major Version: 0.07
'BOUT  B AW1 T
(BEGIN-PARENS  B IH0 G IH1 N P ER0 EH1 N Z
A  AH0
A(1)  EY1
READ  R EH1 D
READ(1)  R IY1 D
d'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french
"""


def write(folder: Path, text: str | bytes, name: str = "lexicon.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_kaldi_format(tmp_path: Path) -> None:
    lexicon = read_lexicon(write(tmp_path, "A AH\nA EY\nÉTÉ\tEY T EY\n"))
    assert lexicon.pronunciations == {"A": (("AH",), ("EY",)), "ÉTÉ": (("EY", "T", "EY"),)}
    assert lexicon.phones == ("AH", "EY", "T")


def test_cmudict_format_with_and_without_stress(tmp_path: Path) -> None:
    path = write(tmp_path, CMUDICT)
    lexicon = read_lexicon(path)
    assert lexicon["A"] == (("AH0",), ("EY1",))
    assert lexicon["READ"] == (("R", "EH1", "D"), ("R", "IY1", "D"))
    assert lexicon["(BEGIN-PARENS"] == (("B", "IH0", "G", "IH1", "N", "P", "ER0", "EH1", "N", "Z"),)
    assert lexicon["d'artagnan"][0][-3:] == ("Y", "AH0", "N")
    assert set(read_lexicon(path, strip_stress=True).phones) == {
        "AE", "AH", "AW", "B", "D", "EH", "ER", "EY", "G", "IH", "IY", "N", "NG", "P", "R", "T", "Y", "Z"}


def test_variants_that_differ_in_stress_alone_become_one(tmp_path: Path) -> None:
    path = write(tmp_path, "RECORD  R EH1 K ER0 D\nRECORD(1)  R EH0 K ER1 D\n")
    assert read_lexicon(path, strip_stress=True)["RECORD"] == (("R", "EH", "K", "ER", "D"),)


def test_probability_column_is_recognised_only_when_every_line_has_one(tmp_path: Path) -> None:
    assert read_lexicon(write(tmp_path, "A 1.0 AH\nA 0.25 EY\nBE 1 B IY\n")).pronunciations == {"A": (("AH",), ("EY",)), "BE": (("B", "IY"),)}
    assert read_lexicon(write(tmp_path, "A 2.5e-05 AH\nA .5 EY\nBE 1e-3 B IY\n")).pronunciations == {"A": (("AH",), ("EY",)), "BE": (("B", "IY"),)}
    with pytest.raises(AsrKdError, match=r"lexicon.txt:2: word 'A' has '0.25'"):
        read_lexicon(write(tmp_path, "A AH\nA 0.25 EY\n"))
    assert read_lexicon(write(tmp_path, "\u00een 1 n\ncasa k a s a\n"))["\u00een"] == (("1", "n"),)  # a vowel of X-SAMPA


def test_accents_are_composed(tmp_path: Path) -> None:
    assert read_lexicon(write(tmp_path, "cafe\u0301 k a f e\ncaf\u00e9 k a f e\n")).pronunciations == {"caf\u00e9": (("k", "a", "f", "e"),)}


def test_files_are_merged_and_doubles_removed(tmp_path: Path) -> None:
    first, second = write(tmp_path, "A AH\nB B IY\n", "1"), write(tmp_path, "A EY\nA AH\nC S IY\n", "2")
    assert read_lexicon([first, second]).pronunciations == {"A": (("AH",), ("EY",)), "B": (("B", "IY"),), "C": (("S", "IY"),)}


def test_case_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "the DH AH\nThe DH IY\n")
    assert read_lexicon(path)["the"] == (("DH", "AH"),)
    with pytest.raises(AsrKdError, match=r"'THE' is not in the lexicon of 2 words \('the' is: .* differ in case\)"):
        read_lexicon(path)["THE"]


def test_latin_1_windows_line_ends_and_byte_order_mark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latin = "A AH\r\nDÉJÀ  D EY2 ZH AA1\r\n".encode("latin-1")
    assert "DÉJÀ" in read_lexicon(write(tmp_path, latin))
    assert "read as Latin-1, for line 2 is not UTF-8" in caplog.text
    with pytest.raises(AsrKdError, match=r":3: not UTF-8, expected UTF-8 as in other lines"):
        read_lexicon(write(tmp_path, "VOILÀ V W AA L AA\n".encode() + latin))
    assert read_lexicon(write(tmp_path, "\ufeffA AH\r\n\r\nB B IY\r\n".encode())).pronunciations == {"A": (("AH",),), "B": (("B", "IY"),)}


def test_silence_entries_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert read_lexicon(write(tmp_path, "!SIL SIL\n<UNK> SPN\nA AH\n")).phones == ("AH", "SPN")
    assert "left out as silence: !SIL" in caplog.text


def test_lexicon_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"lexicon.txt: every entry stands for silence \(SIL\), expected words"):
        read_lexicon(write(tmp_path, "!SIL SIL\n<sil> SIL\n"))
    with pytest.raises(AsrKdError, match="no file given"):
        read_lexicon([])


@pytest.mark.parametrize(("text", "message"), [
    ("A AH\nBEE\n", r"lexicon.txt:2: word 'BEE' has no phones"),
    ("A 1.0 AH\nBEE 1.0\n", r"lexicon.txt:1: word 'A' has '1.0' for its first phone"),
    ("A 1.0 0.2 1.0 1.0 AH\nB 0.7 0.5 0.9 1.1 B IY\n", "lexicon.txt:1: word .A. has more than one number .*not lexiconp_silprob.txt"),
    ("A(1)\n", r"lexicon.txt:1: word 'A' has no phones"),
    ("A AH SIL\n", r"lexicon.txt:1: word 'A' has the silence phone"),
    ("A AH\n<s> AH\n", r"lexicon.txt:2: '<s>' is reserved"),
    ("A AH #1\n", r"lexicon.txt:1: word 'A' has the reserved symbol '#1'"),
    (";;; nothing here\n\n", r"no entry found"),
    (b"\x1f\x8b\x08\0\0", r"zero bytes, expected a text file"),
])
def test_malformed_files_are_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        read_lexicon(write(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match=r"nowhere.txt: lexicon could not be read \(No such file"):
        read_lexicon(tmp_path / "nowhere.txt")


def test_words_without_pronunciation_are_reported_or_generated() -> None:
    lexicon = Lexicon({"A": (("AH",),)})
    transcripts = {"u1": ("A", "A"), "u2": ("Q", "A", "B", "Q"), "u3": ()}
    assert lexicon.uncovered(transcripts) == {"u2": ["B", "Q"]}
    asked: list[str] = []

    def g2p(words: object) -> dict[str, tuple[tuple[str, ...], ...]]:
        asked.extend(words)  # type: ignore[call-overload]
        return {"B": (("AH", "AH"),), "Q": ()}

    extended, generated = lexicon.with_generated(["A", "B", "Q", "B"], g2p)
    assert asked == ["B", "Q"]
    assert generated.pronunciations == {"B": (("AH", "AH"),)}
    assert extended.uncovered(transcripts) == {"u2": ["Q"]}
    assert extended.phones == lexicon.phones


def test_words_of_another_case_are_an_error_where_they_are_most_of_the_missing() -> None:
    lexicon = Lexicon(dict.fromkeys("ABCD", (("AH",),)))
    with pytest.raises(AsrKdError, match=r"the text: 3 of 4 words are not in the lexicon of 4 words, 2 of them .* 'b' \('B' is: the .* and the text differ"):
        lexicon.check_case(["b", "c", "c", "x", "A"], "the text")
    lexicon.check_case(["b", "c", "A", "B"], "the text")  # half of the words are missing
    lexicon.check_case(["b", "x", "y"], "the text")  # most of them in any case
    lexicon.check_case([], "the text")


def test_empty_pronunciation_is_refused() -> None:
    with pytest.raises(AsrKdError, match="word 'A' has pronunciations"):
        Lexicon({"A": ((),)})


SYMBOL = st.text("ABCÉ'-_", min_size=1, max_size=5)
PRONUNCIATIONS = st.lists(st.lists(SYMBOL, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3, unique=True).map(tuple)


@settings(deadline=None, max_examples=50)
@given(pronunciations=st.dictionaries(SYMBOL, PRONUNCIATIONS, min_size=1))
def test_written_lexicon_reads_back(tmp_path_factory: pytest.TempPathFactory, pronunciations: dict[str, tuple[tuple[str, ...], ...]]) -> None:
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.txt"
    Lexicon(pronunciations).write(path)
    assert read_lexicon(path).pronunciations == pronunciations


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/lm is not here")
def test_real_lexicon() -> None:
    lexicon = read_lexicon([SHARED / "lexicon.txt", SHARED / "lexicon_generated.txt"])
    lines = sum(len((SHARED / name).read_text().splitlines()) for name in ("lexicon.txt", "lexicon_generated.txt"))
    assert len(lexicon.phones) == 39
    assert sum(len(lexicon[word]) for word in lexicon) == lines
