#!/usr/bin/env python3
"""Character CTC on speech in the LibriSpeech layout; with `teachers`, an ensemble of such models is distilled into one.

    python train.py hparams/train.yaml --data_folder D --output_folder O/teacher1 --seed 1
    python train.py hparams/train.yaml --data_folder D --output_folder O/student --seed 4 --teachers "[O/teacher1, O/teacher2]"
    python train.py hparams/train.yaml --data_folder D --output_folder O/ensemble --number_of_epochs 0 --teachers "[O/teacher1, O/teacher2]"
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.utils.distributed import run_on_main
from torch import Tensor, nn

from asr_kd.audio import read_audio
from asr_kd.corpus import check_apart
from asr_kd.errors import AsrKdError
from asr_kd.losses import average_teachers
from asr_kd.manifest import Utterance, load_splits
from asr_kd.model import save_tensors
from asr_kd.stage import alone_in, file_fingerprint, read_json, write_json

WEIGHTS = "model.safetensors"


class CTC(sb.Brain):
    """The usual CTC Brain; what distillation adds to it is marked."""

    def compute_forward(self, batch: Any, stage: sb.Stage) -> tuple[Tensor, Tensor, Tensor]:
        batch = batch.to(self.device)
        waveforms, length = batch.sig  # (B, samples), (B,)
        features = self.hparams.normalize(self.hparams.fbank(waveforms), length)  # (B, T, F)
        log_probs = self.hparams.log_softmax(self.modules.model(features))  # (B, T / 4, C)
        return features, log_probs, length

    def compute_objectives(self, predictions: tuple[Tensor, Tensor, Tensor], batch: Any, stage: sb.Stage) -> Tensor:
        features, log_probs, length = predictions
        tokens, token_length = batch.tokens
        loss = self.hparams.ctc_loss(log_probs, tokens, length, token_length)
        if stage == sb.Stage.TRAIN and self.hparams.teachers:  # distillation
            soft_targets = teacher_posteriors(self.hparams.teachers, features, self.hparams.temperature)
            loss = self.hparams.ctc_weight * loss + self.hparams.distillation(log_probs, soft_targets, length=length)
        if stage != sb.Stage.TRAIN:
            self.score(log_probs, length, batch)
        return loss

    def score(self, log_probs: Tensor, length: Tensor, batch: Any) -> None:
        hypotheses = ["".join(self.hparams.alphabet[i - 1] for i in ids) for ids in ctc_greedy_decode(log_probs, length, blank_id=0)]
        self.characters.append(batch.id, [list(text) for text in hypotheses], [list(text) for text in batch.wrd])
        self.words.append(batch.id, [text.split() for text in hypotheses], [text.split() for text in batch.wrd])

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        if stage != sb.Stage.TRAIN:
            self.characters, self.words = self.hparams.error_rate(), self.hparams.error_rate()

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"loss": stage_loss}
            return
        stats = {"loss": stage_loss, "CER": self.characters.summarize("error_rate"), "WER": self.words.summarize("error_rate")}
        if stage == sb.Stage.VALID:
            old_rate, new_rate = self.hparams.annealing(epoch)
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_rate)
            self.hparams.train_logger.log_stats({"epoch": epoch, "lr": old_rate}, train_stats=self.train_stats, valid_stats=stats)
            self.checkpointer.save_and_keep_only(meta={"CER": stats["CER"]}, min_keys=["CER"])
        else:
            self.hparams.train_logger.log_stats({"epoch": self.hparams.epoch_counter.current}, test_stats=stats)
            with open(self.hparams.wer_file, "w", encoding="utf-8") as file:
                self.words.write_stats(file)


class Ensemble(CTC):
    """Teachers with nothing to train: the mean of their posteriors is scored."""

    def compute_forward(self, batch: Any, stage: sb.Stage) -> tuple[Tensor, Tensor, Tensor]:
        features, _, length = super().compute_forward(batch, stage)
        return features, teacher_posteriors(self.hparams.teachers, features, temperature=1.0).log(), length


@torch.no_grad()
def teacher_posteriors(teachers: Sequence[nn.Module], features: Tensor, temperature: float) -> Tensor:
    """Soft targets (B, T / 4, C) of an ensemble for the very features that the student sees."""
    return average_teachers((teacher(features) for teacher in teachers), temperature)


def load_teachers(model: nn.Module, folders: Sequence[str], device: str | torch.device) -> list[nn.Module]:
    """Models of the same form as `model` with the weights that earlier runs left in `folders`."""
    teachers = []
    for path in map(weights_of, folders):
        teacher = copy.deepcopy(model)
        try:
            teacher.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise AsrKdError(f"{path}: not the weights of a model of this run's form ({str(error).split(chr(10))[-1].strip()}); teachers and student "
                             "have one form: give the settings that the teacher was trained with, or train it again") from error
        teachers.append(teacher.eval().requires_grad_(False).to(device))
    return teachers


def weights_of(folder: str) -> Path:
    """The file with a teacher's weights."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise AsrKdError(f"teacher {folder}: no {WEIGHTS} in it; expected the output folder of a finished run; train the teacher first")
    return path


