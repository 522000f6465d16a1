"""The training stages: a network for realignment, the teachers, their soft targets, students and the control."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from asr_kd import __version__
from asr_kd.compact_targets import LAYOUT
from asr_kd.corpus import Corpus
from asr_kd.distributed import by_first_process, from_first_process, rank
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.frame_data import FrameData, StreamedFrames, TrainingFrames, input_statistics, load_frame_data
from asr_kd.model import ModelShape
from asr_kd.precision import choose_precision
from asr_kd.schedule import ScheduleSettings
from asr_kd.settings import Settings
from asr_kd.soft_targets import STORED_BYTES, OnTheFlyTargets, SoftTargetRecord, SoftTargetStore, extract
from asr_kd.stage import Record, file_fingerprint, fingerprint, read_json, run_stage, write_json
from asr_kd.targets import Features, Targets, speed_prefix
from asr_kd.training import CHECKPOINT, SoftTargets, TrainingSettings, train

log = logging.getLogger(__name__)

NETWORKS, TRAINING = "networks.safetensors", "training.json"
INDEX_BYTES = 12  # per frame in memory beside its features: state id and place


@dataclass(frozen=True)
class TrainingData:
    """Frames to train on and frames of the tuning speakers to decide on, with what identifies them.

    Attributes:
        train: in memory, or streamed where they would take more than `frames_in_memory_gb`.
        inputs: name -> fingerprint of features and targets, those of the training splits alone, and the context of a window.
    """

    train: TrainingFrames
    tuning: FrameData
    num_states: int
    inputs: Mapping[str, str]

    @classmethod
    def load(cls, settings: Settings, corpus: Corpus, features: Features, targets: Targets, speeds: list[float] | None = None) -> TrainingData:
        """Read the frames of the training and tuning utterances that have targets (those without are listed beside the targets).

        Args:
            speeds: which copies of the training speech; all by default.
        """
        names = features.names_in_training(corpus)
        stores, states = [features.stores[name] for name in names], [targets.stores[name] for name in names]
        prefixes = sorted({prefix for _, prefix in features.origin.values()} if speeds is None else {speed_prefix(speed) for speed in speeds})

        def aligned(utt_ids: list[str]) -> list[str]:
            return [utt_id for utt_id in utt_ids if any(utt_id in store for store in states)]

        wanted = aligned([prefix + utt_id for prefix in prefixes for utt_id in corpus.train])
        inputs = {"features": fingerprint([features.fingerprints[name] for name in names]),
                  "targets": fingerprint([targets.fingerprints[name] for name in names])}
        inputs |= {"context": f"{settings.left_context} + 1 + {settings.right_context}"}  # other windows of the same width are other inputs
        inputs |= {"speeds": fingerprint(prefixes)} if speeds is not None else {}
        num_frames = sum(store.length(utt_id) for store in states for utt_id in set(wanted).intersection(store.utt_ids))
        size = num_frames * bytes_in_memory(settings)
        place = (settings.left_context, settings.right_context, torch.device(settings.device))
        held_out = aligned(corpus.tuning)
        if not held_out:
            raise AsrKdError(f"tuning_speakers: none of their {len(corpus.tuning)} utterances could be aligned, expected some to decide on; "
                             f"see exclusions.csv in {', '.join(str(store.folder) for store in states)}, or choose other speakers")
        tuning = load_frame_data(stores, states, held_out, *place)
        if size <= settings.frames_in_memory_gb * 1e9:
            return cls(load_frame_data(stores, states, wanted, *place), tuning, targets.hmm.num_states, inputs)
        log.info("%.1f GB of features and targets are streamed from the disk (frames_in_memory_gb is %g)", size / 1e9, settings.frames_in_memory_gb)
        streamed = StreamedFrames(stores, states, wanted, *place)
        order = {"streamed": fingerprint([streamed.chunk_frames, streamed.part_frames])}
        return cls(streamed, tuning, targets.hmm.num_states, inputs | order)


def bytes_in_memory(settings: Settings) -> int:
    """Bytes per frame of features, state ids and the soft targets that a GPU keeps; a CPU maps them from the disk.

    Whatever their form: it must not decide whether the teachers' frames are streamed, for then another form would ask for other teachers.
    """
    return 2 * settings.num_mels + INDEX_BYTES + (0 if torch.device(settings.device).type == "cpu" else STORED_BYTES)


def train_networks(stage: str, folder: Path, settings: Settings, data: TrainingData, *, seeds: list[int], epochs: float, student: bool = False,
                   soft_targets: SoftTargets | None = None, inputs: Mapping[str, str] | None = None) -> tuple[Ensemble, Record]:
    """Train one network per seed on hard targets, or on soft and hard ones; continue where an earlier run was cut.

    Args:
        student: take the student's size instead of a teacher's, and with soft targets its dropout.
        inputs: fingerprints of further inputs (the soft targets).
    """
    shape = network_shape(settings, data.num_states, student, soft_targets is not None)
    schedule = ScheduleSettings(learning_rate=settings.learning_rate, max_epochs=epochs)
    training = TrainingSettings(schedule=schedule, batch_frames=settings.batch_frames, precision=settings.precision)
    if soft_targets is not None:  # else another hard_weight would be another training of the teachers
        training = replace(training, hard_weight=settings.hard_weight)

    def work(folder: Path) -> None:
        if by_first_process((folder / NETWORKS).is_file):  # cut when only the stage's record was missing
            (folder / CHECKPOINT).unlink(missing_ok=True)
            return
        networks = Ensemble(shape, seeds)
        networks.set_input_statistics(*input_statistics(data.train, settings.num_mels, settings.seed))
        networks = networks.to(settings.device)
        result = train(networks, data.train, data.tuning, folder, training, seed=settings.seed, soft_targets=soft_targets)
        if rank() != 0:
            return
        write_json(folder / TRAINING, {"heldout_accuracy": result.heldout_accuracy, "diverged": result.diverged, "precision": result.precision})
        usable = [k for k, accuracy in enumerate(result.heldout_accuracy) if accuracy >= 0]  # the others diverged before they were ever evaluated
        if not usable:
            raise AsrKdError(f"{stage}: all {len(networks)} networks have weights that are NaN or infinite, expected numbers; lower learning_rate")
        if len(usable) < len(networks):
            log.error("%s: %d of %d networks diverged at once and are left out; lower learning_rate", stage, len(networks) - len(usable), len(networks))
            networks = Ensemble.of([networks.member(k) for k in usable], [seeds[k] for k in usable])
        networks.save(folder / NETWORKS)
        (folder / CHECKPOINT).unlink(missing_ok=True)

    deciding = {name: value for name, value in asdict(training).items() if name != "checkpoint_interval_s"}
    choices = {"shape": asdict(shape), "training": deciding, "seeds": seeds, "seed": settings.seed, "device": settings.device,
               "soft": soft_targets is not None}
    record = run_stage(stage, folder, choices, {**data.inputs, **(inputs or {})}, work, together=True)
    weights = by_first_process(lambda: file_fingerprint(folder / NETWORKS))  # another machine trains other weights from the same settings
    return Ensemble.load(folder / NETWORKS).to(settings.device), replace(record, inputs=record.inputs | {"weights": weights})


def used_precision(folder: Path) -> str:
    """The number format, "fp32" or "bf16", that the networks in a stage's folder were trained in."""
    return by_first_process(lambda: str(read_json(folder / TRAINING)["precision"]))


