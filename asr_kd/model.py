"""One acoustic model: a window of log-mel frames in, logits over the tied HMM states of its centre frame out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asr_kd.errors import AsrKdError
from asr_kd.stage import atomic_path

SEEDS = 2**32 - 5
"""torch's generator for a CPU looks at 32 bits of a seed: larger ones are taken modulo this prime, so that the members of two runs do not meet."""


@dataclass(frozen=True)
class ModelShape:
    """What decides a network's parameters: ReLU layers of equal width between a window of features and the states."""

    input_dim: int
    hidden_layers: int
    hidden_units: int
    num_states: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_dim", "hidden_layers", "hidden_units", "num_states"):
            if getattr(self, name) < 1:
                raise AsrKdError(f"{name}: {getattr(self, name)}, expected at least 1; change it in the settings")
        if not 0.0 <= self.dropout <= 0.99:
            raise AsrKdError(f"dropout: {self.dropout}, expected a share from 0 to 0.99; change it in the settings")

    @property
    def layer_dims(self) -> list[tuple[int, int]]:
        """(in, out) of every affine layer, the output layer last."""
        dims = [self.input_dim, *[self.hidden_units] * self.hidden_layers, self.num_states]
        return list(itertools.pairwise(dims))

    @property
    def num_weights(self) -> int:
        """Multiplications per frame of one forward pass."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.layer_dims)

    @property
    def num_values(self) -> int:
        """P, weights and biases."""
        return self.num_weights + sum(fan_out for _, fan_out in self.layer_dims)


class AcousticModel(nn.Module):
    """(N, input_dim) windows -> (N, num_states) logits.

    Hidden weights are drawn as He et al. (2015) propose for ReLU, output weights ten times smaller than that, from `seed` alone;
    without a seed they are whatever is in memory, to be overwritten.

    Attributes:
        input_mean, input_scale: (input_dim,) fixed; the input is (x - mean) * scale.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, shape: ModelShape, seed: int | None = 0) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("input_mean", torch.zeros(shape.input_dim))
        self.register_buffer("input_scale", torch.ones(shape.input_dim))
        self.layers = nn.ModuleList(_affine(fan_in, fan_out) for fan_in, fan_out in shape.layer_dims)
        self.dropout = nn.Dropout(shape.dropout)
        if seed is None:
            return
        generator = torch.Generator().manual_seed(seed % SEEDS)
        for layer in self.affine:
            std = math.sqrt(2.0 / layer.in_features) * (0.1 if layer is self.affine[-1] else 1.0)
            nn.init.normal_(layer.weight, std=std, generator=generator)

    @property
    def affine(self) -> list[nn.Linear]:
        """Hidden layers, then the output layer."""
        return [cast(nn.Linear, layer) for layer in self.layers]

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = (inputs - self.input_mean) * self.input_scale  # (N, input_dim)
        *hidden_layers, output_layer = self.affine
        for layer in hidden_layers:
            hidden = self.dropout(layer(hidden).relu())  # (N, hidden_units)
        logits: Tensor = output_layer(hidden)  # (N, num_states)
        return logits

    def save(self, path: Path | str) -> None:
        """Write weights and shape as one safetensors file, atomically."""
        save_tensors(path, self.state_dict(), {"shape": json.dumps(asdict(self.shape))})

    @classmethod
    def load(cls, path: Path | str) -> AcousticModel:
        """Read what `save` wrote.

        Raises:
            AsrKdError: not such a file, or tensors of other names or shapes than its own description says.
        """
        tensors, metadata = load_tensors(path)
        model = cls(read_shape(path, metadata), seed=None)
        copy_checked(tensors, model.state_dict(), path)
        return model


def _affine(fan_in: int, fan_out: int) -> nn.Linear:
    """A layer with zero bias whose weights are not drawn yet (`nn.Linear` would draw them from the global generator)."""
    layer = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
    nn.init.zeros_(layer.bias)
    return layer


def save_tensors(path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; tensors are brought to the CPU first."""
    with atomic_path(path, (SafetensorError,)) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        AsrKdError: missing, cut off or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AsrKdError(f"{path}: not readable as safetensors ({error}); run the stage that writes it again") from error


def read_shape(path: Path | str, metadata: dict[str, str]) -> ModelShape:
    """The `ModelShape` noted in a file's metadata."""
    try:
        return ModelShape(**json.loads(metadata["shape"]))
    except (KeyError, ValueError, TypeError) as error:
        raise AsrKdError(f"{path}: no model shape in its metadata ({error!r}); expected a file written by asr_kd; train the model again") from error


def copy_checked(found: Mapping[str, Tensor], into: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy tensors of a file into those of the same names, whose shapes they must have."""
    shapes, expected = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, into))
    if shapes != expected:
        name = min(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise AsrKdError(f"{path}: tensor {name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'none of that name')}; train the model again")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(found[name])
