"""Soft targets: stores against the direct computation, sparse records against the distribution that they stand for."""

from __future__ import annotations

import errno
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pretend_gpu import pretend_gpu
from torch import Tensor

from asr_kd import resumable_frames, soft_targets
from asr_kd.errors import AsrKdError
from asr_kd.frames import FrameWriter
from asr_kd.losses import SparseTargets, distillation_loss
from asr_kd.resumable_frames import ResumableFrameWriter
from asr_kd.soft_targets import OnTheFlyTargets, SoftTargetRecord, SoftTargetStore, extract
from asr_kd.sparse_targets import decode, encode

CPU = torch.device("cpu")
NUM_STATES = 40
RECORD = SoftTargetRecord(temperature=2.0, mean="arithmetic", num_states=NUM_STATES, teachers="t0", features="f0", states="s0")


class Windows:
    """Two features per frame; the input of frame n depends on n alone."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def gather(self, frame_indices: Tensor) -> Tensor:
        return self.inputs[frame_indices.to(self.inputs.device)]


@dataclass(frozen=True)
class Frames:
    windows: Windows
    utt_ids: tuple[str, ...]
    offsets: NDArray[np.int64]


class Teachers:
    """Three linear networks."""

    def __init__(self, num_states: int = NUM_STATES, seed: int = 0) -> None:
        self.weight = 3 * torch.randn(3, 5, num_states, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return 3

    def __call__(self, inputs: Tensor, /) -> Tensor:
        return inputs @ self.weight


def numbered(lengths: dict[str, int], order: list[str] | None = None) -> Frames:
    """Frames whose inputs depend on utterance and position alone, in any order of the utterances."""
    inputs = {u: torch.randn(n, 5, generator=torch.Generator().manual_seed(i)) for i, (u, n) in enumerate(lengths.items())}
    order = order or list(lengths)
    offsets = np.concatenate([[0], np.cumsum([lengths[u] for u in order])]).astype(np.int64)
    return Frames(Windows(torch.cat([inputs[u] for u in order])), tuple(order), offsets)


LENGTHS = {"a": 30, "b": 7, "c": 51, "d": 12}
FRAMES = numbered(LENGTHS)


def direct(frames: Frames, temperature: float = 2.0) -> Tensor:
    """Mean over teachers of softmax(logits / T), written out."""
    logits = Teachers()(frames.windows.inputs)
    exponentials = (logits / temperature).exp()
    return (exponentials / exponentials.sum(2, keepdim=True)).sum(0) / 3


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_frames, "CHUNK_FRAMES", 20)
    monkeypatch.setattr(resumable_frames, "SYNC_S", 0.0)
    monkeypatch.setattr(soft_targets, "LOGITS_AT_ONCE", {"cpu": 3 * NUM_STATES * 8})
    monkeypatch.setattr(soft_targets, "CACHED_ELEMENTS", NUM_STATES * 3)


def expectation(posteriors: Tensor, bytes_per_frame: int, grid: int) -> Tensor:
    """Mean of what records decode to over a fine grid of the numbers that decide the draw and the rounding."""
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    total = torch.zeros_like(posteriors, dtype=torch.float64)
    for row, distribution in enumerate(posteriors):
        shuffled = centres[torch.randperm(grid, generator=torch.Generator().manual_seed(row))]
        sparse = decode(encode(distribution.expand(grid, -1), torch.stack([centres, shuffled], 1), bytes_per_frame))
        total[row] = sparse.dense(len(distribution)).double().mean(0)
    return total


def distributions(num_rows: int, num_states: int, temperature: float, seed: int = 0) -> Tensor:
    return (4 * torch.randn(num_rows, num_states, generator=torch.Generator().manual_seed(seed)) / temperature).softmax(1)


# --- sparse records


@pytest.mark.parametrize(("num_states", "bytes_per_frame"), [(5, 128), (50, 32), (300, 128), (300, 64), (300, 8)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_sparse_records_are_unbiased(num_states: int, bytes_per_frame: int, temperature: float) -> None:
    posteriors = distributions(3, num_states, temperature)
    torch.testing.assert_close(expectation(posteriors, bytes_per_frame, 5_000), posteriors.double(), atol=5e-4, rtol=0)


def test_truncated_top_k_would_fail_the_test_of_bias() -> None:
    posteriors = distributions(1, 300, 5.0)
    top, ids = posteriors.topk(31)
    truncated = torch.zeros_like(posteriors).scatter(1, ids, top / top.sum())
    assert float((truncated - posteriors).abs().max()) > 20 * 5e-4


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.integers(4, 64), st.floats(0.2, 20.0), st.integers(0, 10_000))
def test_sparse_records_hold_few_distinct_states_and_sum_to_one(num_states: int, words: int, temperature: float, seed: int) -> None:
    posteriors = distributions(4, num_states, temperature, seed)
    records = encode(posteriors, torch.rand(4, 2, generator=torch.Generator().manual_seed(seed)), 2 * words)
    assert records.shape == (4, words)
    assert records.dtype == torch.int16
    sparse = decode(records)
    torch.testing.assert_close(sparse.probabilities.sum(1), torch.ones(4), atol=1e-6, rtol=0)
    assert int(sparse.indices.max()) < num_states
    assert float(sparse.probabilities.min()) >= 0
    for ids, probabilities in zip(sparse.indices, sparse.probabilities, strict=True):
        used = ids[probabilities > 0]
        assert len(used) - len(used.unique()) <= 1  # two draws from what 2 J exact words leave may coincide; repeated ids add up


def test_large_probabilities_are_kept_as_they_are() -> None:
    posteriors = torch.full((1, 1000), 0.1 / 997)
    posteriors[0, [500, 3, 999]] = torch.tensor([0.6, 0.2, 0.1])
    sparse = decode(encode(posteriors, torch.tensor([[0.3, 0.7]]), 128))
    dense = sparse.dense(1000)[0]
    torch.testing.assert_close(dense[[500, 3, 999]], torch.tensor([0.6, 0.2, 0.1]), atol=1 / 65535, rtol=0)
    drawn = sparse.probabilities[0, 3:60]  # 64 words - 1 - 2 * 3 = 57 drawn states share the tail's 0.1
    torch.testing.assert_close(drawn, torch.full((57,), 0.1 / 57), atol=1e-6, rtol=0)
    assert not sparse.probabilities[0, 60:].any()


def test_neighbouring_states_are_represented_in_proportion() -> None:
    """Systematic sampling: the mass of a run of states is off by at most one drawn state's weight at each end."""
    posteriors = distributions(200, 1000, 5.0)
    dense = decode(encode(posteriors, torch.rand(200, 2, generator=torch.Generator().manual_seed(1)), 128)).dense(1000)
    runs = (dense - posteriors).view(200, 10, 100).sum(2)
    assert float(runs.abs().max()) < 2 / 60


