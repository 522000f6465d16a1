"""Frames that are streamed from their stores beside the same frames in memory."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_gpu import pretend_gpu
from test_training import FEATURES, LEFT, NUM_STATES, RIGHT, SETTINGS, SHAPE, make_data

from asr_kd import resumable_frames, training
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.frame_data import FrameData, StreamedFrames, epoch_frames, input_statistics, load_ahead, load_frame_data
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.soft_targets import Form, OnTheFlyTargets, SoftTargetRecord, SoftTargetStore, extract
from asr_kd.training import train

UTT_IDS = tuple(f"u{number:02d}" for number in range(20))
CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> FrameData:
    return make_data(tmp_path, 1, UTT_IDS)


def streamed(folder: Path, utt_ids: tuple[str, ...] = UTT_IDS, chunk_frames: int = 200, part_frames: int = 600,
             device: torch.device = CPU) -> StreamedFrames:
    return StreamedFrames(FrameStore(folder / "features"), FrameStore(folder / "targets"), utt_ids, LEFT, RIGHT, device,
                          chunk_frames=chunk_frames, part_frames=part_frames)


def test_a_lone_member_that_diverges_before_the_end_of_a_part_keeps_its_best_weights(data: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = training._Trainer._losses

    def losses(self: training._Trainer, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, correct = whole(self, *arguments)
        return found * (torch.nan if self.curves else 1.0), correct

    monkeypatch.setattr(training._Trainer, "_losses", losses)
    result = train(Ensemble(SHAPE, [1]), streamed(tmp_path), data, tmp_path / "run", SETTINGS, seed=7)
    assert list(result.diverged) == [0]
    assert result.heldout_accuracy == result.curves[0]["heldout_accuracy"]


def test_windows_are_those_in_memory(data: FrameData, tmp_path: Path) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).permutation(data.num_frames))
    assert torch.equal(streamed(tmp_path).windows.gather(frames), data.windows.gather(frames))
    for one, other in zip(input_statistics(streamed(tmp_path), FEATURES, 1), input_statistics(data, FEATURES, 1), strict=True):
        assert torch.equal(one, other)


def test_windows_from_several_stores(data: FrameData, tmp_path: Path) -> None:
    more = make_data(tmp_path / "more", 2, ("x", "y"))
    both = StreamedFrames([FrameStore(tmp_path / "features"), FrameStore(tmp_path / "more" / "features")],
                          [FrameStore(tmp_path / "targets"), FrameStore(tmp_path / "more" / "targets")], ["x", "u03"], LEFT, RIGHT, CPU)
    assert torch.equal(both.gather(torch.arange(200)), torch.cat([more.windows.gather(torch.arange(100)), data.windows.gather(torch.arange(300, 400))]))


def test_an_epoch_holds_every_frame_once_in_an_order_of_its_own(data: FrameData, tmp_path: Path) -> None:
    source, orders = streamed(tmp_path), []
    for epoch in (0, 1, 0):
        seen: list[tuple[str, int]] = []
        for part in source.parts(7, epoch):
            part_data, frames = part.load()
            assert part.num_frames == len(frames) == part_data.num_frames
            assert 300 <= part.num_frames <= 1000
            for frame in frames.tolist():
                u = int(np.searchsorted(part_data.offsets, frame, side="right")) - 1
                utt_id, within = part_data.utt_ids[u], frame - int(part_data.offsets[u])
                seen.append((utt_id, within))
                whole = 100 * UTT_IDS.index(utt_id) + within
                assert part_data.targets[frame] == data.targets[whole]
        assert sorted(seen) == [(utt_id, frame) for utt_id in UTT_IDS for frame in range(100)]
        orders.append(seen)
    assert orders[0] == orders[2] != orders[1]
    first_part = {utt_id for utt_id, _ in orders[0][:600]}
    assert first_part != set(UTT_IDS[: len(first_part)])  # chunks are shuffled


def test_a_streamed_epoch_takes_one_speed_variant_of_each_utterance(tmp_path: Path) -> None:
    utt_ids = tuple(prefix + utt_id for prefix in ("", "sp0.9-", "sp1.1-") for utt_id in UTT_IDS)
    make_data(tmp_path, 1, utt_ids)
    drawn = [[utt_id for part in streamed(tmp_path, utt_ids).parts(1, epoch) for utt_id in part.load()[0].utt_ids] for epoch in range(2)]
    for utterances in drawn:
        assert sorted(utt_id.rpartition("-")[2] for utt_id in utterances) == sorted(UTT_IDS)
    assert drawn[0] != drawn[1]


def test_ids_that_begin_like_those_of_speed_copies_are_utterances_of_their_own(tmp_path: Path) -> None:
    utt_ids = ("sp1-0001", "sp2-0001", "sp3-0001", "sp0.9-sp1-0001")  # three speakers, and a copy of the first
    data = make_data(tmp_path, 1, utt_ids)
    for epoch in range(5):
        assert {"sp2-0001", "sp3-0001"} < set(data.utterances_of(epoch_frames(data, 1, epoch)))
        assert len(epoch_frames(data, 1, epoch)) == sum(part.num_frames for part in streamed(tmp_path, utt_ids).parts(1, epoch)) == 300


def test_speed_copies_without_their_originals_are_known_by_their_stores(tmp_path: Path) -> None:
    """Three utterances at two speeds, in features that record the speed; one id looks like a copy's, its bare form is another utterance."""
    stores = []
    for speed in (0.9, 1.1):
        with FrameWriter(tmp_path / f"{speed}", (FEATURES,), np.float16, {"speed": speed}) as features, \
                FrameWriter(tmp_path / f"targets-{speed}", (), np.int32) as targets:
            for utt_id in ("a", "b", "sp1-a"):
                features.append(f"sp{speed}-{utt_id}", np.zeros((100, FEATURES)))
                targets.append(f"sp{speed}-{utt_id}", np.zeros(100))
        stores.append((FrameStore(tmp_path / f"{speed}"), FrameStore(tmp_path / f"targets-{speed}")))
    utt_ids = [utt_id for features, _ in stores for utt_id in features]
    features, targets = zip(*stores, strict=True)
    data = load_frame_data(features, targets, utt_ids, LEFT, RIGHT, CPU)
    source = StreamedFrames(features, targets, utt_ids, LEFT, RIGHT, CPU)
    seen: set[str] = set()
    for epoch in range(10):
        in_memory = data.utterances_of(epoch_frames(data, 1, epoch))
        from_disk = [utt_id for part in source.parts(1, epoch) for utt_id in part.load()[0].utt_ids]
        for drawn in (in_memory, from_disk):
            assert sorted(utt_id.split("-", 1)[1] for utt_id in drawn) == ["a", "b", "sp1-a"]
        seen.update(in_memory, from_disk)
    assert seen == set(utt_ids)


