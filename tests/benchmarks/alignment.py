"""What alignment costs as the amount of speech grows: `python -m tests.benchmarks alignment RUN SPLIT`, RUN being the output folder of a recipe.

Trains the mixture aligner on shares of a split and aligns the share with it. Cost is linear when the seconds per hour of speech stay; the
limit beside them is the machine's rate of float32 matrix products, which the mixtures' scores are.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from asr_kd.frames import FrameStore
from asr_kd.hmm.align import align
from asr_kd.hmm.train import GmmHmmSettings, train_gmm_hmm
from asr_kd.lexicon import read_lexicon
from asr_kd.manifest import read_manifest
from asr_kd.precision import matmul_rate
from tests.benchmarks.measure import machine, show


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("split")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    for name, default in (("num_states", 1200), ("num_gaussians", 10_000), ("mono_passes", 20), ("tri_passes", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    show(machine(device) | {"limit_gflops": matmul_rate(torch.float32, device, (1, 1000, 78, 1000)) / 1e9})
    lexicon, store = read_lexicon([options.run / "text" / "lexicon.txt"]), FrameStore(options.run / "features" / options.split)
    manifest = read_manifest(options.run / "manifests" / f"{options.split}.csv")
    utterances = [utterance for utterance in manifest if utterance.utt_id in store and all(word in lexicon for word in utterance.words)]
    for share in options.shares:
        chosen = utterances[:: round(1 / share)]
        words, speakers = {u.utt_id: u.words for u in chosen}, {u.utt_id: u.spk_id for u in chosen}
        hours = sum(map(store.length, words)) / 360_000
        settings = GmmHmmSettings(num_states=options.num_states, num_gaussians=options.num_gaussians, mono_passes=options.mono_passes,
                                  tri_passes=options.tri_passes)
        start = time.monotonic()
        aligner = train_gmm_hmm(store, words, speakers, lexicon, settings, device=device)
        trained = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            align(aligner, store, words, speakers, lexicon, folder, device=device)
        seconds = {"training_s": trained - start, "align_s": time.monotonic() - trained}
        show({"hours": hours, **seconds, "s_per_hour": sum(seconds.values()) / hours, "passes": options.mono_passes + 3 * options.tri_passes,
              "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6})


if __name__ == "__main__":
    main()
