"""The whole experiment, top to bottom: a corpus in, Table 1 of Hinton, Vinyals & Dean (2015) out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from asr_kd.corpus import Corpus, prepare_corpus, prepare_text
from asr_kd.distributed import local_rank, local_world_size, rank
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.features import Windows
from asr_kd.networks import TrainingData, prepare_soft_targets, train_networks, used_precision
from asr_kd.publish import publish_student
from asr_kd.recognition import Recogniser, decode_system, prepare_graph, remove_other_systems, tune_decoding
from asr_kd.results import Systems, make_results, score_system, write_results
from asr_kd.settings import Settings, load_settings
from asr_kd.sources import find_sources
from asr_kd.stage import Record, alone_in, read_json
from asr_kd.targets import Features, Targets, prepare_features, prepare_targets, realign

log = logging.getLogger(__name__)


def _demo_hparams() -> Path:
    """The recipe's own file in a checkout, else the copy that was installed with the package."""
    checkout = Path(__file__).resolve().parent.parent / "recipes" / "LibriSpeech" / "hparams" / "demo.yaml"
    if not checkout.is_file():
        with suppress(metadata.PackageNotFoundError, StopIteration):
            return Path(str(next(file for file in metadata.files("asr-kd") or [] if file.name == checkout.name).locate()))
    return checkout


DEMO_HPARAMS = _demo_hparams()


def run(hparams: Path | str, overrides: Sequence[str] = (), sweep: bool = False) -> Path:
    """Run a recipe from its settings file and print its table; what an earlier run finished is not done again.

    Started by `torchrun`, all processes come here; the first one writes and prints.

    Args:
        sweep: also distil a student at each of `sweep_temperatures`, for the report's temperature sweep.

    Returns:
        The path of report.html.
    """
    settings = load_settings(hparams, overrides)
    with alone_in(settings.output):
        results = run_experiment(settings, sweep)
        if rank() != 0:
            return settings.output / "report.html"
        report = write_results(settings.output, results)
    if results["splits"]:
        print(first_table(settings.output / "report.md"))
    print(report)
    return report


