"""A toy recogniser and the slow, obvious search that the graph and the decoder are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from asr_kd.hmm.model import HmmModel
from asr_kd.lexicon import Lexicon, Pronunciation
from asr_kd.lm import Arpa

LOG10 = math.log(10)


def toy_hmm(phones: Sequence[str], num_states: int = 40, seed: int = 0) -> HmmModel:
    """Three states per phone tied at random over its contexts; silence's do not depend on context."""
    generator = np.random.default_rng(seed)
    names = ("SIL", *sorted(phones))
    table = generator.integers(3, num_states, (len(names) + 1,) * 3 + (3,)).astype(np.int32)
    table[:, 1] = (0, 1, 2)
    loop = generator.uniform(0.3, 0.8, num_states)
    priors = generator.dirichlet(np.full(num_states, 5.0))
    return HmmModel(names, table, *(np.log(p).astype(np.float32) for p in (loop, 1 - loop)), math.log(0.3), np.log(priors).astype(np.float32))


Probabilities = Mapping[tuple[str, Pronunciation], float]


def phone_sequences(words: Sequence[str], lexicon: Lexicon, hmm: HmmModel, probabilities: Probabilities,
                    silences: Mapping[str, float]) -> Iterator[tuple[list[int], float]]:
    """Every pronunciation of a word sequence with every placement of silences: phone ids and cost.

    Pronunciations that `probabilities` does not name are as probable as a word's others; after words, or at the start (<s>), that
    `silences` does not name, silence is as probable as the model says.
    """
    after = [silences.get(word, math.exp(hmm.log_optional_silence)) for word in ("<s>", *words)]
    first_gap, *gaps = [[((), -math.log(1 - silence)), ((1,), -math.log(silence))] for silence in after]
    variants = [[(tuple(hmm.phones.index(phone) + 1 for phone in variant), -math.log(probabilities.get((word, variant), 1 / len(lexicon[word]))))
                 for variant in lexicon[word]] for word in words]
    parts = [first_gap, *itertools.chain.from_iterable(zip(variants, gaps, strict=True))]
    for choice in itertools.product(*parts):
        yield list(itertools.chain.from_iterable(phones for phones, _ in choice)), sum(cost for _, cost in choice)


def language_model_cost(words: Sequence[str], arpa: Arpa) -> float:
    """Cost of the cheapest path through a bigram model's acceptor, where backing off is allowed although the bigram exists."""
    total = 0.0
    for history, word in itertools.pairwise(("<s>", *words, "</s>")):
        options = [arpa.ngrams[0][(history,)][1] + arpa.ngrams[0][(word,)][0]]
        if (history, word) in arpa.ngrams[1]:
            options.append(arpa.ngrams[1][history, word][0])
        total -= LOG10 * max(options)
    return total


def state_sequence(phones: Sequence[int], hmm: HmmModel) -> list[int]:
    """State ids of a phone sequence between sentence edges."""
    padded = [0, *phones, 0]
    return [int(state) for at in range(1, len(padded) - 1) for state in hmm.state_ids(padded[at - 1], padded[at], padded[at + 1])]


def alignment_cost(states: Sequence[int], frame_costs: NDArray[np.float64], hmm: HmmModel, transition_scale: float) -> float:
    """Cheapest way to spend T frames on a chain of states, at least one on each; one cell after another."""
    best = [math.inf] * len(states)
    for t, costs in enumerate(frame_costs):
        previous = list(best)
        for n, state in enumerate(states):
            stay = previous[n] - transition_scale * hmm.log_self_loop[state]
            enter = (0.0 if n == 0 else math.inf) if t == 0 else (math.inf if n == 0 else previous[n - 1] - transition_scale * hmm.log_advance[states[n - 1]])
            best[n] = min(stay, enter) + costs[state]
    return best[-1] - transition_scale * hmm.log_advance[states[-1]]


def exhaustive_search(
    lexicon: Lexicon, arpa: Arpa, hmm: HmmModel, frame_costs: NDArray[np.float64], probabilities: Probabilities, silences: Mapping[str, float],
    transition_scale: float = 0.1,
) -> dict[tuple[str, ...], float]:
    """Cost of every word sequence that fits the frames."""
    costs: dict[tuple[str, ...], float] = {}
    longest = len(frame_costs) // (3 * min(len(variant) for word in lexicon for variant in lexicon[word]))
    for length in range(longest + 1):
        for words in itertools.product(lexicon, repeat=length):
            sequences = phone_sequences(words, lexicon, hmm, probabilities, silences)
            found = min((cost + alignment_cost(state_sequence(phones, hmm), frame_costs, hmm, transition_scale)
                         for phones, cost in sequences if 0 < 3 * len(phones) <= len(frame_costs)), default=math.inf)
            if math.isfinite(found):
                costs[words] = language_model_cost(words, arpa) + found
    return costs
