"""The decoder against exhaustive search over word sequences, pronunciations, silences and alignments of toy tasks."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from toy_graph import exhaustive_search, state_sequence, toy_hmm

from asr_kd.decode import (
    Decoder,
    DecodeSettings,
    decode,
    decode_parallel,
    read_trn,
    real_time_factor,
    tune,
    unfinished_utterances,
    write_trn,
)
from asr_kd.errors import AsrKdError
from asr_kd.graph import INFO, WORDS, build_graph
from asr_kd.hmm.model import HmmModel
from asr_kd.lexicon import Lexicon, SpokenWords
from asr_kd.lm import Arpa, estimate_kneser_ney, write_arpa

WIDE = DecodeSettings(acoustic_scale=0.5, beam=1000.0, max_active=1_000_000)
# A and AY: one begins with the other; RED and READ: homophones, and READ has a second pronunciation
LEXICON = Lexicon({"A": (("A",),), "AY": (("A", "Y"),), "RED": (("R", "E"),), "READ": (("R", "E"), ("R", "Y"))})
TEXT = [("A", "RED"), ("READ", "A"), ("A", "AY"), ("RED", "A"), ("RED",), ("AY", "READ", "A")]
SEEN = SpokenWords(Counter({("READ", ("R", "Y")): 98}), Counter({("RED", True): 7, ("RED", False): 1, ("<s>", False): 18}))
PROBABILITIES = {("READ", ("R", "E")): 1 / 100, ("READ", ("R", "Y")): 99 / 100}  # of these counts, each with one more
SILENCES = {"RED": 7.6 / 10, "<s>": 0.6 / 20}  # with two more, at the model's probability of 0.3
TOLERANCE = 0.02  # minimisation rounds weights to 1/1024


class Toy:
    """Graph folder, model and language model of the toy task; an odd one has seen how words are said."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        spoken, self.probabilities, self.silences = (SEEN, PROBABILITIES, SILENCES) if seed % 2 else (None, {}, {})
        self.hmm: HmmModel = toy_hmm(LEXICON.phones, seed=seed)
        self.arpa: Arpa = estimate_kneser_ney(TEXT, order=2)
        write_arpa(self.arpa, folder / "lm.arpa.gz")
        build_graph(LEXICON, folder / "lm.arpa.gz", self.hmm, folder / "graph", spoken=spoken)

    def posteriors(self, num_frames: int, seed: int) -> NDArray[np.float32]:
        logits = 2 * np.random.default_rng(seed).standard_normal((num_frames, self.hmm.num_states))
        return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)

    def frame_costs(self, log_posteriors: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
        return -scale * (log_posteriors - self.hmm.log_priors).astype(np.float64)

    def decoder(self, settings: DecodeSettings = WIDE) -> Decoder:
        return Decoder(self.folder / "graph", self.hmm.log_priors, settings)


@pytest.fixture(scope="module", params=[0, 1, 2])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), request.param)


@pytest.mark.parametrize(("num_frames", "seed"), [(3, 1), (7, 2), (10, 3), (12, 4)])
def test_finds_the_path_of_exhaustive_search(toy: Toy, num_frames: int, seed: int) -> None:
    log_posteriors = toy.posteriors(num_frames, seed)
    plain = exhaustive_search(LEXICON, toy.arpa, toy.hmm, toy.frame_costs(log_posteriors, 0.5), toy.probabilities, toy.silences)
    for penalty in (0.0, 1.5, -1.0):
        found = toy.decoder(DecodeSettings(0.5, penalty, WIDE.beam, WIDE.max_active)).decode("utt", log_posteriors)
        costs = {words: cost + penalty * len(words) for words, cost in plain.items()}
        assert found.reached_final
        assert found.cost == pytest.approx(min(costs.values()), abs=TOLERANCE)
        assert costs[found.words] == pytest.approx(min(costs.values()), abs=TOLERANCE)


