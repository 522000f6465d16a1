"""The graph: files, word lists, agreement of the ARPA readers, and ConstFst files against kaldifst."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import kaldifst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_graph import toy_hmm

from asr_kd.const_fst import ConstFst, ConstFstWriter, check_const_fst, copy_with_word_cost, map_const_fst
from asr_kd.errors import AsrKdError
from asr_kd.graph import GRAPH, GraphSettings, build_graph, compile_grammar, disambiguation_numbers, lexicon_fst_text, read_graph_info
from asr_kd.hclg import write_hclg
from asr_kd.hmm.model import untied_model
from asr_kd.lexicon import Lexicon, SpokenWords
from asr_kd.lm import estimate_kneser_ney, read_vocabulary, write_arpa

LEXICON = Lexicon({"A": (("A",),), "AY": (("A", "Y"),), "RED": (("R", "E"),), "READ": (("R", "E"), ("R", "Y")), "NEVER": (("E",),)})
TEXT = [("A", "RED"), ("READ", "A"), ("A", "AY"), ("RED", "UNHEARD"), ("AY", "READ", "A")]


@pytest.fixture(scope="module")
def arpa_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    write_arpa(estimate_kneser_ney(TEXT, order=3), path)
    return path


def as_text(path: Path) -> list[str]:
    return sorted(kaldifst.StdConstFst.read(str(path)).to_str(show_weight_one=True).splitlines())


def test_words_that_cannot_be_recognised_are_counted_and_listed(arpa_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        info = build_graph(LEXICON, arpa_path, toy_hmm(LEXICON.phones), tmp_path)
    assert (info["num_words"], info["words_without_pronunciation"], info["words_not_in_lm"]) == (4, 1, 1)
    assert (tmp_path / "words_without_pronunciation.txt").read_text() == "UNHEARD\n"
    assert (tmp_path / "words_not_in_lm.txt").read_text() == "NEVER\n"
    assert "UNHEARD" in caplog.text
    assert "NEVER" in caplog.text
    found, words = read_graph_info(tmp_path)
    assert found == info
    assert words == ["<eps>", "A", "AY", "READ", "RED", "#0", "<s>", "</s>"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [GRAPH, "words.txt", "graph.json", "words_without_pronunciation.txt", "words_not_in_lm.txt"])


def test_labels_are_state_ids_and_every_state_loops(arpa_path: Path, tmp_path: Path) -> None:
    hmm = toy_hmm(LEXICON.phones)
    build_graph(LEXICON, arpa_path, hmm, tmp_path, GraphSettings(transition_scale=1.0))
    graph = map_const_fst(tmp_path / GRAPH)
    source = np.repeat(np.arange(len(graph.states)), graph.states["num_arcs"])
    loops = graph.arcs[graph.arcs["next_state"] == source]
    assert loops["weight"] == pytest.approx(-hmm.log_self_loop[loops["ilabel"] - 1])
    entered = {state: set(graph.arcs["ilabel"][(graph.arcs["next_state"] == state) & (graph.arcs["ilabel"] > 0)]) for state in range(len(graph.states))}
    assert all(len(labels) <= 1 for labels in entered.values())  # an HMM state is entered by its own label only
    assert len(loops) == sum(bool(labels) for labels in entered.values())
    assert set(graph.arcs["olabel"]) == {0, 1, 2, 3, 4}


def test_costs_of_pronunciations_by_hand() -> None:
    """READ was seen as R Y twice: with one more of each of two pronunciations 3 in 4; a word never seen has as much of each."""
    hmm = toy_hmm(LEXICON.phones)
    spoken = SpokenWords(Counter({("READ", ("R", "Y")): 2, ("RED", ("R", "E")): 5}))

    def costs(spoken: SpokenWords) -> list[tuple[str, float]]:
        """Word label and cost of each pronunciation's first arc."""
        arcs = [line.split() for line in lexicon_fst_text(LEXICON, ["READ", "RED"], hmm, GraphSettings(), spoken).text.splitlines()]
        return [(arc[3], float(arc[4])) for arc in arcs if len(arc) == 5 and arc[3] != "0"]

    assert costs(spoken) == [("1", pytest.approx(math.log(4), abs=1e-6)), ("1", pytest.approx(math.log(4 / 3), abs=1e-6)), ("2", 0.0)]
    assert costs(SpokenWords()) == [("1", pytest.approx(math.log(2), abs=1e-6)), ("1", pytest.approx(math.log(2), abs=1e-6)), ("2", 0.0)]


