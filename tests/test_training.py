"""Training of stacked networks: against a plain loop, against itself cut off, and with data that cannot be trained on."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd import training
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.frame_data import FrameData, WindowSource, epoch_frames, input_statistics, load_frame_data
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.losses import distillation_loss
from asr_kd.model import AcousticModel, ModelShape
from asr_kd.precision import choose_precision
from asr_kd.schedule import Schedule, ScheduleSettings
from asr_kd.training import TrainingSettings, train

NUM_STATES, LEFT, RIGHT, FEATURES = 12, 2, 1, 6
SHAPE = ModelShape(input_dim=(LEFT + 1 + RIGHT) * FEATURES, hidden_layers=2, hidden_units=24, num_states=NUM_STATES, dropout=0.1)
SETTINGS = TrainingSettings(ScheduleSettings(learning_rate=5e-3, max_epochs=3), batch_frames=64, heldout_frames=500, precision="fp32")


def make_data(folder: Path, seed: int, utt_ids: tuple[str, ...] = ("a", "b", "c", "d", "e", "f")) -> FrameData:
    """Utterances of 100 frames; the features are a noisy code of the state."""
    rng = np.random.default_rng(seed)
    codes = np.random.default_rng(0).normal(size=(NUM_STATES, FEATURES))
    with FrameWriter(folder / "features", (FEATURES,), np.float16) as features, FrameWriter(folder / "targets", (), np.int32) as targets:
        for utt_id in utt_ids:
            states = np.repeat(rng.integers(NUM_STATES, size=25), 4)
            features.append(utt_id, codes[states] + 0.5 * rng.normal(size=(100, FEATURES)))
            targets.append(utt_id, states)
    return load(folder, utt_ids)


def load(folder: Path, utt_ids: tuple[str, ...]) -> FrameData:
    return load_frame_data(FrameStore(folder / "features"), FrameStore(folder / "targets"), utt_ids, LEFT, RIGHT, torch.device("cpu"))


@pytest.fixture
def data(tmp_path: Path) -> FrameData:
    return make_data(tmp_path / "train", 1)


@pytest.fixture
def heldout(tmp_path: Path) -> FrameData:
    return make_data(tmp_path / "heldout", 2, ("x", "y", "z"))


def parameters_of(networks: Ensemble) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in networks.parameters()]


class Smoothed:
    """Soft targets: the hard ones with a tenth of the mass spread."""

    temperature = 2.0

    def __init__(self, data: FrameData) -> None:
        self.data = data

    def batch(self, frame_indices: torch.Tensor) -> torch.Tensor:
        return 0.9 * torch.nn.functional.one_hot(self.data.targets[frame_indices].long(), NUM_STATES) + 0.1 / NUM_STATES


def numbered_batches(data: FrameData, steps: int) -> Iterator[tuple[float, torch.Tensor]]:
    """Epochs done before each batch, and the batch."""
    epochs = (epoch_frames(data, 7, epoch).tensor_split(round(data.num_frames / SETTINGS.batch_frames)) for epoch in itertools.count())
    numbered = ((epoch + i / len(batches), batch) for epoch, batches in enumerate(epochs) for i, batch in enumerate(batches))
    return itertools.islice(numbered, steps)


def plain_training(seed: int, data: FrameData, steps: int, soft: Smoothed | None = None) -> AcousticModel:
    """One network, torch's own layers and Adam, one batch after the other."""
    model = AcousticModel(replace(SHAPE, dropout=0.0), seed)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = Schedule(SETTINGS.schedule, 1)
    for epochs, batch in numbered_batches(data, steps):
        logits, targets = model(data.windows.gather(batch)), data.targets[batch].long()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        if soft is not None:
            loss = distillation_loss(logits, soft.batch(batch), targets, temperature=soft.temperature, hard_weight=SETTINGS.hard_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(0, epochs)
        optimizer.step()
    return model


@pytest.mark.parametrize("soft", [False, True])
def test_stacked_training_equals_separate_trainings(data: FrameData, heldout: FrameData, tmp_path: Path, soft: bool) -> None:
    seeds, soft_targets = list(range(1, 11)), Smoothed(data) if soft else None
    networks = Ensemble(replace(SHAPE, dropout=0.0), seeds)
    trainer = training._Trainer(networks, data, heldout, tmp_path, replace(SETTINGS, max_grad_norm=0.5), 7, soft_targets)
    for epochs, batch in numbered_batches(data, 50):
        trainer.epochs = epochs
        trainer._step(batch)
        trainer.step += 1
    assert all(view.grad is None for views in trainer.members for view in views)  # or the gradients would stay in memory
    for k, seed in enumerate(seeds):
        single = plain_training(seed, data, 50, soft_targets)
        for i, layer in enumerate(single.affine):
            torch.testing.assert_close(networks.weights[i][k].t(), layer.weight, rtol=0, atol=1e-4)
            torch.testing.assert_close(networks.biases[i][k, 0], layer.bias, rtol=0, atol=1e-4)


def test_member_trains_the_same_alone_with_dropout_and_own_decisions(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    """From its seed alone: the others change neither its dropout nor its learning rates nor which weights are its best."""
    wanting = replace(SETTINGS, schedule=replace(SETTINGS.schedule, halve_below=0.03, decay_share=0.0))  # rates differ between members
    networks = Ensemble(SHAPE, [1, 2, 3])
    together = train(networks, data, heldout, tmp_path / "together", wanting, seed=7)
    assert any(len(set(entry["learning_rate"])) > 1 for entry in together.curves)
    for k, seed in enumerate([1, 2, 3]):
        single = Ensemble(SHAPE, [seed])
        alone = train(single, data, heldout, tmp_path / f"alone{k}", wanting, seed=7)
        assert alone.heldout_accuracy[0] == pytest.approx(together.heldout_accuracy[k], abs=2e-3)
        for stacked, parameter in zip(networks.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(stacked[k], parameter[0], rtol=0, atol=1e-4)


def test_learns_and_keeps_the_best_weights(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    networks = Ensemble(SHAPE, [1, 2])
    result = train(networks, data, heldout, tmp_path, SETTINGS, seed=7)
    curve = np.array([entry["heldout_accuracy"] for entry in result.curves])
    assert (curve[-1] > curve[0] + 0.1).all()
    assert (curve[-1] > 0.3).all()
    assert result.heldout_accuracy == curve.max(0).tolist()
    assert training.heldout_accuracy(networks, heldout, 500) == result.heldout_accuracy
    assert [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()] == result.curves
    assert [entry["epoch"] for entry in result.curves] == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3], abs=0.06)


def test_training_ends_at_a_part_of_an_epoch(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    settings = replace(SETTINGS, schedule=replace(SETTINGS.schedule, max_epochs=1.3))
    curves = train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, settings, seed=7).curves
    assert 1.3 <= curves[-1]["epoch"] < 1.3 + 1.5 * 64 / 600


def test_bfloat16_trains_as_float32_does(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        networks = Ensemble(SHAPE, [1])
        results[precision] = train(networks, data, heldout, tmp_path / precision, replace(SETTINGS, precision=precision), seed=7)
        assert all(parameter.dtype == torch.float32 for parameter in networks.parameters())
        assert results[precision].precision == precision
    losses = [results[precision].curves[-1]["train_loss"][0] for precision in results]
    assert losses[0] != losses[1]  # the products were rounded
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_precision_is_measured_or_refused() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu, (1, 64, 64, 64)) in ("fp32", "bf16")
    assert choose_precision("bf16", cpu, (1, 64, 64, 64)) == "bf16"
    with pytest.raises(AsrKdError, match="precision: 'fp16', expected one of auto, fp32, bf16"):
        choose_precision("fp16", cpu, (1, 64, 64, 64))


@pytest.mark.parametrize("setting", [None, "older", "newer", "for all devices"])
def test_tf32_is_off_inside_and_as_the_caller_set_it_outside(setting: str | None) -> None:
    """In a process of its own: torch refuses to read one of its two settings once the other was used."""
    use = {None: "", "older": "torch.set_float32_matmul_precision('high')", "newer": "matmul.fp32_precision = 'tf32'",
           "for all devices": "torch.backends.fp32_precision = 'tf32'"}[setting]
    code = f"""import torch
from asr_kd.precision import precision_context
matmul = torch.backends.cuda.matmul
{use}
for precision in ("fp32", "bf16"):
    before = matmul.fp32_precision == "tf32"
    with precision_context(precision, torch.device("cpu")):
        assert matmul.fp32_precision != "tf32"
    assert (matmul.fp32_precision == "tf32") == before
print(before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(setting is not None)


def test_heldout_accuracy_takes_a_tie_for_one_state_only(heldout: FrameData) -> None:
    networks = Ensemble(SHAPE, [1])
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.zero_()
    assert training.heldout_accuracy(networks, heldout, 500) == pytest.approx([float((heldout.targets == 0).float().mean())])


def test_heldout_accuracy_counts_the_largest_logit(heldout: FrameData) -> None:
    networks = Ensemble(SHAPE, [1, 2])
    logits = networks(heldout.windows.gather(torch.arange(heldout.num_frames)))
    expected = (logits.argmax(-1) == heldout.targets).float().mean(1).tolist()
    assert training.heldout_accuracy(networks, heldout, 10_000, chunk_frames=70) == pytest.approx(expected)


KILLED_TRAINING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training import SETTINGS, SHAPE, Ensemble, load, replace, torch, train, training
torch.set_num_threads(1)
save, count = training._Trainer._step, 0
def step(self, *args):
    global count
    save(self, *args)
    count += 1
    if count == {steps}:
        os.kill(os.getpid(), signal.SIGKILL)
training._Trainer._step = step
training._CHECK_STEPS = 1 if {often} else 100
folder = Path({folder!r})
train(Ensemble(SHAPE, [1, 2]), load(folder / "train", tuple("abcdef")), load(folder / "heldout", tuple("xyz")), folder / "out",
      replace(SETTINGS, checkpoint_interval_s=0.0 if {often} else 60.0), seed=7)
"""


@pytest.mark.parametrize(("steps", "often"), [(13, True), (13, False)])
def test_killed_training_goes_on_with_the_same_result(data: FrameData, heldout: FrameData, tmp_path: Path, steps: int, often: bool) -> None:
    script = KILLED_TRAINING.format(tests=str(Path(__file__).parent), steps=steps, folder=str(tmp_path), often=often)
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    continued, whole = Ensemble(SHAPE, [1, 2]), Ensemble(SHAPE, [1, 2])
    result = train(continued, data, heldout, tmp_path / "out", SETTINGS, seed=7)
    expected = train(whole, data, heldout, tmp_path / "whole", SETTINGS, seed=7)
    assert result == expected
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(continued), parameters_of(whole), strict=True))
    assert not list(tmp_path.glob("out/.*.part-*")) or often  # a part file may stay behind, a half-written checkpoint may not


