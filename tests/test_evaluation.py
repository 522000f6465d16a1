"""Posteriors of whole utterances against direct formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd import evaluation
from asr_kd.ensemble import Ensemble
from asr_kd.evaluation import log_posteriors, member_log_posteriors
from asr_kd.features import Windows
from asr_kd.frames import FrameStore, FrameWriter
from asr_kd.model import ModelShape

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


def test_member_log_posteriors(features: FrameStore, networks: Ensemble) -> None:
    log_probs = member_log_posteriors(networks, Windows(features, None, 2, 1), "c")
    np.testing.assert_allclose(log_probs.exp().numpy(), direct_posteriors(networks, features["c"]), rtol=1e-4, atol=1e-6)
