"""One acoustic model: its mathematics, its initial weights, its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asr_kd.errors import AsrKdError
from asr_kd.model import AcousticModel, ModelShape

SHAPE = ModelShape(input_dim=6, hidden_layers=2, hidden_units=5, num_states=4)


def test_forward_equals_the_formula() -> None:
    model = AcousticModel(SHAPE, seed=1).double()
    model.input_mean.copy_(torch.arange(6.0))
    model.input_scale.fill_(0.5)
    inputs = np.random.default_rng(0).normal(size=(3, 6))
    hidden = (inputs - np.arange(6)) * 0.5
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in model.affine]
    for weight, bias in layers[:-1]:
        hidden = np.maximum(hidden @ weight.T + bias, 0)
    expected = hidden @ layers[-1][0].T + layers[-1][1]
    np.testing.assert_allclose(model(torch.from_numpy(inputs)).detach().numpy(), expected, rtol=1e-12)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = AcousticModel(SHAPE, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    again, other = AcousticModel(SHAPE, seed=3), AcousticModel(SHAPE, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.affine[0].weight, other.affine[0].weight)
    bits_alike = AcousticModel(SHAPE, seed=3 + 1000 * 2**29)  # a multiple of 2^32 apart
    assert not torch.equal(first.affine[0].weight, bits_alike.affine[0].weight)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global generator


def test_initial_weights_keep_the_variance_through_relu_layers() -> None:
    """He et al. (2015), eq. 10: weights of variance 2 / fan_in keep the mean square of a ReLU layer's input."""
    model = AcousticModel(ModelShape(input_dim=400, hidden_layers=6, hidden_units=400, num_states=10), seed=0)
    pre_activations = torch.randn(200, 400, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i, layer in enumerate(model.affine[:-1]):
            pre_activations = layer(pre_activations if i == 0 else pre_activations.relu())
    assert 1.0 < float(pre_activations.square().mean()) < 4.0  # 2 is expected: the first layer's input is not rectified
    assert float(model.affine[-1].weight.detach().std()) == pytest.approx(0.1 * (2 / 400) ** 0.5, rel=0.05)


def test_dropout_is_off_in_evaluation() -> None:
    model = AcousticModel(ModelShape(6, 2, 50, 4, dropout=0.5)).eval()
    inputs = torch.randn(3, 6)
    assert torch.equal(model(inputs), model(inputs))
    assert not torch.equal(model.train()(inputs), model.eval()(inputs))


def test_file_holds_all_of_a_model(tmp_path: Path) -> None:
    model = AcousticModel(ModelShape(6, 3, 5, 4, dropout=0.25), seed=1)
    model.input_mean.fill_(2.0)
    model.save(tmp_path / "model.safetensors")
    loaded = AcousticModel.load(tmp_path / "model.safetensors")
    assert loaded.shape == model.shape
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_file_of_other_shapes_is_refused(tmp_path: Path) -> None:
    model = AcousticModel(SHAPE)
    tensors = {**model.state_dict(), "layers.1.weight": torch.zeros(5, 6)}
    shape = json.dumps({"input_dim": 6, "hidden_layers": 2, "hidden_units": 5, "num_states": 4, "dropout": 0.0})
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"shape": shape})
    with pytest.raises(AsrKdError, match=r"layers\.1\.weight is \(5, 6\), expected \(5, 5\)"):
        AcousticModel.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("keep", [0, 40])
def test_file_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    AcousticModel(SHAPE).save(tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(AsrKdError, match=r"cut\.safetensors: not readable"):
        AcousticModel.load(tmp_path / "cut.safetensors")


def test_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(AsrKdError, match="no model shape"):
        AcousticModel.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("values", "message"), [((0, 1, 1, 1), "input_dim: 0"), ((1, 1, 1, 0), "num_states: 0"), ((1, 1, 1, 1, 1.0), "dropout: 1.0")])
def test_impossible_shapes_are_refused(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(AsrKdError, match=message):
        ModelShape(*values)
