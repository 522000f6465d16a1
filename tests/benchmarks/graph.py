"""Time and memory of a decoding graph over a made-up vocabulary: `python -m tests.benchmarks graph`, by default 200,000 words, 1.5 million n-grams.

Words occur as often as Zipf's law says; pronunciations are random phones. The limits beside the figures are those that were set: 5 minutes, 6 GB.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from asr_kd.graph import build_graph
from asr_kd.lexicon import Lexicon
from tests.benchmarks.measure import machine, show
from tests.toy_graph import toy_hmm

PHONES = [f"P{number:02d}" for number in range(39)]


def made_up_lexicon(num_words: int, rng: np.random.Generator) -> Lexicon:
    """One pronunciation of 2 to 11 phones per word."""
    lengths = rng.integers(2, 12, num_words)
    return Lexicon({f"W{word}": (tuple(PHONES[phone] for phone in rng.integers(len(PHONES), size=length)),) for word, length in enumerate(lengths)})


def write_made_up_arpa(path: Path, num_words: int, num_ngrams: int, rng: np.random.Generator) -> None:
    """A trigram model: half of the n-grams beyond single words are bigrams, the others continue one of these."""
    share = 1.0 / np.arange(1, num_words + 1)
    share /= share.sum()
    higher = max(2, num_ngrams - num_words)
    pairs = np.unique(rng.choice(num_words, (higher * 2 // 3, 2), p=share), axis=0)[: higher // 2]
    triples = np.unique(np.concatenate([pairs[rng.integers(len(pairs), size=higher)], rng.choice(num_words, (higher, 1), p=share)], 1), axis=0)
    triples = triples[rng.permutation(len(triples))[: higher - len(pairs)]]
    triples = triples[np.lexsort(triples.T[::-1])]
    with open(path, "w", encoding="ascii") as file:
        file.write(f"\\data\\\nngram 1={num_words + 2}\nngram 2={len(pairs)}\nngram 3={len(triples)}\n\n\\1-grams:\n-99\t<s>\t-0.3\n-1.5\t</s>\n")
        file.writelines(f"{np.log10(share[word]):.4f}\tW{word}\t-0.4\n" for word in range(num_words))
        file.write("\n\\2-grams:\n")
        file.writelines(f"-1.2\tW{a} W{b}\t-0.2\n" for a, b in pairs.tolist())
        file.write("\n\\3-grams:\n")
        file.writelines(f"-0.8\tW{a} W{b} W{c}\n" for a, b, c in triples.tolist())
        file.write("\n\\end\\\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=200_000)
    parser.add_argument("--ngrams", type=int, default=1_500_000)
    parser.add_argument("--states", type=int, default=5000)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_made_up_arpa(folder / "lm.arpa", options.words, options.ngrams, rng)
        lexicon, hmm = made_up_lexicon(options.words, rng), toy_hmm(PHONES, options.states)
        start = time.monotonic()
        info = build_graph(lexicon, folder / "lm.arpa", hmm, folder / "graph")
        seconds = time.monotonic() - start
    show(machine(torch.device("cpu")) | {"words": options.words, "ngrams": options.ngrams, "graph_states": info["num_states"], "graph_arcs": info["num_arcs"],
                                         "graph_gb": info["graph_bytes"] / 1e9, "seconds": seconds, "limit_s": 300.0,
                                         "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "limit_gb": 6.0})


if __name__ == "__main__":
    main()