DISTRIBUTED_TRAINING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training import SETTINGS, SHAPE, Ensemble, load, replace, torch, train
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://{folder}/meeting", rank=int(sys.argv[1]), world_size=2)
folder = Path({folder!r})
networks = Ensemble(replace(SHAPE, dropout=0.0), [1, 2])
result = train(networks, load(folder / "train", tuple("abcdef")), load(folder / "heldout", tuple("xyz")), folder / "out", SETTINGS, seed=7)
networks.save(folder / f"networks{{sys.argv[1]}}")
"""


def test_two_processes_train_as_one_does(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    script = DISTRIBUTED_TRAINING.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", script, str(rank)], env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    alone = Ensemble(replace(SHAPE, dropout=0.0), [1, 2])
    expected = train(alone, data, heldout, tmp_path / "alone", SETTINGS, seed=7)
    for number in range(2):
        together = Ensemble.load(tmp_path / f"networks{number}")
        for one, two in zip(alone.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-3)
    curves = [json.loads(line) for line in (tmp_path / "out" / "curves.jsonl").read_text().splitlines()]
    for entry, wanted in zip(curves, expected.curves, strict=True):
        assert entry["train_loss"] == pytest.approx(wanted["train_loss"], abs=1e-3)
        assert entry["heldout_accuracy"] == pytest.approx(wanted["heldout_accuracy"], abs=0.02)


def test_finished_training_is_not_repeated(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    first, again = Ensemble(SHAPE, [1]), Ensemble(SHAPE, [1])
    expected = train(first, data, heldout, tmp_path, SETTINGS, seed=7)
    start = time.monotonic()
    assert train(again, data, heldout, tmp_path, SETTINGS, seed=7) == expected
    assert time.monotonic() - start < 1.0
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(first), parameters_of(again), strict=True))


def test_the_largest_seed_that_settings_allow(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    shape = replace(SHAPE, dropout=0.99)
    result = train(Ensemble(shape, [4 * 10**12 + 999]), data, heldout, tmp_path, SETTINGS, seed=4 * 10**9)
    assert result.curves[-1]["epoch"] == SETTINGS.schedule.max_epochs
    assert not result.diverged


def test_checkpoint_of_other_settings_is_refused(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, SETTINGS, seed=7)
    with pytest.raises(AsrKdError, match="other settings"):
        train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, SETTINGS, seed=8)
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(AsrKdError, match="not readable as a checkpoint"):
        train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, SETTINGS, seed=7)


def test_diverging_member_leaves_the_others_untouched(data: FrameData, heldout: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 1 of three starts with weights whose logits overflow; once that is seen its weights stay as they are."""
    update, moved = training._Trainer._update, []

    def watched(self: training._Trainer) -> None:
        before = self.values.clone()
        update(self)
        if any(self.schedule.stopped):
            moved.append((before != self.values).any(1).tolist())

    monkeypatch.setattr(training._Trainer, "_update", watched)
    networks, without = Ensemble(SHAPE, [1, 2, 3]), Ensemble(SHAPE, [1, 3])
    with torch.no_grad():
        networks.weights[0][1] = 1e38
    result = train(networks, data, heldout, tmp_path / "three", SETTINGS, seed=7)
    expected = train(without, data, heldout, tmp_path / "two", SETTINGS, seed=7)
    assert list(result.diverged) == [1]
    assert moved
    assert all(moves == [True, False, True] for moves in moved)
    assert [result.heldout_accuracy[k] for k in (0, 2)] == pytest.approx(expected.heldout_accuracy, abs=2e-3)
    for stacked, parameter in zip(networks.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(stacked[[0, 2]], parameter, rtol=0, atol=1e-4)


def test_a_lone_member_that_diverges_late_keeps_its_best_weights(data: FrameData, heldout: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = training._Trainer._losses

    def losses(self: training._Trainer, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, correct = whole(self, *arguments)
        return found * (torch.nan if self.curves else 1.0), correct

    monkeypatch.setattr(training._Trainer, "_losses", losses)
    networks = Ensemble(SHAPE, [1])
    result = train(networks, data, heldout, tmp_path, SETTINGS, seed=7)
    assert list(result.diverged) == [0]
    assert result.heldout_accuracy == result.curves[0]["heldout_accuracy"]
    assert training.heldout_accuracy(networks, heldout, SETTINGS.heldout_frames) == pytest.approx(result.heldout_accuracy, abs=0.01)


def test_weights_that_are_not_numbers_are_never_the_best(data: FrameData, heldout: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the step before an evaluation is not finite, its loss is: the argmax of NaN is state 0, which some frames have."""
    clip = training._Trainer._clip_gradients

    def spoil(self: training._Trainer) -> None:
        clip(self)
        if not self.curves and self.batch + 1 == math.ceil(self.num_batches / SETTINGS.evaluations_per_epoch):
            self.gradient[1] = torch.nan

    monkeypatch.setattr(training._Trainer, "_clip_gradients", spoil)
    networks = Ensemble(SHAPE, [1, 2])
    result = train(networks, data, heldout, tmp_path, SETTINGS, seed=7)
    assert result.curves[0]["heldout_accuracy"][1] > 0
    assert result.heldout_accuracy[1] == -1.0
    assert result.heldout_accuracy[0] > 0.3
    assert all(parameter.isfinite().all() for parameter in networks.parameters())


class BrokenFrame:
    """Windows of which one is NaN."""

    def __init__(self, windows: WindowSource, frame: int) -> None:
        self.windows, self.frame = windows, frame
        self.utt_ids, self.offsets, self.num_frames = windows.utt_ids, windows.offsets, windows.num_frames

    def gather(self, frame_indices: torch.Tensor) -> torch.Tensor:
        return torch.where(frame_indices[:, None] == self.frame, torch.nan, self.windows.gather(frame_indices))


def test_nan_features_are_named(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    data = FrameData(BrokenFrame(data.windows, 350), data.targets)
    with pytest.raises(AsrKdError, match=r"loss NaN or infinite at step \d+ for all 2 members.*features of d are not finite"):
        train(Ensemble(SHAPE, [1, 2]), data, heldout, tmp_path, SETTINGS, seed=7)


def test_nan_in_soft_targets_is_named(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    class Broken(Smoothed):
        def batch(self, frame_indices: torch.Tensor) -> torch.Tensor:
            return torch.where(frame_indices[:, None] == 350, torch.nan, super().batch(frame_indices))

    with pytest.raises(AsrKdError, match=r"soft targets of frame \d+ of \d+ sum to nan.* \(d\); remove the folder of the soft targets"):
        train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, SETTINGS, seed=7, soft_targets=Broken(data))


def test_too_high_a_learning_rate_is_an_error_not_a_model(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    settings = replace(SETTINGS, schedule=replace(SETTINGS.schedule, learning_rate=1e30))
    with pytest.raises(AsrKdError, match="lower learning_rate"):
        train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, settings, seed=7)


def test_batches_too_small_for_all_processes_are_refused(data: FrameData, heldout: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "world_size", lambda: 3)
    with pytest.raises(AsrKdError, match="batch_frames: got 2, expected some frames of every batch for each of 3 processes; raise it"):
        train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, replace(SETTINGS, batch_frames=2), seed=7)


def test_length_mismatch_names_the_utterance(tmp_path: Path) -> None:
    make_data(tmp_path, 1, ("a", "b"))
    with FrameWriter(tmp_path / "targets", (), np.int32) as targets:
        targets.append("a", np.zeros(100))
        targets.append("b", np.zeros(98))
    with pytest.raises(AsrKdError, match="b: 98 targets for 100 frames"):
        load(tmp_path, ("a", "b"))
    with pytest.raises(AsrKdError, match="c: "):
        load(tmp_path, ("a", "c"))
    with pytest.raises(AsrKdError, match="no utterances"):
        load(tmp_path, ())


def test_state_id_out_of_range_names_the_utterance(data: FrameData, heldout: FrameData, tmp_path: Path) -> None:
    data.targets[250] = NUM_STATES
    with pytest.raises(AsrKdError, match="c: state id 12, expected 0 to 11"):
        train(Ensemble(SHAPE, [1]), data, heldout, tmp_path, SETTINGS, seed=7)


def test_epoch_takes_one_speed_variant_of_each_utterance(tmp_path: Path) -> None:
    utt_ids = ("a", "b", "sp0.9-a", "sp0.9-b", "sp1.1-a", "sp1.1-b")
    data = make_data(tmp_path, 1, utt_ids)
    seen = set()
    for epoch in range(20):
        frames = epoch_frames(data, 1, epoch)
        assert len(set(frames.tolist())) == len(frames) == 200
        chosen = data.utterances_of(frames)
        assert sorted(utt_id.rsplit("-")[-1] for utt_id in chosen) == ["a", "b"]
        seen.update(chosen)
    assert seen == set(utt_ids)


def test_input_statistics_normalise_each_feature(data: FrameData) -> None:
    mean, scale = input_statistics(data, FEATURES, seed=1)
    windows = data.windows.gather(torch.arange(data.num_frames)).view(-1, FEATURES).double()
    torch.testing.assert_close(mean.view(-1, FEATURES)[0].double(), windows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.view(-1, FEATURES)[3].double(), 1 / windows.std(0), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=24), st.floats(0, 0.1))
def test_halvings_follow_the_rule(accuracies: list[float], halve_below: float) -> None:
    schedule = Schedule(ScheduleSettings(learning_rate=1.0, decay_share=0.0, warmup_epochs=0.0, halve_below=halve_below, max_halvings=3), 2)
    best, halvings, stopped, waited = -1.0, 0, False, 0
    for accuracy in accuracies:
        cut, schedule = schedule, Schedule(schedule.settings, 2)
        schedule.load_state_dict(cut.state_dict())
        improved = schedule.observe([accuracy, 0.5])
        if not stopped:
            assert improved[0] == (accuracy > best)
            waited = waited + 1 if accuracy < best + halve_below else 0
            if waited == 2:
                halvings, waited = halvings + 1, 0
            best, stopped = max(best, accuracy), halvings > 3
        assert schedule.learning_rate(0, 1.0) == 0.5**halvings
        assert schedule.stopped[0] == stopped
    assert schedule.best[0] == best


def test_learning_rate_warms_up_and_decays() -> None:
    schedule = Schedule(ScheduleSettings(learning_rate=1.0, max_epochs=4, warmup_epochs=0.5, decay_share=0.5), 1)
    assert [schedule.learning_rate(0, epochs) for epochs in (0.25, 0.5, 2.0, 3.0, 4.0)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0], abs=1e-3)