def network_shape(settings: Settings, num_states: int, student: bool = False, soft: bool = False) -> ModelShape:
    """The size of a teacher, or of the student, which is the teacher's where nothing else is said.

    Soft targets regularise by themselves, hard ones do not: `student_dropout` is for what learns from soft targets, the control has the
    teachers' dropout.
    """
    layers, units, dropout = settings.hidden_layers, settings.hidden_units, settings.dropout
    if student:
        layers, units = settings.student_hidden_layers or layers, settings.student_hidden_units or units
    if soft and settings.student_dropout is not None:
        dropout = settings.student_dropout
    input_dim = (settings.left_context + 1 + settings.right_context) * settings.num_mels
    return ModelShape(input_dim, layers, units, num_states, dropout)


def prepare_soft_targets(folder: Path, settings: Settings, data: TrainingData, teachers: Ensemble, teachers_fingerprint: str,
                         temperature: float) -> tuple[SoftTargets, Record]:
    """Soft targets at a temperature: the source for training, and the record of the store (of nothing stored where it is on the fly)."""
    if settings.soft_targets == "on_the_fly":
        source = OnTheFlyTargets(teachers, data.train, temperature, settings.teacher_mean)  # type: ignore[arg-type]
        choices = {"temperature": temperature, "mean": settings.teacher_mean}
        return source, Record("soft_targets", choices, {"teachers": teachers_fingerprint}, __version__, 0.0, {})
    wanted = SoftTargetRecord(temperature, settings.teacher_mean, data.num_states, teachers_fingerprint,  # type: ignore[arg-type]
                              data.inputs["features"], data.inputs["targets"])
    device = torch.device(settings.device)

    def work(folder: Path) -> None:
        shape = (len(teachers), 1024, settings.hidden_units, settings.hidden_units)
        extract(teachers, data.train, folder, wanted, seed=settings.seed, device=device, form=settings.soft_targets,  # type: ignore[arg-type]
                precision=from_first_process(choose_precision(settings.precision, device, shape)))

    choices = {"form": settings.soft_targets, "seed": settings.seed, **asdict(wanted)} | ({"layout": LAYOUT} if settings.soft_targets == "compact" else {})
    record = run_stage("soft_targets", folder, choices, data.inputs, work, together=True)
    return SoftTargetStore(folder, data.train, wanted, device), record
