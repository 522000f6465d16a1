"""How near the aligner's word starts come to the truth, on synthetic speech that knows its own times.

    python -m tests.benchmarks word_starts [--minutes 40] [--folder F] [--key value ...]

runs the demo's stages up to the alignment: the share of the training words whose start lies within 20 ms and
within 50 ms of the truth, once the median offset is taken away (each recogniser has its own idea of where a closure ends).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asr_kd.corpus import prepare_corpus, prepare_text
from asr_kd.experiment import DEMO_HPARAMS
from asr_kd.hmm.align import Segments
from asr_kd.manifest import Utterance
from asr_kd.settings import load_settings
from asr_kd.sources import find_sources
from asr_kd.synthetic.times import read_ctm
from asr_kd.targets import prepare_features, prepare_targets
from tests.benchmarks.measure import show

SHIFT_MS, WINDOW_MS = 10.0, 25.0


def start_errors(segments: Segments, utterances: list[Utterance], truth: Path) -> dict[str, np.ndarray]:
    """Speaker -> found less true start of every word, in ms; a frame stands for the middle of its shift."""
    times = read_ctm(truth)
    errors: dict[str, list[float]] = {}
    for utterance in utterances:
        found = segments.words(utterance.utt_id, utterance.words)
        starts = [first * SHIFT_MS + (WINDOW_MS - SHIFT_MS) / 2 for _, first, _ in found]
        errors.setdefault(utterance.spk_id, []).extend(start - 1000 * timed.start_s for start, timed in zip(starts, times[utterance.utt_id], strict=True))
    return {speaker: np.asarray(values) for speaker, values in errors.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--folder", help="keep the stages here")
    options, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        settings = load_settings(DEMO_HPARAMS, ["--output_folder", folder, "--synthetic_minutes", f"{{train: {options.minutes}, test: 1}}", *overrides])
        sources, _ = find_sources(settings)
        corpus, _ = prepare_corpus(settings, sources.data_folder)
        text, _ = prepare_text(settings, corpus, sources.lexicon, sources.lm, sources.lm_text)
        features, _ = prepare_features(settings, corpus)
        prepare_targets(settings, corpus, text, features)
        assert sources.data_folder is not None
        aligned = [utterance for utterance in corpus.splits["train"] if utterance.utt_id in features.stores["train"]]
        by_speaker = start_errors(Segments(Path(folder) / "targets" / "train"), aligned, Path(sources.data_folder) / "times" / "train.words.ctm")
    errors = np.concatenate(list(by_speaker.values()))
    offset = float(np.median(errors))
    distance = np.abs(errors - offset)
    shares = {speaker: round(float((np.abs(values - offset) <= 20).mean()), 3) for speaker, values in sorted(by_speaker.items())}
    show({"minutes": options.minutes, "words": len(errors), "median_offset_ms": offset, "within_20_ms": float((distance <= 20).mean()),
          "within_20_ms_aim": 0.91, "within_50_ms": float((distance <= 50).mean()), "within_50_ms_aim": 0.985, "within_20_ms_by_speaker": shares})
