"""Write mean-normalised log-mel features of the utterances in a CSV manifest (or a LibriSpeech split).

    python data_prep/features.py manifests/dev-clean-2.csv features/dev-clean-2

The folder holds frames.npy (N, 40) float16, index.json and, for what was left out, exclusions.csv; `asr_kd.frames.FrameStore` reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asr_kd.cli import guarded
from asr_kd.errors import AsrKdError
from asr_kd.experiment import check_device
from asr_kd.features import CMVN, FbankOptions, extract_features
from asr_kd.frames import FRAMES, FrameStore
from asr_kd.manifest import load_split, write_exclusions
from asr_kd.settings import make_settings


def check_ours(folder: Path) -> None:
    """Raise `AsrKdError` where the folder holds an array that is not of an earlier run, for it would be replaced."""
    if (folder / FRAMES).exists():
        try:
            FrameStore(folder)
        except AsrKdError as error:
            raise AsrKdError(f"{folder / FRAMES}: expected features that an earlier run wrote, to be replaced; give another folder or remove it") from error


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", help="CSV manifest, or a folder name below --data_folder")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--data_folder", type=Path, default=Path("."), help="folder that holds the splits; $data_root in a manifest")
    parser.add_argument("--cmvn", choices=CMVN, default="speaker", help="what the mean is taken over (default: %(default)s)")
    parser.add_argument("--num_mels", type=int, default=40, help="filters (default: %(default)s)")
    parser.add_argument("--speed", type=float, default=1.0, help="0.9 or 1.1 for speed-perturbed copies (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where filterbanks are computed (default: %(default)s)")
    parser.add_argument("--num_jobs", type=int, default=2, help="threads that decode audio (default: %(default)s)")
    arguments = parser.parse_args(words)
    make_settings({"output_folder": str(arguments.folder), "data_folder": str(arguments.data_folder), "train_splits": ["any"], "num_mels": arguments.num_mels,
                   "speeds": [arguments.speed], "num_jobs": arguments.num_jobs})  # refuses numbers out of range
    check_device(arguments.device)
    check_ours(arguments.folder)
    utterances, unusable = load_split(arguments.split, arguments.data_folder)
    excluded = unusable + extract_features(utterances, arguments.folder, FbankOptions(num_mels=arguments.num_mels), arguments.cmvn, arguments.device,
                                           arguments.speed, arguments.num_jobs)
    write_exclusions(arguments.folder / "exclusions.csv", excluded)
    store = FrameStore(arguments.folder)
    print(f"{arguments.folder}: {len(store)} utterances, {len(store.frames)} frames, {len(excluded)} left out")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
