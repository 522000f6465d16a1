"""Generated pronunciations: only the lexicon's phones, near CMUdict's, and clear behaviour without espeak-ng."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

import asr_kd.espeak
from asr_kd.errors import AsrKdError
from asr_kd.espeak import espeak, espeak_is_installed
from asr_kd.g2p import EspeakG2P, complete_lexicon
from asr_kd.lexicon import Lexicon, read_lexicon
from asr_kd.manifest import Utterance

SHARED = Path(__file__).parents[2] / "shared" / "data" / "lm"
CMU_PHONES = tuple("AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split())  # noqa: SIM905

needs_espeak = pytest.mark.skipif(not espeak_is_installed(), reason="espeakng-loader is not installed (extra: demo)")


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    if not left or not right:
        return len(left) + len(right)
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


@needs_espeak
def test_known_words() -> None:
    g2p = EspeakG2P(CMU_PHONES)
    assert g2p(["CAT", "STORY", "DISCOVERY", "THING", "JUDGE", "BUTTON"]) == {
        "CAT": (("K", "AE", "T"),),
        "STORY": (("S", "T", "AO", "R", "IY"),),  # one R, though espeak writes two
        "DISCOVERY": (("D", "IH", "S", "K", "AH", "V", "ER", "IY"),),
        "THING": (("TH", "IH", "NG"),),
        "JUDGE": (("JH", "AH", "JH"),),
        "BUTTON": (("B", "AH", "T", "AH", "N"),),
    }


@needs_espeak
def test_words_without_letters_or_with_digits_get_none() -> None:
    assert set(EspeakG2P(CMU_PHONES)(["'", "12", "A4", "-", "", "<unk>", "[NOISE]", "!SIL"]).values()) == {()}


@needs_espeak
def test_words_that_espeak_would_spell_or_explain_get_none() -> None:
    words = ["II", "XXIV", "\u65e5\u672c", "\u30a2\u30ea\u30b9", "\u039c\u0391\u039d\u0391", "\u043c\u0438\u0440"]
    assert EspeakG2P(CMU_PHONES)(words) == dict.fromkeys(words, ())
    spoken = EspeakG2P(CMU_PHONES)(["ROMAN", "DIM", "MILD", "CAFE\u0301", "CAF\u00c9"])
    assert all(spoken.values())
    assert spoken["CAFE\u0301"] == spoken["CAF\u00c9"]


@needs_espeak
def test_stress_digits_where_the_lexicon_has_them() -> None:
    stressed = [phone + digit for phone in CMU_PHONES if phone[0] in "AEIOU" for digit in "012"]
    consonants = [phone for phone in CMU_PHONES if phone[0] not in "AEIOU"]
    assert EspeakG2P(stressed + consonants)(["BANANA"])["BANANA"] == (("B", "AH0", "N", "AE1", "N", "AH0"),)


@needs_espeak
@pytest.mark.parametrize(("endings", "banana"), [
    (("1",), "B AH1 N AE1 N AH1"), (("0", "2"), "B AH0 N AE2 N AH0"), (("0", "1"), "B AH0 N AE1 N AH0"), (("", "1"), "B AH N AE1 N AH"),
])
def test_a_stress_digit_that_the_lexicon_lacks_becomes_the_nearest(endings: tuple[str, ...], banana: str) -> None:
    vowels = [phone + ending for phone in CMU_PHONES if phone[0] in "AEIOU" for ending in endings]
    g2p = EspeakG2P(vowels + [phone for phone in CMU_PHONES if phone[0] not in "AEIOU"])
    assert g2p(["BANANA"])["BANANA"] == (tuple(banana.split()),)


@needs_espeak
def test_a_vowel_that_lacks_one_digit_stays_that_vowel() -> None:
    phones = [phone + digit for phone in CMU_PHONES if phone[0] in "AEIOU" for digit in "012"] + [phone for phone in CMU_PHONES if phone[0] not in "AEIOU"]
    g2p = EspeakG2P([phone for phone in phones if phone not in ("OY2", "UW0", "AW0")])
    assert [g2p._nearest(*phone) for phone in (("OY", "2"), ("UW", "0"), ("AW", "0"), ("AW", "1"))] == ["OY1", "UW1", "AW1", "AW1"]


@needs_espeak
def test_phones_that_the_lexicon_lacks_become_the_nearest() -> None:
    small = [phone for phone in CMU_PHONES if phone not in ("ZH", "UH", "AO", "DH", "ER")]
    found = EspeakG2P(small)(["VISION", "GOOD", "THOUGHT", "THIS", "BIRD"])
    assert {phone for variants in found.values() for phone in variants[0]} <= set(small)
    assert found["VISION"] == (("V", "IH", "SH", "AH", "N"),)


@needs_espeak
def test_a_lexicon_that_is_not_arpabet_is_refused() -> None:
    with pytest.raises(AsrKdError, match="hold none like ARPAbet"):
        EspeakG2P(["a", "b", "tʃ"])


@needs_espeak
def test_unknown_voice_is_an_error() -> None:
    with pytest.raises(AsrKdError, match="no voice 'xx-nowhere'"):
        espeak().set_voice("xx-nowhere")


@needs_espeak
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/lm is not here")
def test_phone_error_rate_against_cmudict() -> None:
    lexicon = read_lexicon(SHARED / "lexicon.txt")
    words = random.Random(1).sample(sorted(lexicon), 3000)
    generated = EspeakG2P(lexicon.phones)(words)
    pronounced = [word for word in words if generated[word]]
    nearest = {word: min(lexicon[word], key=lambda variant: edit_distance(generated[word][0], variant)) for word in pronounced}
    errors = {word: edit_distance(generated[word][0], nearest[word]) for word in pronounced}
    phones = sum(map(len, nearest.values()))
    rate = sum(errors.values()) / phones
    print(f"\nphone error rate {rate:.4f} ({sum(errors.values())}/{phones}), words with errors "
          f"{sum(map(bool, errors.values()))}/{len(pronounced)}, not pronounced {len(words) - len(pronounced)}")
    assert len(pronounced) >= 0.998 * len(words)
    assert rate < 0.05  # 0.0453 when written


def utterances(**transcripts: str) -> list[Utterance]:
    return [Utterance(utt_id, 1.0, Path("a.flac"), "s", tuple(text.split())) for utt_id, text in transcripts.items()]


@needs_espeak
def test_complete_lexicon_with_espeak() -> None:
    lexicon = Lexicon({"THE": (("DH", "AH"),), "ALL": (CMU_PHONES,)})
    extended, generated, exclusions = complete_lexicon(lexicon, utterances(a="THE CAT", b="THE 7TH CAT", c="THE"))
    assert set(generated) == {"CAT"}
    assert extended.phones == lexicon.phones
    assert [(exclusion.utt_id, exclusion.reason) for exclusion in exclusions] == [("b", "no pronunciation for: 7TH")]


@needs_espeak
def test_complete_lexicon_pronounces_the_words_of_the_language_model() -> None:
    lexicon = Lexicon({"THE": (("DH", "AH"),), "ALL": (CMU_PHONES,)})
    extended, generated, exclusions = complete_lexicon(lexicon, utterances(a="THE CAT"), lm_words=["THE", "DOG", "<unk>"])
    assert set(generated) == {"CAT", "DOG"}
    assert extended["DOG"] == (("D", "AA", "G"),)
    assert exclusions == []


@pytest.mark.parametrize("use_g2p", [False, True])
def test_another_case_than_the_lexicon_is_an_error(use_g2p: bool) -> None:
    lexicon = Lexicon({"THE": (("DH", "AH"),), "CAT": (("K", "AE", "T"),)})
    with pytest.raises(AsrKdError, match=r"the transcripts: 3 of 3 words are not in the lexicon .*, 2 of them .* 'cat' \('CAT' is: .* differ in case\)"):
        complete_lexicon(lexicon, utterances(a="the cat", b="the dog"), use_g2p)
    with pytest.raises(AsrKdError, match=r"the language model: 2 of 2 words .* the lexicon and the language model differ in case"):
        complete_lexicon(lexicon, utterances(a="THE CAT"), use_g2p, lm_words={"the", "cat"})


def test_complete_lexicon_without_espeak(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(asr_kd.espeak, "espeak_is_installed", lambda: False)
    espeak.cache_clear()
    lexicon = Lexicon({"THE": (("DH", "AH"),)})
    extended, generated, exclusions = complete_lexicon(lexicon, utterances(a="THE CAT", c="THE"))
    assert extended == lexicon
    assert len(generated) == 0
    assert [(exclusion.utt_id, exclusion.reason) for exclusion in exclusions] == [("a", "no pronunciation for: CAT")]
    assert "pip install 'asr-kd[demo]'" in caplog.text


@needs_espeak
def test_complete_lexicon_that_is_not_arpabet(caplog: pytest.LogCaptureFixture) -> None:
    lexicon = Lexicon({"THE": (("ð", "ə"),)})
    extended, generated, exclusions = complete_lexicon(lexicon, utterances(a="THE CAT", c="THE"))
    assert (extended, len(generated), len(exclusions)) == (lexicon, 0, 1)
    assert "expected ARPAbet phones" in caplog.text


def test_error_without_espeak_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asr_kd.espeak, "espeak_is_installed", lambda: False)
    espeak.cache_clear()
    with pytest.raises(AsrKdError, match=r"not installed, .* pip install 'asr-kd\[demo\]'"):
        espeak()
