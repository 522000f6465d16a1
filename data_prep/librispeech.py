"""Write CSV manifests of LibriSpeech splits, downloading those that are not there when asked to.

    python data_prep/librispeech.py DATA_FOLDER train-clean-5 dev-clean-2 --manifests manifests --download

writes manifests/train-clean-5.csv (SpeechBrain's columns) and, for what was left out, manifests/train-clean-5.exclusions.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asr_kd.cli import guarded
from asr_kd.download import CORPORA, fetch_corpus
from asr_kd.errors import AsrKdError
from asr_kd.manifest import load_split, write_exclusions, write_manifest


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", type=Path, help="folder that holds the splits, or LibriSpeech/ with them")
    parser.add_argument("splits", nargs="+", help="folder names, e.g. " + ", ".join(CORPORA))
    parser.add_argument("--manifests", type=Path, default=Path("manifests"), help="where to write (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="fetch splits of OpenSLR 12 and 31 that are not there")
    arguments = parser.parse_args(words)
    for split in arguments.splits:
        if Path(split).name != split or split.endswith(".csv"):
            raise AsrKdError(f"splits: got {split!r}, expected the name of a folder below {arguments.data_folder}; give the folder around it as data_folder")
    for split in arguments.splits:
        if arguments.download and not (arguments.data_folder / split).is_dir():
            fetch_corpus(split, arguments.data_folder)
        utterances, exclusions = load_split(split, arguments.data_folder)
        write_manifest(arguments.manifests / f"{split}.csv", utterances)
        write_exclusions(arguments.manifests / f"{split}.exclusions.csv", exclusions)
        print(f"{split}: {len(utterances)} utterances of {len({u.spk_id for u in utterances})} speakers, "
              f"{sum(u.duration_s for u in utterances) / 3600:.2f} h, {len(exclusions)} left out")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
