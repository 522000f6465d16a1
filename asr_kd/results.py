"""From what the stages wrote to results.json and the report."""

from __future__ import annotations

import csv
import json
import logging
import os
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asr_kd import __version__
from asr_kd.calibration import PosteriorQuality
from asr_kd.corpus import Corpus
from asr_kd.ensemble import Ensemble
from asr_kd.features import Windows
from asr_kd.frame_results import FrameResult, evaluate_frames
from asr_kd.graph import read_graph_info
from asr_kd.hmm.corpus import NO_FEATURES
from asr_kd.hmm.model import SIL, HmmModel
from asr_kd.networks import TRAINING
from asr_kd.recognition import Decoded, Recogniser
from asr_kd.report import write_report
from asr_kd.score import (
    WordErrors,
    gain_kept,
    per_speaker,
    pool,
    probability_better,
    resampled,
    score_split,
    system_row,
    top_confusions,
    word_confusions,
)
from asr_kd.settings import Settings
from asr_kd.stage import Record, read_json, write_json
from asr_kd.targets import Targets, store_names

TRAINED_IN = {"teachers": "teachers", "distilled": "student", "control": "control"}
"""System -> folder of its training stage in the output folder."""

log = logging.getLogger(__name__)


@dataclass
class Systems:
    """The networks that are compared and what they recognised.

    Attributes:
        teachers: the ensemble.
        single: "distilled" and "control" -> a network of one member.
        decoded: system ("ensemble", "distilled", "control", "member_0", ...) -> split -> hypotheses.
    """

    teachers: Ensemble
    single: dict[str, Ensemble]
    decoded: dict[str, dict[str, Decoded]] = field(default_factory=dict)


def make_results(settings: Settings, corpus: Corpus, targets: Targets, windows: Mapping[str, Windows], systems: Systems, recogniser: Recogniser,
                 stages: Mapping[str, Record]) -> dict[str, Any]:
    """Score everything; the keys are those that `asr_kd.report` documents."""
    begin = time.perf_counter()
    results: dict[str, Any] = {"splits": {}, "errors": {}, "calibration": {}}
    for split, own in windows.items():
        results["splits"][split], results["errors"][split], results["calibration"][split] = _score_split(split, own, corpus, targets, systems, settings.seed)
    for rows in results["splits"].values():
        rows["members"] = [{"number": number, **row} for number, row in zip(_member_numbers(settings), rows["members"], strict=True)]
    return results | {
        "references": _about_references({split: _references(own, corpus) for split, own in windows.items()}, corpus, recogniser.graph),
        "decoding": asdict(recogniser.decoding),
        "curves": {name: _curves(settings.output / folder) for name, folder in TRAINED_IN.items()},
        "exclusions": _exclusions(settings, corpus),
        "networks": {name: asdict(network.shape) | {"precision": read_json(settings.output / TRAINED_IN[name] / TRAINING)["precision"]}
                     for name, network in {"teachers": systems.teachers, **systems.single}.items()},
        "stages": {name: record.seconds for name, record in stages.items() if record.seconds} | {"score": time.perf_counter() - begin},
        "settings": asdict(settings),
        "environment": _environment(settings),
    }