def run_experiment(settings: Settings, sweep: bool = False) -> dict[str, Any]:
    """Section 4 of the paper: states from an aligner, ten networks on them, one network on the ten networks' mean posteriors.

    Returns:
        What `results.json` holds; nothing in other processes than the first.
    """
    check_device(settings.device)
    out, seed = settings.output, settings.seed * 1000
    stages: dict[str, Record] = {}

    # speech, words, features
    sources, stages["corpus"] = find_sources(settings)
    corpus, stages["manifests"] = prepare_corpus(settings, sources.data_folder)
    text, stages["text"] = prepare_text(settings, corpus, sources.lexicon, sources.lm, sources.lm_text)
    features, stages["features"] = prepare_features(settings, corpus)

    # one alignment for all systems: by Gaussian mixtures, then by a network trained on what they found
    targets, stages["align"] = prepare_targets(settings, corpus, text, features)
    for number in range(1, settings.network_realignments + 1):
        data, name = TrainingData.load(settings, corpus, features, targets), f"aligner_{number}"
        aligner, stages[name] = train_networks(name, out / name, settings, data, seeds=[seed + 900 + number], epochs=settings.teacher_epochs)
        del data  # not two copies of the frames at a time
        targets, stages[f"realign_{number}"] = realign(settings, corpus, text, features, targets, aligner, stages[name].fingerprint, number)
    data = TrainingData.load(settings, corpus, features, targets)

    # teachers differ by their seeds only: initial weights and dropout
    teachers, stages["teachers"] = train_networks("teachers", out / "teachers", settings, data, seeds=[seed + k for k in range(settings.num_teachers)],
                                                  epochs=settings.teacher_epochs)

    training_targets = data.inputs["targets"]
    if settings.student_speeds is not None:
        del data
        data = TrainingData.load(settings, corpus, features, targets, settings.student_speeds)

    def as_the_student() -> Settings:
        return replace(settings, precision=used_precision(out / "student"))  # "auto" may find another number format, and it would be compared as well

    def distil(temperature: float) -> tuple[Ensemble, Record]:
        own = temperature == settings.temperature
        folder, suffix = (out, "") if own else (out / "sweep" / f"T{temperature:g}", f"_T{temperature:g}")
        soft_targets, soft = prepare_soft_targets(folder / "soft_targets", settings, data, teachers, stages["teachers"].fingerprint, temperature)
        student, trained = train_networks("student", folder / "student", settings if own else as_the_student(), data, seeds=[seed + 500],
                                          epochs=settings.student_epochs, student=True, soft_targets=soft_targets, inputs={"soft_targets": soft.fingerprint})
        stages.update({f"soft_targets{suffix}": soft, f"student{suffix}": trained})
        return student, trained

    # the student, and beside it the same network trained as long on hard targets alone
    student, _ = distil(settings.temperature)
    control, stages["control"] = train_networks("control", out / "control", as_the_student(), data, seeds=[seed + 500],
                                                epochs=settings.student_epochs, student=True)

    # words: scales are chosen on the tuning speakers by one teacher, and kept for all systems
    stages["graph"] = prepare_graph(settings, corpus, text, targets, training_targets)
    first = Ensemble.of([teachers.member(0)])
    recogniser, stages["tuning"] = tune_decoding(settings, stages["graph"], targets.hmm, first, stages["teachers"].fingerprint,
                                                 features.windows(settings, corpus.tuning), corpus)
    windows = {split: features.windows(settings, features.stores[split].utt_ids) for split in corpus.evaluation}
    systems = Systems(teachers, {"distilled": student, "control": control})
    networks = {f"member_{k}": (Ensemble.of([teachers.member(k)]), "teachers") for k in range(min(settings.decoded_members, len(teachers)))}
    networks |= {"ensemble": (teachers, "teachers"), "distilled": (student, "student"), "control": (control, "control")}
    for name, (network, stage) in networks.items():
        decoded, stages[f"decode {name}"] = decode_system(settings, recogniser, name, network, stages[stage].fingerprint, windows, features)
        systems.decoded[name] = decoded

    costs, stages["bundle"] = publish_student(settings, corpus, text, features, targets, student, stages["student"], recogniser, systems.decoded["distilled"])
    results: dict[str, Any] = {"cost_of_normalisation": costs}
    scored = [prints[split] for split in corpus.evaluation[:1] for prints in (features.fingerprints, targets.fingerprints)]
    systems_of_sweep = [stages["student"].fingerprint, recogniser.fingerprint, *scored]
    if sweep:
        split = corpus.evaluation[0]
        rows = sweep_temperatures(settings, corpus, features, targets, recogniser, split, windows[split], distil, stages)
        results["temperature_sweep"] = {"split": split, "rows": rows, "of": systems_of_sweep}
    elif (earlier := earlier_sweep(out / "results.json")).get("of") == systems_of_sweep:
        results["temperature_sweep"] = earlier
    if rank() != 0:
        return {}
    remove_other_systems(out, [*networks, *(f"distilled_T{row['temperature']:g}" for row in results.get("temperature_sweep", {}).get("rows", []))])
    return make_results(settings, corpus, targets, windows, systems, recogniser, stages) | results


def sweep_temperatures(settings: Settings, corpus: Corpus, features: Features, targets: Targets, recogniser: Recogniser, split: str, windows: Windows,
                       distil: Callable[[float], tuple[Ensemble, Record]], stages: dict[str, Record]) -> list[dict[str, Any]]:
    """One student per temperature, everything else equal, scored on one split; notes the records in `stages`."""
    rows = []
    for temperature in settings.sweep_temperatures:
        student, record = distil(temperature)
        name = f"distilled_T{temperature:g}"
        decoded, stages[f"decode {name}"] = decode_system(settings, recogniser, name, student, record.fingerprint, {split: windows}, features)
        rows.append({"temperature": temperature, **score_system(student, split, windows, corpus, targets, decoded[split].words)})
    return rows


def earlier_sweep(path: Path) -> dict[str, Any]:
    """The temperature sweep in an earlier run's results; empty where there is none."""
    with suppress(AsrKdError):
        results = read_json(path)
        sweep = results.get("temperature_sweep") if isinstance(results, dict) else None
        return sweep if isinstance(sweep, dict) else {}
    return {}


def check_device(device: str) -> None:
    """Raise `AsrKdError` unless tensors can be put there; started by `torchrun`, "cuda" is from now on the GPU of this process."""
    try:
        wanted = torch.device(device)
        if wanted.type == "cuda" and local_world_size() > 1:
            if wanted.index is not None:
                raise AsrKdError(f"device: {device} for {local_world_size()} processes, expected a GPU for each; give --device cuda")
            torch.cuda.set_device(local_rank())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AsrKdError(f"device: {device} cannot be used ({str(error).splitlines()[0]}); give --device cpu or cuda") from error


def first_table(report: Path) -> str:
    """The first table of a Markdown file."""
    lines = report.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next((number for number in range(first, len(lines)) if not lines[number].startswith("|")), len(lines))
    return "\n".join(lines[first:last])
