"""Real-time factor, and what the beam costs: `python -m tests.benchmarks decoding RUN SPLIT`, RUN being the output folder of a finished recipe.

The student's posteriors are computed first; decoding alone is measured, at the run's beam and at wider ones, with one process and several.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from asr_kd.decode import DecodeSettings, decode, real_time_factor
from asr_kd.ensemble import Ensemble
from asr_kd.evaluation import log_posteriors
from asr_kd.features import Windows
from asr_kd.frames import FrameStore
from asr_kd.hmm.model import HmmModel
from asr_kd.manifest import read_manifest
from asr_kd.score import WordErrors, score_split
from asr_kd.stage import read_json
from tests.benchmarks.measure import machine, show


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("split")
    parser.add_argument("--speakers", nargs="+", help="only these of the split, e.g. the tuning speakers")
    parser.add_argument("--utterances", type=int, default=200)
    parser.add_argument("--beam_factors", type=float, nargs="+", default=[0.75, 1.0, 1.25, 2.0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--context", type=int, nargs=2, default=[20, 5])
    options = parser.parse_args(arguments)
    manifest = read_manifest(options.run / "manifests" / f"{options.split}.csv")
    utterances = [utterance for utterance in manifest if options.speakers is None or utterance.spk_id in options.speakers]
    utterances = utterances[:: max(1, len(utterances) // options.utterances)]
    references = {utterance.utt_id: utterance.words for utterance in utterances}
    windows = Windows(FrameStore(options.run / "features" / options.split), list(references), *options.context)
    student = Ensemble.load(options.run / "student" / "networks.safetensors")
    posteriors = list(log_posteriors(student, windows))
    hmm, chosen = HmmModel.load(options.run / "student" / "bundle"), DecodeSettings(**read_json(options.run / "tuning" / "tuning.json")["chosen"])
    show(machine(torch.device("cpu")) | {"utterances": len(references), "hours": windows.num_frames / 360_000})

    def measure(settings: DecodeSettings, jobs: int) -> None:
        start = time.monotonic()
        found = decode(options.run / "graph", posteriors, hmm.log_priors, settings, jobs, len(posteriors))
        wall_s = time.monotonic() - start
        errors = sum(score_split(references, {utt_id: hypothesis.words for utt_id, hypothesis in found.items()}).values(), WordErrors())
        show({"beam": settings.beam, "max_active": settings.max_active, "jobs": jobs, "real_time_factor": real_time_factor(found),
              "limit_real_time_factor": 0.05,
              "wall_s_with_reading_the_graph": wall_s, "wer": errors.wer, "errors": errors.errors,
              "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6})

    for factor in options.beam_factors:
        measure(replace(chosen, beam=factor * chosen.beam, max_active=round(max(1.0, factor) * chosen.max_active)), max(options.jobs))
    for jobs in options.jobs:
        measure(chosen, jobs)


if __name__ == "__main__":
    main()