def test_state_ids_use_all_sixteen_bits() -> None:
    posteriors = torch.zeros(1, 65536)
    posteriors[0, 65535], posteriors[0, 40000] = 0.75, 0.25
    sparse = decode(encode(posteriors, torch.tensor([[0.5, 0.5]]), 16))
    assert sparse.dense(65536)[0, [65535, 40000]].tolist() == pytest.approx([0.75, 0.25], abs=1e-4)


def test_expected_gradient_is_the_dense_one() -> None:
    posteriors = distributions(1, 200, 2.0)
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(3))

    def gradient(targets: Tensor | SparseTargets, rows: int) -> Tensor:
        leaf = logits.repeat(rows, 1).requires_grad_()
        distillation_loss(leaf, targets, temperature=2.0).backward()
        assert leaf.grad is not None
        return leaf.grad.sum(0)

    uniforms = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(4))
    sampled = gradient(decode(encode(posteriors.repeat(20_000, 1), uniforms, 64)), 20_000)
    torch.testing.assert_close(sampled, gradient(posteriors, 1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("bytes_per_frame", "num_states", "message"), [(7, 10, "even"), (6, 10, "at least 8"), (128, 70_000, "dense form")])
def test_impossible_records_are_refused(tmp_path: Path, bytes_per_frame: int, num_states: int, message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        extract(Teachers(num_states), FRAMES, tmp_path, replace(RECORD, num_states=num_states), seed=0, device=CPU, form="sparse",
                bytes_per_frame=bytes_per_frame)


# --- stores


def test_dense_store_and_on_the_fly_equal_the_direct_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="dense")
    store = SoftTargetStore(tmp_path, FRAMES, RECORD, CPU)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    stored = store.batch(order)
    assert isinstance(stored, Tensor)
    torch.testing.assert_close(stored, direct(FRAMES)[order], atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(stored.sum(1), torch.ones(100), atol=1e-6, rtol=0)
    assert store.bytes_per_frame == 2 * NUM_STATES
    torch.testing.assert_close(OnTheFlyTargets(Teachers(), FRAMES, 2.0).batch(order), direct(FRAMES)[order])


def test_compact_store_is_close_to_the_direct_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="compact", bytes_per_frame=48)
    store = SoftTargetStore(tmp_path, FRAMES, RECORD, CPU)
    found = store.batch(torch.arange(100))
    assert isinstance(found, Tensor)
    assert store.bytes_per_frame == 48
    difference = (found - direct(FRAMES)).abs().sum(1)
    assert float(difference.mean()) < 0.1
    torch.testing.assert_close(found.sum(1), torch.ones(100), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["dense", "compact", "sparse"])
def test_extraction_on_a_gpu_writes_the_same_in_passes_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: soft_targets.Form) -> None:
    monkeypatch.setattr(soft_targets, "FRAMES_AT_ONCE", {"cpu": 9, "cuda": 30})
    monkeypatch.setattr(soft_targets, "LOGITS_AT_ONCE", {"cpu": 2**20, "cuda": 3 * NUM_STATES * 20})
    here, passes = numbered(LENGTHS), []

    class Counting(Teachers):
        def __call__(self, inputs: Tensor, /) -> Tensor:
            passes.append(len(inputs))
            return super().__call__(inputs)

    extract(Counting(), here, tmp_path / "here", RECORD, seed=0, device=CPU, form=form, bytes_per_frame=32)
    assert max(passes) == 9
    passes.clear()
    with pretend_gpu() as gpu:
        teachers, there = Counting(), replace(here, windows=Windows(here.windows.inputs.to(gpu)))
        teachers.weight = teachers.weight.to(gpu)
        extract(teachers, there, tmp_path / "there", RECORD, seed=0, device=gpu, form=form, bytes_per_frame=32)
        assert max(passes) == 20  # fewer than 30 for their logits
        frames = torch.tensor([3, 99, 50], device=gpu)
        found = SoftTargetStore(tmp_path / "there", there, RECORD, gpu).batch(frames)
        posteriors = (found.dense(NUM_STATES) if isinstance(found, SparseTargets) else found).cpu()
    expected = SoftTargetStore(tmp_path / "here", here, RECORD, CPU).batch(torch.tensor([3, 99, 50]))
    assert torch.allclose(posteriors, expected.dense(NUM_STATES) if isinstance(expected, SparseTargets) else expected, atol=1e-4)