def test_an_id_like_a_copys_in_a_store_of_the_original_speed_is_no_copy(tmp_path: Path) -> None:
    with FrameWriter(tmp_path / "features", (FEATURES,), np.float16, {"speed": 1.0}) as features, FrameWriter(tmp_path / "targets", (), np.int32) as targets:
        for utt_id in ("0001", "sp1-0001"):
            features.append(utt_id, np.zeros((100, FEATURES)))
            targets.append(utt_id, np.zeros(100))
    stores = (FrameStore(tmp_path / "features"), FrameStore(tmp_path / "targets"))
    assert len(epoch_frames(load_frame_data(*stores, ["0001", "sp1-0001"], LEFT, RIGHT, CPU), 1, 0)) == 200


def test_the_next_item_is_loaded_while_the_present_one_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def load(number: int) -> int:
        begun[number].set()
        return number

    for number in load_ahead([lambda n=n: load(n) for n in range(3)]):
        assert number == 2 or begun[number + 1].wait(10)
    assert list(load_ahead([])) == []


@pytest.mark.parametrize("form", [None, "compact", "on_the_fly"])
def test_streamed_training_that_was_cut_goes_on_with_the_same_result(data: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     form: str | None) -> None:
    source, heldout = streamed(tmp_path), make_data(tmp_path / "heldout", 2, ("x", "y", "z"))
    soft_targets = None
    if form is not None:
        record = SoftTargetRecord(2.0, "arithmetic", NUM_STATES, "t", "f", "s")
        teachers = Ensemble(SHAPE, [1, 2])
        extract(teachers, source, tmp_path / "soft", record, seed=0, device=CPU, bytes_per_frame=16)
        soft_targets = SoftTargetStore(tmp_path / "soft", source, record, CPU) if form == "compact" else OnTheFlyTargets(teachers, source, 2.0)
    settings = replace(SETTINGS, checkpoint_interval_s=0.0)
    whole, cut = Ensemble(SHAPE, [3]), Ensemble(SHAPE, [3])
    expected = train(whole, source, heldout, tmp_path / "whole", settings, seed=7, soft_targets=soft_targets)
    assert expected.heldout_accuracy[0] > 0.3
    step, count = training._Trainer._step, 0

    def interrupted(self: training._Trainer, batch: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 53:  # in the second part of the second epoch
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(training, "_CHECK_STEPS", 1)
    monkeypatch.setattr(training._Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(cut, source, heldout, tmp_path / "cut", settings, seed=7, soft_targets=soft_targets)
    assert train(Ensemble(SHAPE, [3]), source, heldout, tmp_path / "cut", settings, seed=7, soft_targets=soft_targets) == expected


@pytest.mark.parametrize("form", ["dense", "compact", "sparse"])
def test_soft_targets_of_streamed_frames_are_those_of_frames_in_memory(data: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    monkeypatch.setattr(resumable_frames, "CHUNK_FRAMES", 300)
    record = SoftTargetRecord(2.0, "arithmetic", NUM_STATES, "t", "f", "s")
    rows_asked_for = []
    gather = StreamedFrames.gather
    monkeypatch.setattr(StreamedFrames, "gather", lambda self, frames: (rows_asked_for.append(len(frames)), gather(self, frames))[1])
    for name, frames in (("streamed", streamed(tmp_path)), ("in_memory", data)):
        extract(Ensemble(SHAPE, [1, 2]), frames, tmp_path / name, record, seed=0, device=CPU, form=form, bytes_per_frame=16)
    assert (tmp_path / "streamed" / "frames.npy").read_bytes() == (tmp_path / "in_memory" / "frames.npy").read_bytes()
    assert len(rows_asked_for) == (8 if form == "compact" else 0)  # passes over the sample: it alone is read window by window


def test_pages_of_all_stores_are_let_go_after_each_run(data: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, released = streamed(tmp_path), []
    monkeypatch.setattr(FrameStore, "release", lambda store: released.append(store.folder.name))
    source.run(0, int(source.offsets[2]))
    assert sorted(released) == ["features", "targets"]


def test_parts_that_are_over_are_not_kept(data: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout, source = make_data(tmp_path / "heldout", 2, ("x", "y", "z")), streamed(tmp_path)
    parts: list[weakref.ref[FrameData]] = []
    alive = []
    read, step = StreamedFrames._read, training._Trainer._step

    def reading(self: StreamedFrames, positions: np.ndarray) -> FrameData:
        part = read(self, positions)
        parts.append(weakref.ref(part))
        return part

    def stepping(self: training._Trainer, batch: torch.Tensor) -> None:
        alive.append(sum(part() is not None for part in parts))
        step(self, batch)

    monkeypatch.setattr(StreamedFrames, "_read", reading)
    monkeypatch.setattr(training._Trainer, "_step", stepping)
    train(Ensemble(SHAPE, [3]), source, heldout, tmp_path / "out", SETTINGS, seed=7)
    assert len(parts) >= 6
    assert max(alive) == 2  # the present one and the next


def test_a_store_in_parts_gives_the_targets_of_the_whole(data: FrameData, tmp_path: Path) -> None:
    record = SoftTargetRecord(2.0, "arithmetic", NUM_STATES, "t", "f", "s")
    extract(Ensemble(SHAPE, [1, 2]), data, tmp_path / "soft", record, seed=0, device=CPU, bytes_per_frame=16)
    store = SoftTargetStore(tmp_path / "soft", data, record, CPU)
    part, frames = streamed(tmp_path).parts(7, 0)[1].load()
    own = [100 * UTT_IDS.index(utt_id) + frame for utt_id in part.utt_ids for frame in range(100)]
    assert torch.equal(store.of(part).batch(frames), store.batch(torch.tensor(own)[frames]))


def test_the_loading_thread_uses_the_gpu_of_the_thread_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device)))
    loading = set(load_ahead([threading.get_ident, threading.get_ident]))
    assert chosen == [(loading.pop(), 3)]
    assert threading.get_ident() not in loading


@pytest.mark.parametrize("form", ["compact", "sparse"])
def test_streamed_training_on_a_gpu_gives_the_same_and_holds_targets_of_parts_alone(data: FrameData, tmp_path: Path, form: Form) -> None:
    record = SoftTargetRecord(2.0, "arithmetic", NUM_STATES, "t", "f", "s")
    extract(Ensemble(SHAPE, [1, 2]), data, tmp_path / "soft", record, seed=0, device=CPU, form=form, bytes_per_frame=16)
    make_data(tmp_path / "heldout", 2, ("x", "y", "z"))

    def trained(device: torch.device) -> tuple[Ensemble, SoftTargetStore]:
        source = streamed(tmp_path, device=device)
        heldout = load_frame_data(FrameStore(tmp_path / "heldout" / "features"), FrameStore(tmp_path / "heldout" / "targets"), "xyz", LEFT, RIGHT, device)
        store, student = SoftTargetStore(tmp_path / "soft", source, record, device), Ensemble(SHAPE, [3]).to(device)
        train(student, source, heldout, tmp_path / device.type, SETTINGS, seed=7, soft_targets=store)
        return student.cpu(), store

    with pretend_gpu() as gpu:
        there, store = trained(gpu)
        assert store._records is None  # never those of the whole corpus
        part = store.of(streamed(tmp_path, device=gpu).parts(7, 0)[0].load()[0])
        assert part._records is not None
        assert part._records.device == gpu
    here, _ = trained(CPU)
    for one, other in zip(there.parameters(), here.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_wrong_state_ids_and_missing_targets_are_named(tmp_path: Path) -> None:
    make_data(tmp_path, 1, UTT_IDS)
    with FrameWriter(tmp_path / "targets", (), np.int32) as targets:
        for utt_id in UTT_IDS[:-1]:
            targets.append(utt_id, np.full(100, NUM_STATES if utt_id == "u07" else 0))
    with pytest.raises(AsrKdError, match="u19: not in"):
        streamed(tmp_path)
    heldout = make_data(tmp_path / "heldout", 2, ("x",))
    with pytest.raises(AsrKdError, match="u07: state id 12, expected 0 to 11"):
        train(Ensemble(SHAPE, [3]), streamed(tmp_path, UTT_IDS[:-1]), heldout, tmp_path / "out", SETTINGS, seed=7)
