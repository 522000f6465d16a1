"""Frame-level training of K stacked networks that can be cut at any moment and goes on with the same result.

The loop is our own rather than `speechbrain.Brain`'s: Brain trains one module with one optimiser over padded utterances from a
DataLoader, while here K members share every batch of frames and each has its own loss, clipping, learning rate and best weights.

Everything random is a function of a seed and the step number, so a checkpoint holds no generator states. Under `torchrun` every
process takes its share of each batch, gradients are summed, and all processes come to the same decisions; the first one writes.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from asr_kd.distributed import add_over_processes, from_first_process, own_share, rank, smallest_over_processes, wait_for_all, world_size
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.frame_data import FrameData, Part, StreamedFrames, TrainingFrames, load_ahead
from asr_kd.hard_losses import count_correct, hard_losses
from asr_kd.losses import SparseTargets, distillation_loss
from asr_kd.precision import choose_precision, precision_context
from asr_kd.progress import progress
from asr_kd.schedule import Schedule, ScheduleSettings, finite_or_none
from asr_kd.stage import atomic_path, fingerprint, write_text

CHECKPOINT = "checkpoint.pt"
CURVES = "curves.jsonl"
_CHECK_STEPS = 100  # steps between looks at the losses: a look makes a GPU wait
_FORMAT = 6  # of checkpoints
_NEVER = 2**62
_PROGRESS = ("epoch", "batch", "step", "epochs", "precision", "best", "curves", "diverged")  # what a checkpoint holds of a trainer as it is

log = logging.getLogger(__name__)


class SoftTargets(Protocol):
    """Teachers' tempered posteriors by frame number, in the numbering of the training data.

    Where that is streamed, `of` gives those of a part of it, in the part's numbering; else it is not needed.
    """

    @property
    def temperature(self) -> float: ...
    def batch(self, frame_indices: Tensor) -> Tensor | SparseTargets: ...
    def of(self, frames: FrameData) -> SoftTargets: ...


@dataclass(frozen=True)
class TrainingSettings:
    """How networks are trained.

    Attributes:
        schedule: learning rates and the number of epochs.
        batch_frames: frames per step.
        evaluations_per_epoch: how often the held-out accuracy is measured and the learning rate decided on.
        heldout_frames: held-out frames that are measured, a fixed random sample.
        weight_decay: of AdamW; 0 is Adam.
        max_grad_norm: each member's gradient is scaled down to this norm.
        precision: "auto", "fp32" or "bf16" matrix products; weights and optimiser state are float32.
        hard_weight: of the distillation loss; unused without soft targets, which bring their temperature.
        checkpoint_interval_s: at most this much work and 100 steps are lost when training is cut, or 20 times what it takes to write a checkpoint; 0:
            one is written as often as the losses are looked at.
    """

    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    batch_frames: int = 1024
    evaluations_per_epoch: int = 2
    heldout_frames: int = 50_000
    weight_decay: float = 0.0
    max_grad_norm: float = 5.0
    precision: str = "auto"
    hard_weight: float = 0.5
    checkpoint_interval_s: float = 60.0


@dataclass(frozen=True)
class TrainingResult:
    """What training found; the networks themselves hold their best weights.

    Attributes:
        heldout_accuracy: best of each member, on the held-out sample.
        curves: one entry per evaluation: step, epoch, and per member learning_rate, train_loss, train_accuracy, heldout_accuracy.
        diverged: member -> step of its first loss that was not finite; its weights are its best ones before that step.
        precision: "fp32" or "bf16", as used.
    """

    heldout_accuracy: list[float]
    curves: list[dict[str, Any]]
    diverged: dict[int, int]
    precision: str


def train(networks: Ensemble, data: TrainingFrames, heldout: FrameData, folder: Path | str, settings: TrainingSettings, *, seed: int,
          soft_targets: SoftTargets | None = None) -> TrainingResult:
    """Train all members on the same batches and leave each with the weights of its best held-out accuracy.

    Args:
        networks: K members (one for a baseline, a control or a student), on the device to train on; changed in place.
        data: frames to train on, in memory on that device or streamed to it.
        heldout: frames of other speakers, to decide on, on that device.
        folder: holds the checkpoint, to go on from after a cut, and `curves.jsonl`.
        seed: order of the frames. Dropout depends on the member's own seed.
        soft_targets: without them the loss is the cross-entropy with the hard targets.

    Raises:
        AsrKdError: the loss of every member became NaN, because of features or before any was evaluated; state ids out of range; fewer frames in a
            batch than processes; a checkpoint of other settings or a full disk.
    """
    return _Trainer(networks, data, heldout, Path(folder), settings, seed, soft_targets).run()


class _Trainer:
    def __init__(self, networks: Ensemble, data: TrainingFrames, heldout: FrameData, folder: Path, settings: TrainingSettings, seed: int,
                 soft_targets: SoftTargets | None) -> None:
        self.networks, self.data, self.heldout, self.folder = networks, data, heldout, folder
        self.settings, self.seed, self.soft_targets = settings, seed, soft_targets
        self.device = networks.input_mean.device
        if isinstance(data, FrameData):
            data.check_targets(networks.shape.num_states)
        heldout.check_targets(networks.shape.num_states)
        self.values = networks.values.detach()  # (K, P)
        self.gradient = torch.zeros_like(self.values)
        self.members = list(self.values)  # views
        for member, gradient in zip(self.members, self.gradient, strict=True):
            member.grad = gradient
        groups: list[dict[str, Any]] = [{"params": [member]} for member in self.members]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
        self.schedule = Schedule(settings.schedule, len(networks))
        self.best = self.values.clone()
        self.generators = [torch.Generator(self.device) for _ in networks.seeds]
        self.curves: list[dict[str, Any]] = []
        self.diverged: dict[int, int] = {}
        self.epoch, self.batch, self.step, self.epochs = 0, 0, 0, 0.0
        self.precision = ""
        self.sums = _Sums(len(networks), self.device)
        self.num_batches = 0  # of the present epoch
        self.part = data if isinstance(data, FrameData) else heldout  # frames in memory; streamed ones from the first batch on
        self.part_targets = soft_targets
        self.recent: deque[tuple[FrameData, Tensor]] = deque(maxlen=_CHECK_STEPS)

    def run(self) -> TrainingResult:
        self._resume()
        self.precision = self.precision or from_first_process(choose_precision(self.settings.precision, self.device, self._product_shape()))
        with precision_context(self.precision, self.device), progress(desc=self.folder.name, total=self.settings.schedule.max_epochs, unit="epoch") as bar:
            while not self._finished():
                self._run_epoch(bar)
        self.values.copy_(self.best)
        return TrainingResult(list(self.schedule.best), self.curves, self.diverged, self.precision)

    def _run_epoch(self, bar: Any) -> None:
        parts, saved_at = self.settings.evaluations_per_epoch, time.monotonic()
        interval_s = self.settings.checkpoint_interval_s
        for batch in self._batches():
            self._step(batch)
            parts_done = int(self.batch / self.num_batches * parts)
            self.batch, self.step = self.batch + 1, self.step + 1
            self.epochs = self.epoch + self.batch / self.num_batches
            due = int(self.batch / self.num_batches * parts) > parts_done or self._finished()
            if due or self.step % _CHECK_STEPS == 0:
                self._check_losses()
                bar.update(self.epochs - bar.n)
                if due:
                    self._evaluate()
                if due or from_first_process(time.monotonic() - saved_at > interval_s):
                    start = time.monotonic()
                    self._save()
                    saved_at = time.monotonic()
                    if interval_s > 0:
                        interval_s = max(self.settings.checkpoint_interval_s, 20 * (saved_at - start))  # however large they are
            if self._finished():
                break
        if self.batch == self.num_batches:
            self.epoch, self.batch = self.epoch + 1, 0

    def _batches(self) -> Iterator[Tensor]:
        """Frame numbers in `part` of each batch of the epoch that is still to come."""
        parts = self.data.parts(self.seed, self.epoch)
        counts = [max(1, round(part.num_frames / self.settings.batch_frames)) for part in parts]
        if min(part.num_frames // count for part, count in zip(parts, counts, strict=True)) < world_size():
            raise AsrKdError(f"batch_frames: got {self.settings.batch_frames}, expected some frames of every batch for each of {world_size()} processes; "
                             "raise it")
        self.num_batches, done = sum(counts), 0
        if self.batch == self.num_batches:  # cut at the end of an epoch
            return
        while counts[0] <= self.batch - done:  # parts that were finished before a cut
            parts, done, counts = parts[1:], done + counts[0], counts[1:]
        for count, loaded in zip(counts, load_ahead([partial(self._load, part) for part in parts]), strict=True):
            if self.recent:  # looked at now, so that parts that are over are not kept in memory for a look that comes later
                self._check_losses()
                self.recent.clear()
            self.part, frames, self.part_targets = loaded
            yield from frames.tensor_split(count)[self.batch - done:]
            done += count

    def _load(self, part: Part) -> tuple[FrameData, Tensor, SoftTargets | None]:
        """A part of the data with the numbers of the frames to train on and its soft targets."""
        data, frames = part.load()
        if data is self.data:
            return data, frames.to(self.device), self.soft_targets
        data.check_targets(self.networks.shape.num_states)
        return data, frames.to(self.device), None if self.soft_targets is None else self.soft_targets.of(data)

    def _finished(self) -> bool:
        return self.epochs >= self.settings.schedule.max_epochs or all(self.schedule.stopped)

    def _step(self, frame_indices: Tensor) -> None:
        own = own_share(frame_indices)
        for generator, seed in zip(self.generators, self.networks.seeds, strict=True):
            generator.manual_seed(((seed * 1_000_003 + self.step) * world_size() + rank()) % 2**63)
        self.recent.append((self.part, frame_indices))
        logits = self.networks(self.part.windows.gather(own), self.generators, self.gradient)  # (K, B, S)
        targets = self.part.targets[own].long()
        losses, correct = self._losses(logits, targets, own)
        losses = losses * (len(own) / len(frame_indices))
        torch.autograd.grad(losses.sum(), self.networks.values)  # written to self.gradient
        add_over_processes([self.gradient])
        self.sums.add(losses.detach(), correct, len(frame_indices), self.step)
        self._clip_gradients()
        self._update()

    def _losses(self, logits: Tensor, targets: Tensor, frame_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and number of correct frames of each member, (K, B, S) -> (K,) and (K,)."""
        if self.part_targets is None:
            return hard_losses(logits, targets)
        soft_targets = self.part_targets.batch(frame_indices)
        temperature, hard_weight = self.part_targets.temperature, self.settings.hard_weight
        try:
            losses = [distillation_loss(member, soft_targets, targets, temperature=temperature, hard_weight=hard_weight) for member in logits]
        except ValueError as error:
            probabilities = soft_targets if isinstance(soft_targets, Tensor) else soft_targets.probabilities
            bad = self.part.utterances_of(frame_indices[~probabilities.isfinite().all(1)])
            where = f" ({', '.join(bad[:3])})" if bad else ""
            raise AsrKdError(f"{self.folder}: {error}{where}; remove the folder of the soft targets and run the same command again") from error
        return torch.stack(losses), count_correct(logits.detach(), targets)

    def _clip_gradients(self) -> None:
        """Scale each member's gradient down to at most `max_grad_norm`."""
        norms = torch.linalg.vector_norm(self.gradient, dim=1)  # (K,)
        factors = (self.settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        if self.device.type == "cpu" and bool((factors == 1.0).all()):
            return
        self.gradient.mul_(factors[:, None])

    def _update(self) -> None:
        for k, (group, member) in enumerate(zip(self.optimizer.param_groups, self.members, strict=True)):
            group["lr"] = self.schedule.learning_rate(k, self.epochs)
            if self.schedule.stopped[k]:
                member.grad = None
        self.optimizer.step()

    def _check_losses(self) -> None:
        """Put members with a loss that was not finite back to their best weights, and train them no further."""
        known = len(self.diverged)
        for k, step in enumerate(smallest_over_processes(self.sums.first_bad_step).tolist()):
            if step == _NEVER or k in self.diverged:
                continue
            self.diverged[k] = step
            self.schedule.stop(k)
            self.values[k] = self.best[k]
            log.error("member %d: loss not finite at step %d; it keeps its best weights so far and trains no further", k, step)
        if len(self.networks) == len(self.diverged) > known:
            self._explain_divergence(max(self.diverged.values()))

    def _explain_divergence(self, step: int) -> None:
        """Raise `AsrKdError` where features are to blame, or where no member has earlier weights to keep."""
        part, batch = self.recent[step - self.step]
        bad_rows = ~part.windows.gather(batch).isfinite().all(1)
        where = f"{self.folder}: loss NaN or infinite at step {step} for all {len(self.networks)} members, expected a number"
        if bool(bad_rows.any()):
            raise AsrKdError(f"{where}; features of {', '.join(part.utterances_of(batch[bad_rows])[:3])} are not finite: run the features stage again")
        if max(self.schedule.best) < 0:
            first = part.utterances_of(batch[:1])[0]
            raise AsrKdError(f"{where}; the batch's features are finite (first: {first}): lower learning_rate or check the soft targets")

    def _evaluate(self) -> None:
        accuracies = heldout_accuracy(self.networks, self.heldout, self.settings.heldout_frames)
        rates = [self.schedule.learning_rate(k, self.epochs) for k in range(len(self.networks))]
        finite = self.values.isfinite().all(1).tolist()
        improved = self.schedule.observe([accuracy if whole else -1.0 for accuracy, whole in zip(accuracies, finite, strict=True)])
        for k in (k for k, better in enumerate(improved) if better):
            self.best[k] = self.values[k]
        losses, train_accuracies = self.sums.over_processes().means()
        self.curves.append({"step": self.step, "epoch": round(self.epochs, 4), "learning_rate": rates, "train_loss": finite_or_none(losses),
                            "train_accuracy": finite_or_none(train_accuracies), "heldout_accuracy": accuracies})
        if rank() == 0:
            write_text(self.folder / CURVES, "".join(json.dumps(entry) + "\n" for entry in self.curves))
        self.sums.reset()
        log.info("epoch %.2f: train loss %.3f, train accuracy %.4f, held-out accuracy %.4f (mean of %d members)", self.epochs, _mean(losses),
                 _mean(train_accuracies), _mean(accuracies), len(accuracies))

    def _product_shape(self) -> tuple[int, int, int, int]:
        shape = self.networks.shape
        return len(self.networks), self.settings.batch_frames, shape.hidden_units, shape.hidden_units

    def _fingerprint(self) -> str:
        settings = {**asdict(self.settings), "checkpoint_interval_s": None}
        order = [self.data.chunk_frames, self.data.part_frames] if isinstance(self.data, StreamedFrames) else []
        return fingerprint([_FORMAT, settings, asdict(self.networks.shape), self.networks.seeds, self.seed, self.data.utt_ids, self.data.num_frames,
                            self.heldout.utt_ids, None if self.soft_targets is None else self.soft_targets.temperature, *order])

    def _save(self) -> None:
        sums = self.sums.over_processes()
        if rank() != 0:
            return
        state = {"fingerprint": self._fingerprint(), **{name: getattr(self, name) for name in _PROGRESS},
                 "values": self.values, "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "sums": sums.__dict__}
        with atomic_path(self.folder / CHECKPOINT, (RuntimeError,)) as part:
            torch.save(state, part)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not from_first_process(path.exists()):
            return
        state = _read_checkpoint(path, self.device)
        wait_for_all()  # the first process removes the checkpoint when training is over
        if state.get("fingerprint") != self._fingerprint():
            raise AsrKdError(f"{path}: a checkpoint of other settings, data or version than this run's; remove {self.folder} to train anew")
        self.values.copy_(state["values"])
        for name in _PROGRESS:
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.sums.__dict__.update(state["sums"])
        if rank() != 0:
            self.sums.reset()  # what has been summed is the first process's to hold
        log.info("%s: going on at step %d", self.folder, self.step)


class _Sums:
    """Training loss and accuracy since the last evaluation, kept on the device so that no step waits for it."""

    def __init__(self, num_members: int, device: torch.device) -> None:
        self.losses = torch.zeros(num_members, device=device)
        self.correct = torch.zeros(num_members, device=device)
        self.first_bad_step = torch.full((num_members,), _NEVER, device=device)
        self.steps, self.frames = 0, 0

    def add(self, losses: Tensor, correct: Tensor, num_frames: int, step: int) -> None:
        """Add one step: of this process (K,) shares of the losses and (K,) correct frames; of all processes the number of frames."""
        self.losses += losses
        self.correct += correct
        self.first_bad_step.masked_fill_((self.first_bad_step == _NEVER) & ~losses.isfinite(), step)
        self.steps, self.frames = self.steps + 1, self.frames + num_frames

    def over_processes(self) -> _Sums:
        """The sums of all processes together."""
        total = copy.deepcopy(self)
        add_over_processes([total.losses, total.correct])
        total.first_bad_step = smallest_over_processes(self.first_bad_step)
        return total

    def means(self) -> tuple[list[float], list[float]]:
        """Loss per frame in nats and accuracy of each member."""
        return (self.losses / max(1, self.steps)).tolist(), (self.correct / max(1, self.frames)).tolist()

    def reset(self) -> None:
        """Start anew after an evaluation; what diverged has diverged."""
        self.losses.zero_()
        self.correct.zero_()
        self.steps, self.frames = 0, 0


@torch.no_grad()
def heldout_accuracy(networks: Ensemble, data: FrameData, max_frames: int, chunk_frames: int = 1024) -> list[float]:
    """Frame accuracy of every member on a sample of held-out frames that is the same at every call."""
    sample = torch.randperm(data.num_frames, generator=torch.Generator().manual_seed(0))[:max_frames].sort().values
    correct = torch.zeros(len(networks), device=data.targets.device)
    for chunk in torch.split(own_share(sample).to(data.targets.device), chunk_frames):
        correct += (networks(data.windows.gather(chunk)).argmax(2) == data.targets[chunk]).sum(1)
    add_over_processes([correct])
    return [count / len(sample) for count in correct.tolist()]


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise AsrKdError(f"{path}: not readable as a checkpoint ({' '.join(str(error).split())[:100]}); remove it to train anew") from error
    return state


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
