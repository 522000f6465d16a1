"""Make the synthetic corpus: python data_prep/synthetic.py FOLDER [--minutes train=40 dev=5 test=8] [--seed 0] [--num_jobs 2]"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from asr_kd.cli import guarded
from asr_kd.settings import make_settings
from asr_kd.synthetic import MINUTES, SNR_DB, make_corpus


def _split_minutes(text: str) -> tuple[str, float]:
    split, _, number = text.partition("=")
    minutes = float(number) if number else math.nan
    if not math.isfinite(minutes):
        raise argparse.ArgumentTypeError(f"{text!r}, expected SPLIT=MINUTES")
    return split, minutes


def main(words: Sequence[str]) -> None:
    """Parse, make, say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path, help="new folder for the corpus")
    parser.add_argument("--minutes", nargs="+", type=_split_minutes, default=list(MINUTES.items()), metavar="SPLIT=MINUTES", help="audio per split")
    parser.add_argument("--seed", type=int, default=0, help="decides voices, sentences and noise (default 0)")
    parser.add_argument("--num_jobs", type=int, default=1, help="processes that speak at once; no influence on the result")
    parser.add_argument("--snr_db", nargs=2, type=float, default=SNR_DB, metavar=("LOW", "HIGH"), help="range of speech to noise, in dB")
    arguments = parser.parse_args(words)
    minutes = dict(arguments.minutes)
    make_settings({"output_folder": str(arguments.folder), "synthetic_minutes": dict.fromkeys(minutes, 1.0), "seed": arguments.seed,
                   "num_jobs": arguments.num_jobs})  # refuses names that are no folder's and numbers out of range
    corpus = make_corpus(arguments.folder, minutes=minutes, seed=arguments.seed, num_jobs=arguments.num_jobs, snr_db=tuple(arguments.snr_db))
    print(f"{corpus.data_folder}: splits {', '.join(corpus.splits)}; lexicon {corpus.lexicon.name}, text {corpus.lm_text.name}, times in times/")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
