"""Make HMM-state targets of a recipe's speech, and nothing further: manifests, lexicon, features, the aligner and its alignments.

    python data_prep/targets.py HPARAMS [--key value ...]

The folder targets/ in output_folder (targets_0/ where the recipe realigns by networks) holds, for each split, state ids that
`asr_kd.frames.FrameStore` reads, and phones and words in segments/, each with its first frame and the one past its last; `asr_kd.hmm.align.Segments`
reads them, given the split's folder (targets/train-mini).
The recipe with the same settings goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from asr_kd.cli import guarded
from asr_kd.corpus import prepare_corpus, prepare_text
from asr_kd.distributed import rank
from asr_kd.experiment import check_device
from asr_kd.settings import load_settings
from asr_kd.sources import find_sources
from asr_kd.stage import alone_in
from asr_kd.targets import prepare_features, prepare_targets, targets_folder


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hparams", metavar="HPARAMS", help="settings file, e.g. recipes/LibriSpeech/hparams/mini.yaml")
    arguments, overrides = parser.parse_known_args(words)
    settings = load_settings(arguments.hparams, overrides)
    check_device(settings.device)
    with alone_in(settings.output):
        sources, _ = find_sources(settings)
        corpus, _ = prepare_corpus(settings, sources.data_folder)
        text, _ = prepare_text(settings, corpus, sources.lexicon, sources.lm, sources.lm_text)
        features, _ = prepare_features(settings, corpus)
        targets, _ = prepare_targets(settings, corpus, text, features)
    for name, store in targets.stores.items() if rank() == 0 else ():
        print(f"{targets_folder(settings, 0) / name}: {len(store)} utterances, {len(store.frames)} frames, {targets.hmm.num_states} states")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
