"""The last stage: the student as one bundle for anyone's audio, and what a speaker never seen costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr_kd.bundle import InputSettings, save_bundle
from asr_kd.corpus import Corpus, Text
from asr_kd.ensemble import Ensemble
from asr_kd.frames import FrameStore
from asr_kd.normalisation import MeanNormalisation, choose_pseudo_count, log_posteriors, make_normalisation, raw_features
from asr_kd.recognition import Decoded, Recogniser
from asr_kd.score import WordErrors, score_split
from asr_kd.settings import Settings
from asr_kd.stage import Record, read_json, run_stage, write_json
from asr_kd.targets import Features, Targets, fbank_options


def publish_student(settings: Settings, corpus: Corpus, text: Text, features: Features, targets: Targets, student: Ensemble, student_record: Record,
                    recogniser: Recogniser, decoded: Mapping[str, Decoded]) -> tuple[dict[str, Any], Record]:
    """Write `student/bundle`, its mean normalisation chosen on the tuning speakers; measure it on the reported splits.

    Args:
        decoded: split -> the student's hypotheses with the means of whole speakers, or of the split.

    Returns:
        split -> way of normalising -> errors, words, wer, as the report reads it.
    """
    model = student.member(0).eval()

    def network(frames: NDArray[np.floating]) -> NDArray[np.float32]:
        return log_posteriors(model, frames, settings.left_context, settings.right_context)

    def work(folder: Path) -> None:
        in_training = [name for name, (split, prefix) in features.origin.items() if split not in corpus.evaluation and not prefix]
        normalisation = make_normalisation(settings.cmvn, [features.stores[name] for name in in_training], 0.0)
        if settings.cmvn == "speaker":
            splits = [(features.stores[name], targets.stores[name]) for name in in_training]
            chosen, _ = choose_pseudo_count(network, splits, corpus.tuning, normalisation)
            normalisation = replace(normalisation, pseudo_count_frames=chosen)
        inputs = InputSettings(fbank_options(settings), settings.left_context, settings.right_context, normalisation)
        save_bundle(folder, model, targets.hmm, text.lexicon, recogniser.graph, inputs, recogniser.decoding)
        costs = {split: _costs(split, normalisation) for split in corpus.evaluation} if settings.cmvn in ("speaker", "corpus") else {}
        write_json(folder / "cost_of_normalisation.json", costs)

    def _costs(split: str, normalisation: MeanNormalisation) -> dict[str, Any]:
        store = features.stores[split]
        references = {utterance.utt_id: utterance.words for utterance in corpus.splits[split] if utterance.utt_id in store}
        words = {settings.cmvn: decoded[split].words}
        ways = {"training": normalisation}
        if settings.cmvn == "speaker":
            ways = {"map": normalisation, "utterance": replace(normalisation, pseudo_count_frames=0.0)}
        for kind, way in ways.items():
            hypotheses = recogniser(_alone(store, way), len(references))
            words[kind] = {utt_id: hypothesis.words for utt_id, hypothesis in hypotheses.items()}
        totals = {kind: sum(score_split(references, own).values(), WordErrors()) for kind, own in words.items()}
        return {kind: total.as_json() for kind, total in totals.items()}

    def _alone(store: FrameStore, normalisation: MeanNormalisation) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for utt_id in store:
            yield utt_id, network(normalisation(raw_features(store, utt_id)))

    folder = settings.output / "student" / "bundle"
    inputs = {"student": student_record.fingerprint, "recogniser": recogniser.fingerprint}
    inputs |= {split: features.fingerprints[split] for split in corpus.evaluation}
    record = run_stage("bundle", folder, {"cmvn": settings.cmvn, "splits": corpus.evaluation}, inputs, work)
    return read_json(folder / "cost_of_normalisation.json"), record
