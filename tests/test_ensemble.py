"""K stacked models against K models of their own."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.ensemble import Ensemble, keep_masks, layer_views
from asr_kd.errors import AsrKdError
from asr_kd.model import AcousticModel, ModelShape

SHAPE = ModelShape(input_dim=7, hidden_layers=3, hidden_units=16, num_states=5)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@settings(max_examples=15, deadline=None)
@given(members=st.integers(1, 4), rows=st.integers(1, 9), layers=st.integers(1, 3), units=st.integers(1, 17))
def test_outputs_and_gradients_are_those_of_single_models(members: int, rows: int, layers: int, units: int) -> None:
    shape = ModelShape(7, layers, units, 5)
    ensemble, inputs = Ensemble(shape, range(members)), torch.randn(rows, 7, requires_grad=True)
    targets = torch.randint(0, 5, (rows,))
    logits = ensemble(inputs)
    sum(torch.nn.functional.cross_entropy(member, targets) for member in logits).backward()  # type: ignore[union-attr]
    of_inputs, inputs.grad = inputs.grad, None
    for k in range(members):
        of_weights, of_biases = layer_views(ensemble.values.grad, shape)
        single = AcousticModel(shape, seed=k)
        single_logits = single(inputs)
        torch.testing.assert_close(logits[k], single_logits)
        torch.nn.functional.cross_entropy(single_logits, targets).backward()
        for i, layer in enumerate(single.affine):
            torch.testing.assert_close(of_weights[i][k].t(), layer.weight.grad)
            torch.testing.assert_close(of_biases[i][k, 0], layer.bias.grad)
    torch.testing.assert_close(of_inputs, inputs.grad)


def test_dropout_gradient_equals_that_of_plain_operations() -> None:
    shape = ModelShape(7, 2, 16, 5, dropout=0.25)
    ensemble, inputs = Ensemble(shape, [1, 2]), torch.randn(9, 7)
    ensemble(inputs, generators(8, 9)).square().sum().backward()
    found, ensemble.values.grad = ensemble.values.grad, None
    hidden, keep = inputs.expand(2, -1, -1), keep_masks(generators(8, 9), (2, 9, 16), 0.25)
    assert keep is not None
    weights, biases = ensemble.weights, ensemble.biases
    for layer in range(2):
        hidden = torch.where(keep[:, layer].bool(), (hidden @ weights[layer] + biases[layer]).relu() / 0.75, 0.0)
    (hidden @ weights[-1] + biases[-1]).square().sum().backward()
    torch.testing.assert_close(found, ensemble.values.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_written_where_it_is_wanted(dtype: torch.dtype) -> None:
    ensemble, inputs = Ensemble(SHAPE, [1, 2]), torch.randn(9, 7)
    gradient = torch.full_like(ensemble.values, torch.nan)
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for memory in (None, gradient):
            found += torch.autograd.grad(ensemble(inputs, gradient=memory).square().sum(), ensemble.values)
    assert found[1].data_ptr() == gradient.data_ptr()
    assert torch.equal(found[0], gradient)
    assert gradient.dtype == torch.float32


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 70), units=st.integers(1, 70), dropout=st.floats(0.05, 0.9))
def test_masks_are_each_members_own(rows: int, units: int, dropout: float) -> None:
    masks = keep_masks(generators(1, 2), (rows, units), dropout)
    alone = keep_masks(generators(2), (rows, units), dropout)
    assert masks is not None
    assert alone is not None
    assert masks.shape == (2, rows, units)
    assert torch.equal(masks[1], alone[0])


def test_masks_drop_the_share_they_are_asked_for() -> None:
    masks = keep_masks(generators(1), (1000, 1000), 0.125)
    assert masks is not None
    assert set(masks.unique().tolist()) == {-1, 0}
    masks = -masks
    assert 1 - float(masks.float().mean()) == pytest.approx(0.125, abs=5 * (0.125 * 0.875 / 1e6) ** 0.5)
    by_octet = masks.view(-1, 8).float().mean(0)  # each byte of a draw is as random as the others
    assert float((by_octet - 0.875).abs().max()) < 5 * (0.125 * 0.875 / 125_000) ** 0.5
    assert keep_masks(generators(1), (10, 10), 0.0) is None


def test_member_and_stack_are_inverse() -> None:
    ensemble = Ensemble(SHAPE, [4, 5, 6])
    ensemble.set_input_statistics(torch.ones(7), torch.full((7,), 2.0))
    again = Ensemble.of([ensemble.member(k) for k in range(3)])
    inputs = torch.randn(3, 7)
    torch.testing.assert_close(again(inputs), ensemble(inputs))
    torch.testing.assert_close(ensemble.member(1)(inputs), ensemble(inputs)[1])


def test_a_stack_is_where_its_models_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda one, other: True)  # tensors without memory stand for a GPU's
    stacked = Ensemble.of([AcousticModel(SHAPE, seed).to("meta") for seed in (1, 2)])
    assert {tensor.device.type for tensor in stacked.state_dict().values()} == {"meta"}


def test_models_of_different_shapes_are_not_stacked() -> None:
    with pytest.raises(AsrKdError, match="member 1: shape"):
        Ensemble.of([AcousticModel(SHAPE), AcousticModel(ModelShape(7, 3, 17, 5))])


@pytest.mark.parametrize("statistic", ["input_mean", "input_scale"])
def test_models_of_different_inputs_are_not_stacked(statistic: str) -> None:
    models = [AcousticModel(SHAPE, seed) for seed in (1, 2)]
    getattr(models[1], statistic)[0] = 7.0
    with pytest.raises(AsrKdError, match="same input mean and scale"):
        Ensemble.of(models)


def test_no_members_is_an_error() -> None:
    with pytest.raises(AsrKdError, match="num_teachers"):
        Ensemble(SHAPE, [])


def test_file_holds_all_of_an_ensemble(tmp_path: Path) -> None:
    ensemble = Ensemble(SHAPE, [4, 5])
    ensemble.input_mean.fill_(3.0)
    ensemble.save(tmp_path / "teachers.safetensors")
    loaded = Ensemble.load(tmp_path / "teachers.safetensors")
    assert (loaded.shape, loaded.seeds) == (SHAPE, (4, 5))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in ensemble.state_dict().items())
    with pytest.raises(AsrKdError, match=r"tensor (weights|biases|layers)"):
        AcousticModel.load(tmp_path / "teachers.safetensors")