def test_sparse_store_holds_records_of_the_given_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="sparse", bytes_per_frame=64)
    store = SoftTargetStore(tmp_path, FRAMES, RECORD, CPU)
    targets = store.batch(torch.arange(100))
    assert isinstance(targets, SparseTargets)
    assert store.bytes_per_frame == 64
    assert (tmp_path / "frames.npy").stat().st_size == 100 * 64 + 128
    top = direct(FRAMES).max(1)
    torch.testing.assert_close(targets.dense(NUM_STATES).gather(1, top.indices[:, None])[:, 0], top.values, atol=5e-2, rtol=0)


@pytest.mark.parametrize("form", ["dense", "compact", "sparse"])
def test_utterances_are_joined_by_id_in_any_order_and_choice(tmp_path: Path, form: soft_targets.Form) -> None:
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form=form)
    whole = SoftTargetStore(tmp_path, FRAMES, RECORD, CPU).batch(torch.arange(100))
    chosen = numbered(LENGTHS, ["d", "a", "c"])
    found = SoftTargetStore(tmp_path, chosen, RECORD, CPU).batch(torch.arange(93))
    rows = torch.cat([torch.arange(88, 100), torch.arange(0, 30), torch.arange(37, 88)])
    if isinstance(whole, SparseTargets):
        whole, found = whole.dense(NUM_STATES), found.dense(NUM_STATES)
    torch.testing.assert_close(found, whole[rows])