def test_word_insertion_penalty_never_adds_words(toy: Toy) -> None:
    log_posteriors = toy.posteriors(24, 5)
    lengths = [len(toy.decoder(DecodeSettings(0.5, penalty, 1000.0, 10**6)).decode("utt", log_posteriors).words) for penalty in (-8, -2, 0, 2, 8)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


@pytest.mark.parametrize("words", [("A", "AY", "A"), ("AY", "RED", "A"), ("RED",)])
def test_posteriors_of_known_states_give_their_words(toy: Toy, words: tuple[str, ...]) -> None:
    phones = [toy.hmm.phones.index(phone) + 1 for word in words for phone in LEXICON[word][0]]
    states = np.repeat(state_sequence([1, *phones, 1], toy.hmm), 2)
    posteriors = np.full((len(states), toy.hmm.num_states), 1e-6, np.float32)
    posteriors[np.arange(len(states)), states] = 1
    found = toy.decoder(DecodeSettings(1.0)).decode("utt", np.log(posteriors))
    assert [LEXICON[word][0] for word in found.words] == [LEXICON[word][0] for word in words]  # RED or READ: the language model decides
    assert found.reached_final
    assert found.num_frames == len(states)


def test_too_few_frames_end_away_from_a_final_state_and_are_counted(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    utterances = [("short", toy.posteriors(2, 1)), ("empty", toy.posteriors(0, 1)), ("fine", toy.posteriors(9, 1))]
    with caplog.at_level(logging.WARNING):
        found = decode(toy.folder / "graph", utterances, toy.hmm.log_priors, WIDE)
    assert unfinished_utterances(found) == ["short", "empty"]
    assert "2 of 3 utterances ended away from a final state" in caplog.text


def test_processes_agree_with_one(toy: Toy) -> None:
    utterances = [(f"utt{n}", toy.posteriors(5 + n, n)) for n in range(12)]
    alone, together = (decode(toy.folder / "graph", iter(utterances), toy.hmm.log_priors, WIDE, num_jobs) for num_jobs in (1, 3))
    assert list(alone) == list(together) == [utt_id for utt_id, _ in utterances]
    assert [(h.words, h.cost) for h in alone.values()] == [(h.words, h.cost) for h in together.values()]
    assert real_time_factor(alone) == pytest.approx(sum(h.decode_s for h in alone.values()) / (sum(range(5, 17)) * 0.01))


def test_few_utterances_are_held_at_a_time(toy: Toy) -> None:
    taken = 0

    def stream() -> Iterator[tuple[str, NDArray[np.float32]]]:
        nonlocal taken
        for n in range(40):
            taken += 1
            yield f"utt{n}", toy.posteriors(6, n)

    for done, _ in enumerate(decode_parallel(toy.decoder(), stream(), num_jobs=2), start=1):
        assert taken - done < 6  # three per process


def test_an_error_in_a_process_reaches_the_caller(toy: Toy) -> None:
    utterances = [("good", toy.posteriors(6, 1)), ("bad", toy.posteriors(6, 1) * np.float32(np.nan)), ("good2", toy.posteriors(6, 1))]
    with pytest.raises(AsrKdError, match="bad: NaN or infinity"):
        decode(toy.folder / "graph", utterances, toy.hmm.log_priors, WIDE, num_jobs=2)


ENDLESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_decode import Toy, decode_parallel
toy = Toy(Path({folder!r}), 0)
utterances = ((str(n), toy.posteriors(6, n)) for n in range(10**9))
for hypothesis in decode_parallel(toy.decoder(), utterances, 2):
    print(hypothesis.utt_id, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, end: signal.Signals) -> None:
    """They hold its standard output, and its lock, as long as they live."""
    script = ENDLESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"0\n"
    process.send_signal(end)
    process.communicate(timeout=20)  # until nobody holds the pipe


def test_tuning_finds_the_best_of_the_grid(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    utterances = [(f"utt{n}", toy.posteriors(15 + n, n)) for n in range(6)]
    references = {utt_id: ("A", "RED") for utt_id, _ in utterances}
    penalties = (-4.0, 0.0, 4.0)
    tuned = tune(toy.folder / "graph", lambda: utterances, references, toy.hmm.log_priors, {"word_insertion_penalty": penalties}, WIDE)
    tried = {settings.word_insertion_penalty: errors for settings, errors in tuned.tried}
    assert set(tried) == set(penalties)
    assert tried[tuned.settings.word_insertion_penalty].errors == min(errors.errors for errors in tried.values())
    assert tried[-4.0].insertions > tried[4.0].insertions
    assert ("is the last of -4, 0, 4 that were tried" in caplog.text) == (tuned.settings.word_insertion_penalty != 0.0)
    chosen = tuned.settings.word_insertion_penalty
    tune(toy.folder / "graph", lambda: utterances, references, toy.hmm.log_priors, {"word_insertion_penalty": (chosen, chosen + 50)}, WIDE)
    assert f"word insertion penalty {chosen:g} is the last of {chosen:g}, {chosen + 50:g}" in caplog.text
    assert all(errors.words == 12 for errors in tried.values())


def test_word_table_of_another_graph_is_refused(toy: Toy, tmp_path: Path) -> None:
    for path in (toy.folder / "graph").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = (tmp_path / WORDS).read_text().splitlines()
    table[1], table[2] = table[2].replace(" 2", " 1"), table[1].replace(" 1", " 2")
    (tmp_path / WORDS).write_text("\n".join(table) + "\n")
    with pytest.raises(AsrKdError, match=r"words\.txt: fingerprint .* run the graph stage again"):
        Decoder(tmp_path, toy.hmm.log_priors)
    (tmp_path / INFO).unlink()
    with pytest.raises(AsrKdError, match=r"graph\.json"):
        Decoder(tmp_path, toy.hmm.log_priors)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda p: p[:, :-1], r"utt: log posteriors of shape \(6, 39\), expected \(frames, 40\)"),
     (lambda p: np.where(np.arange(6)[:, None] == 4, np.float32(np.nan), p), "utt: NaN or infinity in the log posteriors at frame 4")],
)
def test_bad_posteriors_are_refused(toy: Toy, spoil: Callable[[NDArray[np.float32]], NDArray[np.float32]], message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        toy.decoder().decode("utt", spoil(toy.posteriors(6, 1)))


def test_bad_priors_and_doubled_utterances_are_refused(toy: Toy) -> None:
    with pytest.raises(AsrKdError, match=r"log priors of shape \(39,\), expected 40 finite values"):
        Decoder(toy.folder / "graph", toy.hmm.log_priors[:-1])
    with pytest.raises(AsrKdError, match="expected 40 finite values"):
        Decoder(toy.folder / "graph", np.full(40, -math.inf))
    with pytest.raises(AsrKdError, match="utt: given twice"):
        decode(toy.folder / "graph", [("utt", toy.posteriors(6, 1))] * 2, toy.hmm.log_priors)


def test_trn_round_trip_and_cut_off_line(tmp_path: Path) -> None:
    hypotheses = {"1-2-0003": ("IT'S", "FINE"), "1-2-0004": ()}
    write_trn(tmp_path / "dev.trn", hypotheses)
    assert (tmp_path / "dev.trn").read_text() == "IT'S FINE (1-2-0003)\n(1-2-0004)\n"
    assert read_trn(tmp_path / "dev.trn") == hypotheses
    (tmp_path / "dev.trn").write_text("IT'S FINE (1-2-0003)\nAND THEN (1-2")
    with pytest.raises(AsrKdError, match="line 2"):
        read_trn(tmp_path / "dev.trn")