def test_costs_of_silence_by_hand() -> None:
    """RED was seen six times, once before silence: with two more of probability 0.3, (1 + 0.6) / (6 + 2) = 0.2; AY was never seen."""
    spoken = SpokenWords(pauses=Counter({("RED", True): 1, ("RED", False): 5, ("<s>", True): 8}))
    lines = lexicon_fst_text(LEXICON, ["RED", "AY"], toy_hmm(LEXICON.phones), GraphSettings(), spoken).text.splitlines()
    into = {state: [float(line.split()[4]) for line in lines if len(line.split()) == 5 and line.split()[1] == state] for state in "12"}  # 2: silence follows
    expected = [(8 + 0.6) / 10, 0.2, 0.3]  # of the start, RED, AY
    assert into["2"] == pytest.approx([-math.log(p) for p in expected], abs=1e-6)
    assert into["1"] == pytest.approx([-math.log(1 - expected[0]), 0.0, *(-math.log(1 - p) for p in expected[1:])], abs=1e-6)  # 0: from behind the silence


def test_chunks_do_not_change_the_graph(arpa_path: Path, tmp_path: Path) -> None:
    lines = ["0 1 1 1 0.5", "0 2 2 2 1", "1 2 1 0 0", "2 1 0 0 0.25", "1 3 2 3 2", "2 3 2 0 0", "3 0 1 0 0.1", "3 0.75"]
    kaldifst.StdConstFst(kaldifst.compile("\n".join(lines) + "\n")).write(str(tmp_path / "clg"))
    windows = np.array([[-1, -1, -1], [0, 2, 3], [3, 1, 2]])
    written = []
    for chunk_states in (1, 3, 100):
        path = tmp_path / f"chunks{chunk_states}"
        write_hclg(map_const_fst(tmp_path / "clg"), windows, toy_hmm(["A", "B"]), path, 0.1, chunk_states)
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]
    assert kaldifst.StdConstFst.read(str(path)).num_states == map_const_fst(path).states.shape[0]


