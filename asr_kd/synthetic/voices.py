"""Who speaks in the synthetic corpus: a speaker is an accent, a voice variant, a rate and a pitch of espeak-ng."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")

# espeak's variants without its whispers, robots and echoes (an echo carries a word's sound into the pause behind it)
FEMALE = """f1 f2 f3 f4 f5 Alicia Andrea Annie anika aunty belinda grandma iven linda steph""".split()  # noqa: SIM905
MALE = """m1 m2 m3 m4 m5 m6 m7 m8 klatt2 klatt3 klatt4 Alex Andy Denis Diogo Gene Henrique Hugo Jacky Lee Mario Michael Mike Nguyen
    Reed Storm adam antonio benjamin boris caleb david ed edward grandpa gustave ian iven3 john kaukovalta marcelo max michel
    miguel norbert pablo paul pedro quincy rob robert sandro shelby travis victor zac""".split()  # noqa: SIM905

RATE_WPM = (120, 190)
PITCH = (25, 75)
PITCH_RANGE = (30, 70)


@dataclass(frozen=True)
class Speaker:
    """`voice` is espeak's name (accent+variant); pitch and pitch range are espeak's 0 to 100, 50 being the voice's own."""

    spk_id: str
    sex: str
    voice: str
    rate_wpm: int
    pitch: int
    pitch_range: int


def draw_speakers(numbers: dict[str, int], rng: np.random.Generator) -> dict[str, list[Speaker]]:
    """`numbers[split]` speakers for each split; no variant speaks in two splits, accents and sexes are spread evenly.

    Variants are shared out in proportion to the numbers of speakers; within a split they come again, with another accent,
    rate and pitch, when there are more speakers than variants.
    """
    shares = [_shares(rng.permutation(variants).tolist(), numbers) for variants in (FEMALE, MALE)]
    first_id, speakers = 1, {}
    for split, number in numbers.items():
        pool = _mixed(shares[0][split], shares[1][split])
        accents = np.concatenate([rng.permutation(ACCENTS) for _ in range(number // len(ACCENTS) + 1)]).tolist()
        speakers[split] = [_speaker(first_id + index, pool[index % len(pool)], accents[index], rng) for index in range(number)]
        first_id += number
    return speakers


def _shares(variants: list[str], numbers: dict[str, int]) -> dict[str, list[str]]:
    """Cut `variants` into one part per split, in proportion to `numbers` but each with one at least."""
    free = len(variants) - len(numbers)
    ends = np.cumsum([1 + int(free * number / sum(numbers.values())) for number in numbers.values()]).tolist()
    return {split: variants[start:end] for split, start, end in zip(numbers, [0, *ends], ends, strict=False)}


def _mixed(female: list[str], male: list[str]) -> list[str]:
    """All of both, the rarer spread evenly among the other, so that the first few hold both."""
    placed = [((index + 0.4) / len(female), name) for index, name in enumerate(female)]
    placed += [((index + 0.5) / len(male), name) for index, name in enumerate(male)]
    return [name for _, name in sorted(placed)]


def _speaker(number: int, variant: str, accent: str, rng: np.random.Generator) -> Speaker:
    rate, pitch, pitch_range = (int(rng.integers(low, high + 1)) for low, high in (RATE_WPM, PITCH, PITCH_RANGE))
    return Speaker(f"{number:03d}", "F" if variant in FEMALE else "M", f"{accent}+{variant}", rate, pitch, pitch_range)