def _score_split(split: str, windows: Windows, corpus: Corpus, targets: Targets, systems: Systems,
                 seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Rows of all systems, where the student's errors are, and calibration, on one split."""
    references = _references(windows, corpus)
    speakers = {utterance.utt_id: utterance.spk_id for utterance in corpus.splits[split]}
    words = {system: score_split(references, decoded[split].words) for system, decoded in systems.decoded.items()}
    phones = phone_of_state(targets.hmm)
    members, ensemble = evaluate_frames(systems.teachers, windows, targets.stores[split], phones)
    if not ensemble.counts:
        log.warning("%s: no frame accuracy, for none of its %d utterances could be aligned; see %s", split, len(references),
                    targets.stores[split].folder / "exclusions.csv")
    frames = {"ensemble": ensemble} | {name: evaluate_frames(network, windows, targets.stores[split], phones)[1] for name, network in systems.single.items()}
    decoded_members = [name for name in words if name.startswith("member_")]
    pooled = pool([words[name] for name in decoded_members])

    rows: dict[str, Any] = {"baseline": _baseline(members, [words[name] for name in decoded_members], pooled, speakers, seed)}
    rows["baseline"]["real_time_factor"] = statistics.mean(systems.decoded[name][split].real_time_factor for name in decoded_members)
    rows["baseline"]["unfinished"] = sum(len(systems.decoded[name][split].unfinished) for name in decoded_members)
    for system, result in frames.items():
        rows[system] = system_row(result.counts, words[system], speakers=speakers, seed=seed, real_time_factor=systems.decoded[system][split].real_time_factor)
        rows[system]["unfinished"] = len(systems.decoded[system][split].unfinished)
        rows[system]["probability_better"] = probability_better(words[system], pooled, speakers, seed)
    rows["distilled"]["probability_better_than_control"] = probability_better(words["distilled"], words["control"], speakers, seed)
    rows["members"] = [system_row(result.counts, words.get(f"member_{k}"), speakers=speakers, seed=seed) for k, result in enumerate(members)]
    rows["gain_kept"] = gain_kept(rows["baseline"], rows["ensemble"], rows["distilled"])
    rows["bootstrap"] = {"resampled": resampled(pooled, speakers), "speakers": len({speakers[utt_id] for utt_id in pooled})}

    hypotheses = systems.decoded["distilled"][split].words
    confusions = word_confusions(references, hypotheses)
    by_speaker = {system: per_speaker(counts, speakers) for system, counts in {"baseline": pooled, **{name: words[name] for name in frames}}.items()}
    errors = {
        "per_speaker": {speaker: {system: own[speaker].as_json() for system, own in by_speaker.items()} for speaker in by_speaker["baseline"]},
        "words": {"substitutions": [[*pair, count] for pair, count in confusions.substitutions.most_common(20)],
                  "deletions": confusions.deletions.most_common(15), "insertions": confusions.insertions.most_common(15)},
        "phones": top_confusions(frames["distilled"].phone_confusions, ["-", *targets.hmm.phones], 20),
    }
    calibration = {system: result.quality.as_json() for system, result in frames.items() if result.quality}
    if calibration:
        calibration = {"baseline": _mean_calibration([member.quality for member in members if member.quality]), **calibration}
    return rows, errors, calibration


def _member_numbers(settings: Settings) -> list[int]:
    """Numbers, from 1, of the teachers that are members: those that diverged before they were ever evaluated were left out."""
    trained = read_json(settings.output / "teachers" / "training.json")["heldout_accuracy"]
    return [number for number, accuracy in enumerate(trained, start=1) if accuracy >= 0]


def _references(windows: Windows, corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """Words of every utterance that has features."""
    words = corpus.words
    return {utt_id: words[utt_id] for utt_id in windows.utt_ids}


def _about_references(references: Mapping[str, Mapping[str, Sequence[str]]], corpus: Corpus, graph: Path) -> dict[str, dict[str, Any]]:
    """What of each split's words no system can recognise, and which of its speakers are trained on."""
    vocabulary, speakers = set(read_graph_info(graph)[1]), corpus.speakers
    trained_on = {speakers[utt_id] for utt_id in (*corpus.train, *corpus.tuning)}
    about = {}
    for split, own in references.items():
        words = [word for spoken in own.values() for word in spoken]
        about[split] = {"words": len(words), "out_of_vocabulary": sum(word not in vocabulary for word in words),
                        "speakers_in_training": sorted({speakers[utt_id] for utt_id in own} & trained_on)}
    return about


def score_system(network: Ensemble, split: str, windows: Windows, corpus: Corpus, targets: Targets, hypotheses: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Frame accuracy and word errors of one network on one split."""
    references = _references(windows, corpus)
    _, frames = evaluate_frames(network, windows, targets.stores[split], phone_of_state(targets.hmm))
    accuracy = {"frame_accuracy": frames.accuracy} if frames.counts else {}
    return accuracy | sum(score_split(references, hypotheses).values(), WordErrors()).as_json()


def _baseline(members: Sequence[FrameResult], words: Sequence[Mapping[str, WordErrors]], pooled: Mapping[str, WordErrors], speakers: Mapping[str, str],
              seed: int) -> dict[str, Any]:
    """The mean over the members, each scored alone; all have the same frames and words, so pooled counts give the mean rate."""
    row = system_row(pool([result.counts for result in members]), pooled, speakers=speakers, seed=seed)
    wers = [sum(own.values(), WordErrors()).wer for own in words]
    if "frame_accuracy" in row:
        accuracies = [result.accuracy for result in members]
        row["frame_accuracy_std"] = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    row["wer_std"] = statistics.stdev(wers) if len(wers) > 1 else 0.0
    row["decoded_members"] = len(wers)
    return row


def _mean_calibration(members: Sequence[PosteriorQuality]) -> dict[str, Any]:
    """The mean over members that have seen the same frames. Their bins are pooled for the curve, which hides errors of opposite sign: not for the ECE."""
    pooled = reduce(add, members).as_json()
    return pooled | {"ece": statistics.mean(member.bins.expected_calibration_error for member in members)}


def phone_of_state(hmm: HmmModel) -> NDArray[np.int64]:
    """(S,) phone id of each tied state; ids as in `HmmModel`."""
    phones = np.full(hmm.num_states, SIL, np.int64)
    for centre in range(1, len(hmm.phones) + 1):
        phones[np.unique(hmm.state_table[:, centre])] = centre
    return phones


def _curves(folder: Path) -> dict[str, Any]:
    """Accuracy over epochs as the report reads it."""
    entries = [json.loads(line) for line in (folder / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"epoch": [entry["epoch"] for entry in entries], "frame_accuracy": [entry["heldout_accuracy"] for entry in entries],
            "train_frame_accuracy": [entry["train_accuracy"] for entry in entries]}


def _exclusions(settings: Settings, corpus: Corpus) -> dict[str, dict[str, int]]:
    """Utterances left out, by split (or copy of one at another speed) and reason, and networks that diverged, from what the stages wrote."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in store_names(settings, corpus)}
    for name, own in counts.items():
        for path, cause in ((settings.output / "manifests" / f"{name}.exclusions.csv", "not usable"),
                            (settings.output / "features" / name / "exclusions.csv", "no features"),
                            (settings.output / "targets" / name / "exclusions.csv", "not aligned")):
            kinds = [_kind(reason) for reason in _reasons(path)]
            own.update(f"{cause}: {kind}" for kind in kinds if kind != NO_FEATURES)  # those are counted with the cause
    for name in TRAINED_IN.values():
        training = read_json(settings.output / name / TRAINING)
        best = training["heldout_accuracy"]
        own = counts.setdefault(name, Counter())  # a split may be called so too
        own.update(f"member {int(k) + 1}: loss not finite at step {step}, {'trained no further' if best[int(k)] >= 0 else 'left out'}"
                   for k, step in training["diverged"].items())
    return {split: dict(own) for split, own in counts.items() if own}


def _kind(reason: str) -> str:
    """A reason without its remedy, paths, numbers and words, which are another utterance's too.

    >>> _kind("data/1/a.flac: not readable as audio (Format not recognised); replace the file or leave the utterance out")
    'not readable as audio (Format not recognised)'
    >>> _kind("12 frames, shorter than its 30 states"), _kind("word outside the lexicon: ZEBRA")
    ('… frames, shorter than its … states', 'word outside the lexicon')
    """
    text = re.sub(r"^[^:]*/[^:]*: ", "", reason.partition(";")[0])
    return re.sub(r"\S*/\S*|\d+(\.\d+)?", "…", text.partition(":")[0])


def _reasons(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row["reason"] for row in csv.DictReader(file)]


def _environment(settings: Settings) -> dict[str, Any]:
    device = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else platform.processor() or platform.machine()
    return {"asr_kd": __version__, "torch": torch.__version__, "python": platform.python_version(), "device": device,
            "cpu capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def write_results(output_folder: Path, results: dict[str, Any]) -> Path:
    """Write results.json, report.md and report.html; returns the path of the page."""
    write_json(output_folder / "results.json", results)
    return write_report(output_folder, results)