def test_sampling_depends_on_seed_and_utterance_alone(tmp_path: Path) -> None:
    def targets(name: str, order: list[str], seed: int) -> Tensor:
        extract(Teachers(), numbered(LENGTHS, order), tmp_path / name, RECORD, seed=seed, device=CPU, form="sparse", bytes_per_frame=16)
        batch = SoftTargetStore(tmp_path / name, FRAMES, RECORD, CPU).batch(torch.arange(100))
        assert isinstance(batch, SparseTargets)
        return batch.dense(NUM_STATES)

    first = targets("one", ["a", "b", "c", "d"], 0)
    torch.testing.assert_close(targets("two", ["c", "d", "b", "a"], 0), first)
    assert not torch.allclose(targets("three", ["a", "b", "c", "d"], 1), first)


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": 5.0}, "temperature 2.0, expected 5.0.*re-tempered.*soft_targets stage"), ({"mean": "geometric"}, "mean arithmetic, expected geometric"),
    ({"teachers": "t1"}, "teachers t0, expected t1.*soft_targets stage"), ({"features": "f1"}, "features f0, expected f1"),
    ({"states": "s1"}, "states s0, expected s1"), ({"num_states": 41}, "num_states 40, expected 41")])
def test_targets_made_with_anything_else_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="sparse")
    with pytest.raises(AsrKdError, match=message):
        SoftTargetStore(tmp_path, FRAMES, replace(RECORD, **change), CPU)


def test_missing_utterance_and_other_length_are_refused(tmp_path: Path) -> None:
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="sparse")
    with pytest.raises(AsrKdError, match=r"^e: not in"):
        SoftTargetStore(tmp_path, numbered({**LENGTHS, "e": 3}), RECORD, CPU)
    with pytest.raises(AsrKdError, match=r"^b: 7 soft targets .* for 8 frames"):
        SoftTargetStore(tmp_path, numbered({**LENGTHS, "b": 8}), RECORD, CPU)


def test_teachers_of_other_states_and_nan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AsrKdError, match="teachers of 39 states, expected 40"):
        extract(Teachers(39), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="sparse")
    broken = numbered(LENGTHS)
    broken.windows.inputs[35] = float("nan")
    with pytest.raises(AsrKdError, match=r"^b: the teachers give NaN at frame 5"):
        extract(Teachers(), broken, tmp_path, RECORD, seed=0, device=CPU, form="sparse")


# --- cut off, continued