def paths(graph: ConstFst, state: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Input labels, output labels and cost of every path from `state` to a final state, self-loops left aside."""
    if graph.states["final"][state] < math.inf:
        yield (), (), float(graph.states["final"][state])
    for arc in graph.arcs[graph.states["first_arc"][state] :][: graph.states["num_arcs"][state]]:
        if arc["next_state"] != state:
            for ilabels, olabels, cost in paths(graph, int(arc["next_state"])):
                own = [tuple(int(label) for label in (arc[side],) if label) for side in ("ilabel", "olabel")]
                yield own[0] + ilabels, own[1] + olabels, float(arc["weight"]) + cost


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=9))
def test_chains_keep_every_path(tmp_path_factory: pytest.TempPathFactory, arcs: list[tuple[int, int, int, int]]) -> None:
    """The paths of HCLG are those of a random acyclic CLG with each label spelt out as three state ids."""
    folder = tmp_path_factory.mktemp("clg")
    arcs = [(0, 1, 1, 0), *((source, min(source + step, 4), label, word) for source, step, label, word in arcs)]
    lines = [f"{source} {target} {label} {word} {index / 8}" for index, (source, target, label, word) in enumerate(arcs)]
    text = "\n".join([*lines, *(f"{state} 0.5" for state in range(1, 5) if state in {target for _, target, _, _ in arcs})])
    kaldifst.StdConstFst(kaldifst.compile(text + "\n", keep_state_numbering=True)).write(str(folder / "clg"))
    hmm = toy_hmm(["A", "B"])
    windows = np.array([[-1, -1, -1], [0, 2, 3], [3, 1, 2], [0, 2, 0]])
    clg = map_const_fst(folder / "clg")
    write_hclg(clg, windows, hmm, folder / "hclg", transition_scale=0.0, chunk_states=2)
    hclg = map_const_fst(folder / "hclg")
    spelt = {0: (), **{label: tuple(int(state) + 1 for state in hmm.state_ids(*windows[label])) for label in (1, 2, 3)}}
    expected = sorted((tuple(state for label in ilabels for state in spelt[label]), olabels, cost) for ilabels, olabels, cost in paths(clg, clg.start))
    assert sorted(paths(hclg, hclg.start)) == expected


def test_hclg_of_one_arc_by_hand(tmp_path: Path) -> None:
    """One phone from start to end: start, then three looping states, the last of them final (its state is entered by nothing else)."""
    kaldifst.StdConstFst(kaldifst.compile("0 1 1 7 0.5\n1 0.25\n")).write(str(tmp_path / "clg"))
    hmm = untied_model(("SIL", "A"))
    write_hclg(map_const_fst(tmp_path / "clg"), np.array([[-1, -1, -1], [0, 2, 0]]), hmm, tmp_path / "hclg", transition_scale=1.0)
    half = f"{math.log(2):.6g}"
    expected = ["0 1 4 0 0.5", f"1 1 4 0 {half}", f"1 2 5 7 {half}", f"2 2 5 0 {half}", f"2 3 6 0 {half}", f"3 3 6 0 {half}", f"3 {math.log(2) + 0.25:.6g}"]
    assert sorted(" ".join(line.split()) for line in as_text(tmp_path / "hclg")) == sorted(expected)


def test_arpa2fst_reads_what_we_read(arpa_path: Path, tmp_path: Path) -> None:
    """The acceptor's weights are the file's log10 values times -ln 10; the word without pronunciation is left out."""
    table = tmp_path / "words.txt"
    words = ["A", "AY", "READ", "RED"]
    table.write_text("".join(f"{word} {index}\n" for index, word in enumerate(["<eps>", *words, "#0", "<s>", "</s>"])))
    with open(tmp_path / "lm.arpa", "w", encoding="utf-8") as copy:
        assert sorted(read_vocabulary(arpa_path, copy)) == sorted([*words, "UNHEARD"])
    grammar = compile_grammar(tmp_path / "lm.arpa", table)
    arpa = estimate_kneser_ney(TEXT, order=3)
    arcs = [line.split() for line in grammar.to_str(show_weight_one=True).splitlines()]
    weights = sorted(float(arc[4]) for arc in arcs if len(arc) == 5 and arc[2] in "1234")
    known = {*words, "<s>"}
    expected = sorted(-math.log(10) * p for ngrams in arpa.ngrams for ngram, (p, _) in ngrams.items() if set(ngram) <= known and ngram[-1] != "<s>")
    assert weights == pytest.approx(expected, abs=1e-4)
    finals = sorted(float(arc[1]) for arc in arcs if len(arc) == 2)
    ends = sorted(-math.log(10) * p for ngrams in arpa.ngrams for ngram, (p, _) in ngrams.items() if ngram[-1] == "</s>" and set(ngram[:-1]) <= known)
    assert finals == pytest.approx(ends, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from("AB"), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8))
def test_disambiguated_pronunciations_are_prefix_free(pronunciations: list[tuple[str, ...]]) -> None:
    numbers = disambiguation_numbers(pronunciations)
    symbols = [(*phones, f"#{number}") if number else phones for phones, number in zip(pronunciations, numbers, strict=True)]
    assert len(set(symbols)) == len(symbols)
    assert not any(longer[: len(shorter)] == shorter for shorter in symbols for longer in symbols if shorter is not longer)
    needless = [phones for phones, number in zip(pronunciations, numbers, strict=True) if number and
                sum(other[: len(phones)] == phones for other in pronunciations) == 1]
    assert not needless


def test_const_fst_round_trip_and_word_cost(tmp_path: Path) -> None:
    text = "0 1 1 5 0.5\n0 0 2 0 1.5\n1 2 0 6 0\n2 0.25\n"
    kaldifst.StdConstFst(kaldifst.compile(text)).write(str(tmp_path / "theirs"))
    graph = map_const_fst(tmp_path / "theirs")
    with ConstFstWriter(tmp_path / "ours", graph.start, len(graph.states), len(graph.arcs)) as writer:
        for state in graph.states:
            arcs = graph.arcs[state["first_arc"] :][: state["num_arcs"]]
            writer.append(np.array([state["final"]]), np.array([state["num_arcs"]], np.int64), np.asarray(arcs))
    assert as_text(tmp_path / "ours") == as_text(tmp_path / "theirs")
    ours: ConstFst = map_const_fst(tmp_path / "ours")
    assert (ours.states == graph.states).all()
    copy_with_word_cost(tmp_path / "ours", tmp_path / "costly", 2.0)
    expected = [(1, 5, 2.5), (2, 0, 1.5), (0, 6, 2.0)]
    assert sorted((int(a["ilabel"]), int(a["olabel"]), float(a["weight"])) for a in map_const_fst(tmp_path / "costly").arcs) == sorted(expected)


@pytest.mark.parametrize("change", [
    lambda text: "\ufeff" + text,
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("A RED", "A\u3000RED"),
    lambda text: text.replace("</s>\n", "</s>\t0\n"),
])
def test_forms_of_arpa_give_the_same_graph(arpa_path: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    odd = tmp_path / "odd.arpa"
    odd.write_bytes(change(arpa_path.read_text()).encode())
    assert odd.read_bytes() != arpa_path.read_bytes()
    odd.chmod(0o444)
    for name, arpa in (("plain", arpa_path), ("odd", odd)):
        build_graph(LEXICON, arpa, toy_hmm(LEXICON.phones), tmp_path / name)
    assert (tmp_path / "odd" / GRAPH).read_bytes() == (tmp_path / "plain" / GRAPH).read_bytes()


def test_n_grams_without_their_history_are_counted(arpa_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_graph(LEXICON, arpa_path, toy_hmm(LEXICON.phones), tmp_path / "whole")
    assert "not used" not in caplog.text
    lines = arpa_path.read_text().splitlines(keepends=True)
    bigrams = [line for line in lines if line.count("\t") == 2 and len(line.split("\t")[1].split()) == 2]
    gone = next(line for line in bigrams if any(other.split("\t")[1].startswith(line.split("\t")[1] + " ") for other in lines if other.count("\t") == 1))
    text = "".join(line for line in lines if line != gone)
    (tmp_path / "lm.arpa").write_text(re.sub(r"ngram 2=(\d+)", lambda found: f"ngram 2={int(found[1]) - 1}", text))
    build_graph(LEXICON, tmp_path / "lm.arpa", toy_hmm(LEXICON.phones), tmp_path / "graph")
    assert re.search(r"graph: [1-9] n-grams of the language model are not used", caplog.text)


def test_cut_off_or_foreign_graph_is_refused(arpa_path: Path, tmp_path: Path) -> None:
    build_graph(LEXICON, arpa_path, toy_hmm(LEXICON.phones), tmp_path)
    whole = (tmp_path / GRAPH).read_bytes()
    (tmp_path / GRAPH).write_bytes(whole[:-16])
    with pytest.raises(AsrKdError, match=r"HCLG\.fst: .* cut off"):
        map_const_fst(tmp_path / GRAPH)
    with pytest.raises(AsrKdError, match=f"{len(whole) - 16} bytes, expected {len(whole)}; run the graph stage again"):
        read_graph_info(tmp_path)
    (tmp_path / GRAPH).write_bytes(b"x" * 500)
    with pytest.raises(AsrKdError, match="not a ConstFst file"):
        map_const_fst(tmp_path / GRAPH)


@pytest.mark.parametrize(("arcs", "message"), [
    ("0 1 1 5 0.5\n1 0 0 0 -0.5\n1 2 0 6 0\n2\n", None),
    ("0 1 0 5 0.5\n1 0 0 0 0.5\n1 2 2 6 0\n2\n", "a path without input labels"),
    ("0 0 0 0 -1\n0\n", "a path without input labels"),
    ("0 1 1 5 -Infinity\n1\n", "out of range"),
    ("0 1 1 5 0\n1 -Infinity\n", "out of range"),
    ("0 1 3 5 0\n1\n", "out of range"),
    ("0 1 1 7 0\n1\n", "out of range"),
])
def test_graphs_of_others_are_looked_at(tmp_path: Path, arcs: str, message: str | None) -> None:
    kaldifst.StdConstFst(kaldifst.compile(arcs)).write(str(tmp_path / GRAPH))
    with contextlib.nullcontext() if message is None else pytest.raises(AsrKdError, match=message):
        check_const_fst(tmp_path / GRAPH, num_inputs=3, num_outputs=7)


def test_mismatches_are_refused(arpa_path: Path, tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match="phones Y are not among the 4 phones"):
        build_graph(LEXICON, arpa_path, toy_hmm(["A", "E", "R"]), tmp_path)
    with pytest.raises(AsrKdError, match="none of the 5 words of the language model is in the lexicon of 1 words"):
        build_graph(Lexicon({"red": (("R", "E"),)}), arpa_path, toy_hmm(LEXICON.phones), tmp_path)
    with pytest.raises(AsrKdError, match="silence probability 1, expected"):
        build_graph(LEXICON, arpa_path, toy_hmm(LEXICON.phones), tmp_path, GraphSettings(silence_probability=1.0))
    for choices, name in ((GraphSettings(pseudo_count=0.0), "pseudo count"), (GraphSettings(silence_pseudo_count=0.0), "silence pseudo count")):
        with pytest.raises(AsrKdError, match=f"graph: {name} 0, expected more than 0"):
            build_graph(LEXICON, arpa_path, toy_hmm(LEXICON.phones), tmp_path, choices)
    (tmp_path / "cut.arpa").write_text(re.sub(r"\\end\\\n$", "", arpa_path.read_text()))
    with pytest.raises(AsrKdError, match=r"cut\.arpa: cut off"):
        build_graph(LEXICON, tmp_path / "cut.arpa", toy_hmm(LEXICON.phones), tmp_path)
    (tmp_path / "unmarked.arpa").write_text(re.sub(r"\n-99\t<s>.*", "", arpa_path.read_text()).replace("ngram 1=7", "ngram 1=6"))
    with pytest.raises(AsrKdError, match=r"unmarked\.arpa: no <s> among the 6 1-grams"):
        build_graph(LEXICON, tmp_path / "unmarked.arpa", toy_hmm(LEXICON.phones), tmp_path)
    assert not (tmp_path / "graph.json").exists()


def test_word_table_and_graph_are_built_together(arpa_path: Path, tmp_path: Path) -> None:
    build_graph(LEXICON, arpa_path, toy_hmm(LEXICON.phones), tmp_path)
    (tmp_path / "words.txt").write_text((tmp_path / "words.txt").read_text().replace("RED", "RAD"))
    with pytest.raises(AsrKdError, match=r"words\.txt: fingerprint"):
        read_graph_info(tmp_path)
    assert json.loads((tmp_path / "graph.json").read_text())["num_words"] == 4
