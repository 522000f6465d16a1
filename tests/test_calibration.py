"""Quality of posteriors, against loops over frames and a hand-worked case."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd import calibration
from asr_kd.calibration import posterior_quality, reliability
from asr_kd.errors import AsrKdError


def test_examples() -> None:
    assert doctest.testmod(calibration).failed == 0


def test_hand_worked_case() -> None:
    posteriors = torch.tensor([[0.8, 0.2, 0.0], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]]).clamp(min=1e-30)
    quality = posterior_quality(posteriors.log(), torch.tensor([0, 2, 2, 0]), num_bins=10).as_json()
    # confidences 0.8 (right), 0.5 (wrong), 0.8 (right), 0.8 (wrong): |2 - 2.4| + |0 - 0.5| over 4 frames
    assert quality["ece"] == pytest.approx((0.4 + 0.5) / 4)
    assert quality["nll"] == pytest.approx(-(2 * math.log(0.8) + math.log(0.2) + math.log(0.1)) / 4)
    assert quality["brier"] == pytest.approx((0.08 + (0.25 + 0.09 + 0.64) + 0.06 + (0.81 + 0.64 + 0.01)) / 4)
    assert [row["frames"] for row in quality["bins"]] == [1, 3]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 20), st.integers(2, 60), st.integers(0, 1000))
def test_against_a_loop_and_in_two_parts(num_states: int, num_frames: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_posteriors = (3 * torch.randn(num_frames, num_states, generator=generator)).log_softmax(1)
    states = torch.randint(num_states, (num_frames,), generator=generator)
    nll = brier = 0.0
    for row, state in zip(log_posteriors.tolist(), states.tolist(), strict=True):
        nll -= row[state]
        brier += sum((math.exp(value) - (s == state)) ** 2 for s, value in enumerate(row))
    half = num_frames // 2
    parts = posterior_quality(log_posteriors[:half], states[:half]) + posterior_quality(log_posteriors[half:], states[half:])
    assert parts.nll == pytest.approx(nll, rel=1e-5)
    assert parts.brier == pytest.approx(brier, rel=1e-4)
    assert parts.as_json()["ece"] == pytest.approx(posterior_quality(log_posteriors, states).as_json()["ece"], abs=1e-9)


def test_true_posteriors_are_calibrated_and_sharpened_ones_are_not() -> None:
    """References drawn from the posteriors themselves: ECE goes to 0; the NLL is their entropy."""
    generator = torch.Generator().manual_seed(0)
    log_posteriors = (2 * torch.randn(50_000, 8, generator=generator)).log_softmax(1)
    states = torch.multinomial(log_posteriors.exp(), 1, generator=generator)[:, 0]
    true, sharp = posterior_quality(log_posteriors, states).as_json(), posterior_quality((3 * log_posteriors).log_softmax(1), states).as_json()
    entropy = float(-(log_posteriors.exp() * log_posteriors).sum(1).mean())
    assert true["ece"] < 0.01
    assert true["nll"] == pytest.approx(entropy, abs=0.02)
    assert sharp["ece"] > 0.1
    assert sharp["nll"] > true["nll"]
    assert sharp["brier"] > true["brier"]


def test_logits_and_other_lengths_are_refused() -> None:
    with pytest.raises(AsrKdError, match="log_softmax"):
        posterior_quality(torch.randn(4, 3), torch.zeros(4))
    with pytest.raises(AsrKdError, match="4 frames of posteriors for 3 reference states"):
        posterior_quality(torch.randn(4, 3).log_softmax(1), torch.zeros(3))


def test_calibration_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    confidence = np.append(generator.uniform(0, 1, 500), [0.0, 1.0])
    correct = generator.uniform(0, 1, 502) < confidence**2
    halves = reliability(confidence[:200], correct[:200]) + reliability(confidence[200:], correct[200:])
    expected = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence) if b / 15 <= c < (b + 1) / 15 or (b == 14 and c == 1)]
        expected += abs(sum(correct[inside]) - sum(confidence[inside])) / 502
    assert halves.expected_calibration_error == pytest.approx(expected)
    bins = halves.as_json()["bins"]
    assert sum(row["frames"] for row in bins) == 502
    assert all(row["accuracy"] <= 1 and row["frames"] > 0 for row in bins)