def dataset(utterances: Sequence[Utterance], alphabet: str, sample_rate: int) -> sb.dataio.dataset.DynamicItemDataset:
    """Utterances in order of length, with waveform (resampled to `sample_rate`) and character ids (0 is the blank)."""
    for utterance in utterances:
        unknown = set(" ".join(utterance.words)) - set(alphabet)
        if unknown:
            raise AsrKdError(f"{utterance.utt_id}: {min(unknown)!r} in its transcript is not in the alphabet {alphabet!r}; change the transcripts, or "
                             "alphabet with num_tokens")

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav: str) -> Tensor:
        return torch.from_numpy(read_audio(wav, sample_rate))

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens")
    def text_pipeline(wrd: str) -> Tensor:
        return torch.tensor([alphabet.index(character) + 1 for character in wrd])

    rows = {u.utt_id: {"duration": u.duration_s, "wav": str(u.wav), "wrd": " ".join(u.words)} for u in sorted(utterances, key=lambda u: u.duration_s)}
    return sb.dataio.dataset.DynamicItemDataset(rows, [audio_pipeline, text_pipeline], ["id", "sig", "wrd", "tokens"])


def training_hours(utterances: Sequence[Utterance], hours: float | None) -> list[Utterance]:
    """A random choice of utterances of at most `hours` together, the same for every seed; all of them for None."""
    if hours is None:
        return list(utterances)
    shuffled = sorted(utterances, key=lambda u: u.utt_id)
    random.Random(0).shuffle(shuffled)
    chosen, total_s = [], 0.0
    for utterance in shuffled:
        if total_s + utterance.duration_s <= 3600 * hours:
            chosen.append(utterance)
            total_s += utterance.duration_s
    return chosen


def load_data(hparams: dict[str, Any]) -> dict[str, sb.dataio.dataset.DynamicItemDataset]:
    """train, valid (the tuning speakers, held out of train) and test."""
    known, _ = load_splits(hparams["train_splits"], hparams["data_folder"])
    tuning = {str(speaker) for speaker in hparams["tuning_speakers"]}
    missing = tuning - {u.spk_id for u in known}
    if missing:
        raise AsrKdError(f"tuning_speakers {sorted(missing)} are not in {hparams['train_splits']}; name speakers of the training splits")
    test, _ = load_splits(hparams["test_splits"], hparams["data_folder"])
    check_apart(known, {"test_splits": test})
    train = training_hours([u for u in known if u.spk_id not in tuning], hparams["train_hours"])
    splits = {"train": train, "valid": [u for u in known if u.spk_id in tuning], "test": test}
    return {name: dataset(utterances, hparams["alphabet"], hparams["sample_rate"]) for name, utterances in splits.items()}


LEARNT_FROM = ("seed", "temperature", "ctc_weight", "train_splits", "tuning_speakers", "train_hours", "alphabet", "num_mels", "channels", "kernel_size",
               "dropout", "lr", "batch_size")
"""Settings that may not change where a model is trained further; a larger number_of_epochs is what it is for."""


def note_origin(hparams: dict[str, Any]) -> None:
    """Note what a model learns from; `AsrKdError` where its folder holds one that learned from something else, which would be continued."""
    folder = Path(hparams["output_folder"])
    path = folder / "origin.json"
    origin = {"teachers": [file_fingerprint(weights_of(teacher)) for teacher in hparams["teachers"]],
              **{name: hparams[name] for name in LEARNT_FROM}}
    if (folder / WEIGHTS).exists() or any(Path(hparams["save_folder"]).glob("CKPT*")):
        earlier = read_json(path) if path.is_file() else {}
        differing = [name for name in origin if earlier.get(name) != origin[name]]
        if differing:
            kind = "other" if earlier else "unknown"
            raise AsrKdError(f"{folder}: holds a model with {kind} {', '.join(differing)}, expected one of this run's to continue; "
                             "give another output_folder or remove it")
    write_json(path, origin)


def main(arguments: Sequence[str]) -> None:
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    sb.utils.distributed.ddp_init_group(run_opts)  # under torchrun
    with open(hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, overrides)
    with alone_in(Path(hparams["output_folder"])):
        run(hparams, hparams_file, overrides, run_opts)


def run(hparams: dict[str, Any], hparams_file: str, overrides: str, run_opts: dict[str, Any]) -> None:
    """Train a model, or score an ensemble for `number_of_epochs` 0."""
    ensemble = hparams["teachers"] and hparams["number_of_epochs"] == 0
    if hparams["number_of_epochs"] == 0 and not ensemble:
        raise AsrKdError("number_of_epochs: 0 and no teachers, expected teachers to score as an ensemble, or epochs to train a model")
    if not (ensemble or run_opts.get("debug")):
        run_on_main(note_origin, args=[hparams])
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
    data = load_data(hparams)
    brain = (Ensemble if ensemble else CTC)(hparams["modules"], hparams["optimizer"], hparams, run_opts, hparams["checkpointer"])
    brain.hparams.teachers = load_teachers(hparams["model"], hparams["teachers"], brain.device)  # distillation
    brain.fit(hparams["epoch_counter"], data["train"], data["valid"], hparams["train_loader"], hparams["test_loader"])
    brain.evaluate(data["test"], min_key="CER", test_loader_kwargs=hparams["test_loader"])
    if ensemble or brain.debug:  # two batches of --debug make no model for others
        return
    weights = hparams["model"].state_dict()
    run_on_main(save_tensors, args=[Path(hparams["output_folder"]) / WEIGHTS, weights, {}])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AsrKdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
