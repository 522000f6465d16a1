"""Posteriors of whole utterances against direct formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd import evaluation
from asr_kd.ensemble import Ensemble
from asr_kd.errors import AsrKdError
from asr_kd.evaluation import log_posteriors
from asr_kd.features import Windows
from asr_kd.frame_results import evaluate_frames
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.model import ModelShape
from asr_kd.score import FrameCounts

LENGTHS = {"a": 30, "b": 1, "c": 17}


@pytest.fixture
def features(tmp_path: Path) -> FrameStore:
    rng = np.random.default_rng(0)
    with FrameWriter(tmp_path, (4,), np.float16) as writer:
        for utt_id, length in LENGTHS.items():
            writer.append(utt_id, rng.normal(size=(length, 4)))
    return FrameStore(tmp_path)


@pytest.fixture
def networks() -> Ensemble:
    networks = Ensemble(ModelShape(16, 2, 8, 5, dropout=0.5), [1, 2, 3])
    with torch.no_grad():
        networks.weights[-1].mul_(50.0)  # members that disagree
    return networks


def direct_posteriors(networks: Ensemble, frames: np.ndarray) -> np.ndarray:
    """(K, T, S) with windows of two frames before and one after, cut by hand."""
    padded = np.concatenate([frames[:1]] * 2 + [frames] + [frames[-1:]]).astype(np.float32)
    inputs = torch.from_numpy(np.stack([padded[t:t + 4].ravel() for t in range(len(frames))]))
    return torch.stack([networks.member(k).eval()(inputs).softmax(-1) for k in range(len(networks))]).detach().numpy()


@pytest.mark.parametrize("chunk_frames", [7, 1000])
def test_log_posteriors(features: FrameStore, networks: Ensemble, monkeypatch: pytest.MonkeyPatch, chunk_frames: int) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", chunk_frames * 15)
    windows = Windows(features, None, 2, 1)
    mean, second = dict(log_posteriors(networks, windows)), dict(log_posteriors(Ensemble.of([networks.member(1)]), windows, ["a", "c"]))
    assert list(mean) == ["a", "b", "c"]
    assert list(second) == ["a", "c"]
    for utt_id in LENGTHS:
        expected = direct_posteriors(networks, features[utt_id])
        np.testing.assert_allclose(np.exp(mean[utt_id]), expected.mean(0), rtol=1e-4, atol=1e-6)
        if utt_id in second:
            np.testing.assert_allclose(np.exp(second[utt_id]), expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_frames", [7, 1000])
def test_frame_results(features: FrameStore, networks: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_frames: int) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", chunk_frames * 15)
    rng = np.random.default_rng(1)
    states = {utt_id: rng.integers(5, size=LENGTHS[utt_id]) for utt_id in ("a", "c")}  # b could not be aligned
    targets = store_of(tmp_path / "targets", states)
    phone_of_state = np.array([0, 1, 1, 2, 2])
    members, ensemble = evaluate_frames(networks, Windows(features, None, 2, 1), targets, phone_of_state)

    posteriors = {utt_id: direct_posteriors(networks, features[utt_id]) for utt_id in states}
    for result, of in [(ensemble, lambda p: p.mean(0)), (members[2], lambda p: p[2])]:
        own = {utt_id: of(posteriors[utt_id]) for utt_id in states}
        assert result.counts == {utt_id: FrameCounts(int((own[utt_id].argmax(-1) == states[utt_id]).sum()), LENGTHS[utt_id]) for utt_id in states}
        of_reference = np.concatenate([own[utt_id][np.arange(len(states[utt_id])), states[utt_id]] for utt_id in states])
        assert result.quality is not None
        assert result.quality.as_json()["nll"] == pytest.approx(-np.log(of_reference).mean(), rel=1e-4)
        confusions = np.zeros((3, 3), int)
        for utt_id in states:
            np.add.at(confusions, (phone_of_state[states[utt_id]], phone_of_state[own[utt_id].argmax(-1)]), 1)
        np.testing.assert_array_equal(result.phone_confusions, confusions)


def test_frame_results_of_targets_of_another_length(features: FrameStore, networks: Ensemble, tmp_path: Path) -> None:
    targets = store_of(tmp_path / "targets", {"a": np.zeros(LENGTHS["a"] - 1, int)})
    with pytest.raises(AsrKdError, match="a: 29 targets for 30 frames; run the align stage again"):
        evaluate_frames(networks, Windows(features, None, 2, 1), targets, np.zeros(5, int))


def store_of(folder: Path, states: dict[str, np.ndarray]) -> FrameStore:
    with FrameWriter(folder, (), np.int32) as writer:
        for utt_id, own in states.items():
            writer.append(utt_id, own)
    return FrameStore(folder)