class DyingTeachers(Teachers):
    """Dies at the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __call__(self, inputs: Tensor, /) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().__call__(inputs)


@pytest.mark.parametrize(("form", "sample_calls"), [("sparse", 0), ("compact", 2)])
def test_cut_off_extraction_is_not_readable_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: soft_targets.Form,
                                                                         sample_calls: int) -> None:
    small_chunks(monkeypatch)
    monkeypatch.setattr(soft_targets, "SAMPLE_FRAMES", 16)
    extract(Teachers(), FRAMES, tmp_path / "whole", RECORD, seed=0, device=CPU, form=form)
    with pytest.raises(KeyboardInterrupt):
        # chunks of 30, 58 and 12 frames, 8 per call
        extract(DyingTeachers(calls=sample_calls + 6), FRAMES, tmp_path / "cut", RECORD, seed=0, device=CPU, form=form)
    with pytest.raises(AsrKdError, match=r"index\.json"):
        SoftTargetStore(tmp_path / "cut", FRAMES, RECORD, CPU)
    with open(next((tmp_path / "cut").glob(".*part*")), "ab") as file:
        file.write(b"half a chunk")
    teachers = DyingTeachers(calls=10)
    extract(teachers, FRAMES, tmp_path / "cut", RECORD, seed=0, device=CPU, form=form)
    assert teachers.calls == 0  # 8 calls for the 58 frames cut off, 2 for the last 12; none for the first 30
    assert (tmp_path / "cut" / "frames.npy").read_bytes() == (tmp_path / "whole" / "frames.npy").read_bytes()
    (tmp_path / "cut" / "index.json").unlink()  # a kill just before it was written
    extract(DyingTeachers(calls=0), FRAMES, tmp_path / "cut", RECORD, seed=0, device=CPU, form=form)
    SoftTargetStore(tmp_path / "cut", FRAMES, RECORD, CPU)
    assert (tmp_path / "cut" / "frames.npy").read_bytes() == (tmp_path / "whole" / "frames.npy").read_bytes()


def test_cut_off_extraction_of_other_settings_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(DyingTeachers(calls=6), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="sparse")
    other = replace(RECORD, temperature=5.0)
    extract(Teachers(), FRAMES, tmp_path, other, seed=0, device=CPU, form="dense")
    stored = SoftTargetStore(tmp_path, FRAMES, other, CPU).batch(torch.arange(100))
    torch.testing.assert_close(stored, direct(FRAMES, 5.0), atol=5e-4, rtol=1e-3)


def test_full_disk_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(AsrKdError, match="free space"):
        extract(DyingTeachers(calls=0), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form="sparse")


def test_disk_that_fills_up_while_writing_is_said_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    extract(Teachers(), FRAMES, tmp_path / "whole", RECORD, seed=0, device=CPU, form="sparse")

    def no_space(self: ResumableFrameWriter, frames: NDArray[np.generic]) -> None:
        if self.done == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, frames)

    write = ResumableFrameWriter._write
    with monkeypatch.context() as full:
        full.setattr(ResumableFrameWriter, "_write", no_space)
        with pytest.raises(AsrKdError, match=r"No space left on device.*free space"):
            extract(Teachers(), FRAMES, tmp_path / "full", RECORD, seed=0, device=CPU, form="sparse")
    teachers = DyingTeachers(calls=10)  # for the two chunks that were not written
    extract(teachers, FRAMES, tmp_path / "full", RECORD, seed=0, device=CPU, form="sparse")
    assert (tmp_path / "full" / "frames.npy").read_bytes() == (tmp_path / "whole" / "frames.npy").read_bytes()


@pytest.mark.parametrize("form", ["dense", "compact", "sparse"])
def test_a_store_opened_alone_gives_the_targets_of_utterances(tmp_path: Path, form: soft_targets.Form) -> None:
    extract(Teachers(), FRAMES, tmp_path, RECORD, seed=0, device=CPU, form=form, bytes_per_frame=32)
    store, joined = SoftTargetStore.open(tmp_path, temperature=2.0), SoftTargetStore(tmp_path, FRAMES, RECORD, CPU)
    assert store.utt_ids == list(LENGTHS)
    assert "c" in store
    assert "e" not in store
    for found, expected in ((store["c"], joined.batch(torch.arange(37, 88))), (store.batch(torch.tensor([3, 90])), joined.batch(torch.tensor([3, 90])))):
        if isinstance(found, SparseTargets):
            assert isinstance(expected, SparseTargets)
            found, expected = found.dense(NUM_STATES), expected.dense(NUM_STATES)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(AsrKdError, match=r"soft targets with temperature 2.0, expected 3.0 \(averaged posteriors cannot be re-tempered\)"):
        SoftTargetStore.open(tmp_path, temperature=3.0)
    with pytest.raises(KeyError, match="e"):
        store["e"]


def test_the_recipe_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    with FrameWriter("OUT/features/train-mini", (40,), np.float16) as features, FrameWriter("OUT/targets/train-mini", (), np.int32) as states:
        for utt_id, length in {**LENGTHS, "unaligned": 9}.items():
            features.append(utt_id, generator.normal(size=(length, 40)).astype(np.float16))
            states.append(utt_id, generator.integers(NUM_STATES, size=length, dtype=np.int32))
    extract(Teachers(), FRAMES, "OUT/soft_targets", RECORD, seed=0, device=CPU, form="compact", bytes_per_frame=32)
    text = (Path(__file__).parents[1] / "docs" / "soft_targets.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(code, found)
    assert set(found["data"].data_ids) == set(LENGTHS)
    assert found["student"].optimizer_step == 4
