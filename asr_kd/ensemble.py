"""K acoustic models of one shape with stacked parameters: forward and backward passes are batched matrix products."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_kd.errors import AsrKdError
from asr_kd.model import AcousticModel, ModelShape, copy_checked, load_tensors, read_shape, save_tensors

_DROPOUT_LEVELS = 256  # masks are compared as bytes, so the dropout rate is rounded to 1/256
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Ensemble(nn.Module):
    """(N, input_dim) windows -> (K, N, num_states) logits of K members that differ by their seeds.

    Member k starts exactly as `AcousticModel(shape, seeds[k])` and is `member(k)` at any time. The members share only the
    input, so each one's outputs and gradients are those of a network trained alone on the same batches.

    Args:
        drawn: False leaves the weights undrawn, to be overwritten.

    Attributes:
        values: (K, P) all weights and biases. A member's lie together, so that clipping, updates and sums over processes are few operations.
        input_mean, input_scale: (input_dim,), shared.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, shape: ModelShape, seeds: Sequence[int], *, drawn: bool = True) -> None:
        super().__init__()
        if not seeds:
            raise AsrKdError("num_teachers: 0, expected at least 1; change it in the settings")
        self.shape = shape
        self.seeds = tuple(seeds)
        self.register_buffer("input_mean", torch.zeros(shape.input_dim))
        self.register_buffer("input_scale", torch.ones(shape.input_dim))
        values = torch.empty(len(seeds), shape.num_values)
        if drawn:
            for row, seed in zip(values, seeds, strict=True):
                _fill(row, AcousticModel(shape, seed))
        self.values = nn.Parameter(values)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def weights(self) -> list[Tensor]:
        """Per layer (K, in, out), views of `values`."""
        return layer_views(self.values, self.shape)[0]

    @property
    def biases(self) -> list[Tensor]:
        """Per layer (K, 1, out), views of `values`."""
        return layer_views(self.values, self.shape)[1]

    def forward(self, inputs: Tensor, generators: Sequence[torch.Generator] | None = None, gradient: Tensor | None = None) -> Tensor:
        """Logits (K, N, num_states) of windows (N, input_dim).

        Args:
            generators: one per member; dropout is applied when there are any.
            gradient: (K, P) memory that the backward pass writes the gradient of `values` to, and hands out; new memory by default.
        """
        normalised = torch.addcmul(-self.input_mean * self.input_scale, inputs, self.input_scale)  # (N, input_dim)
        dropout = 0.0 if generators is None else self.shape.dropout
        masks = keep_masks(generators or [], (self.shape.hidden_layers, len(inputs), self.shape.hidden_units), dropout)
        logits: Tensor = _Layers.apply(normalised, self.values, self.shape, masks, rescaling(dropout), gradient)  # type: ignore[no-untyped-call]
        return logits

    def member(self, k: int) -> AcousticModel:
        """A copy of member k as a model of its own."""
        model = AcousticModel(self.shape, seed=None)
        state = {"input_mean": self.input_mean, "input_scale": self.input_scale}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            state[f"layers.{i}.weight"], state[f"layers.{i}.bias"] = weight[k].t(), bias[k, 0]
        model.load_state_dict(state)
        return model.to(self.input_mean.device)

    @classmethod
    def of(cls, models: Sequence[AcousticModel], seeds: Sequence[int] | None = None) -> Ensemble:
        """Stack models of one shape and with the same input mean and scale, whose seeds are 0, 1, ... unless given.

        Raises:
            AsrKdError: they differ in one of these.
        """
        ensemble = cls(models[0].shape, range(len(models)) if seeds is None else seeds, drawn=False).to(models[0].input_mean.device)
        for k, model in enumerate(models):
            same_inputs = torch.equal(model.input_mean, models[0].input_mean) and torch.equal(model.input_scale, models[0].input_scale)
            if model.shape != models[0].shape or not same_inputs:
                raise AsrKdError(f"member {k}: shape {model.shape}, expected {models[0].shape} and the same input mean and scale; "
                                 "stack models of one training run")
        ensemble.set_input_statistics(models[0].input_mean, models[0].input_scale)
        for row, model in zip(ensemble.values.detach(), models, strict=True):
            _fill(row, model)
        return ensemble

    def set_input_statistics(self, mean: Tensor, scale: Tensor) -> None:
        """Fix the input normalisation, both (input_dim,)."""
        self.input_mean.copy_(mean)
        self.input_scale.copy_(scale)

    def save(self, path: Path | str) -> None:
        """Write all members as one safetensors file, atomically."""
        save_tensors(path, self._named_tensors(), {"shape": json.dumps(asdict(self.shape)), "seeds": json.dumps(self.seeds)})

    @classmethod
    def load(cls, path: Path | str) -> Ensemble:
        """Read what `save` wrote.

        Raises:
            AsrKdError: not such a file, or tensors of other names or shapes than its own description says.
        """
        tensors, metadata = load_tensors(path)
        ensemble = cls(read_shape(path, metadata), json.loads(metadata.get("seeds", "[0]")), drawn=False)
        copy_checked(tensors, ensemble._named_tensors(), path)
        return ensemble

    def _named_tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        weights, biases = layer_views(self.values.detach(), self.shape)
        return {"input_mean": self.input_mean, "input_scale": self.input_scale, **{f"weights.{i}": weight for i, weight in enumerate(weights)},
                **{f"biases.{i}": bias for i, bias in enumerate(biases)}}


def _fill(row: Tensor, model: AcousticModel) -> None:
    """Write a model's weights, (in, out), then its biases to a row (P,)."""
    torch.cat([layer.weight.detach().t().flatten() for layer in model.affine] + [layer.bias.detach() for layer in model.affine], out=row)


def layer_views(values: Tensor, shape: ModelShape) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (K, in, out) and biases (K, 1, out) of each layer in rows (K, P)."""
    sizes = [*shape.layer_dims, *((1, fan_out) for _, fan_out in shape.layer_dims)]
    ends = list(itertools.accumulate(rows * columns for rows, columns in sizes))
    views = [values[:, start:end].view(-1, *size) for start, end, size in zip([0, *ends], ends, sizes, strict=False)]
    return views[:len(shape.layer_dims)], views[len(shape.layer_dims):]


def keep_masks(generators: Sequence[torch.Generator], shape: tuple[int, ...], dropout: float) -> Tensor | None:
    """Signed bytes (K, *shape), -1 (all bits set) where a unit is kept and 0 where it is dropped; None without dropout.

    Eight decisions per 64-bit draw, and no tensor of booleans, which torch writes and reads one by one: thirty times faster on a
    CPU than `torch.nn.functional.dropout`.
    """
    threshold = round(dropout * _DROPOUT_LEVELS)
    if threshold == 0:
        return None
    device, units = generators[0].device, math.prod(shape)
    draws = torch.empty(len(generators), -(-units // 8), dtype=torch.int64, device=device)
    for draw, generator in zip(draws, generators, strict=True):
        draw.random_(-(2**63), None, generator=generator)
    octets = draws.view(torch.uint8)[:, :units].view(-1, *shape)
    return torch.ge(octets, threshold, out=torch.empty(octets.shape, dtype=torch.int8, device=device)).neg_()


def rescaling(dropout: float) -> float:
    """What kept units are multiplied by, given the dropout rate as `keep_masks` rounds it."""
    return 1.0 / (1.0 - round(dropout * _DROPOUT_LEVELS) / _DROPOUT_LEVELS)


class _Layers(torch.autograd.Function):
    """Affine layers with ReLU and dropout between them: inputs (N, in), values (K, P), their shape, masks (K, hidden layers, N, hidden units) or None,
    dropout's rescaling, memory for the gradient or None.

    Written as one function so that nothing but the products passes over activations more often than it must: dropout is a bitwise
    AND, its rescaling goes into the products, and the zeros that ReLU and dropout leave serve both in the backward pass. Under autocast
    the products are in its type.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, values: Tensor, shape: ModelShape, masks: Tensor | None, scale: float, gradient: Tensor | None) -> Tensor:
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype
        with torch.autocast(kind, enabled=False):
            weights, biases = ([own.to(dtype) for own in part] for part in layer_views(values, shape))
            layer_inputs = [inputs.to(dtype).expand(len(values), -1, -1)]  # (K, N, in), not copied; units come unscaled out of every hidden layer
            for layer in range(shape.hidden_layers):
                hidden = torch.baddbmm(biases[layer], layer_inputs[layer], weights[layer], alpha=scale if layer else 1.0).relu_()  # (K, N, hidden_units)
                if masks is not None:
                    bits = _INTEGERS[hidden.element_size()]
                    hidden.view(bits).bitwise_and_(masks[:, layer].to(bits))
                layer_inputs.append(hidden)
            ctx.shape, ctx.scale, ctx.gradient, ctx.dtype = shape, scale, gradient, values.dtype
            ctx.save_for_backward(*weights, *layer_inputs)
            return torch.baddbmm(biases[-1], layer_inputs[-1], weights[-1], alpha=scale)  # (K, N, S)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        half = len(ctx.saved_tensors) // 2
        weights, layer_inputs = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        (gradient,) = gradients  # (K, N, S)
        of_values = ctx.gradient
        if of_values is None:
            of_values = torch.empty(len(gradient), ctx.shape.num_values, dtype=ctx.dtype, device=gradient.device)
        of_weights, of_biases = layer_views(of_values, ctx.shape)
        with torch.autocast(gradient.device.type, enabled=False):
            for layer in reversed(range(half)):
                scale = ctx.scale if layer else 1.0
                _scaled_product(layer_inputs[layer].transpose(1, 2), gradient, scale, of_weights[layer])
                of_biases[layer].copy_(gradient.sum(1, keepdim=True))
                if layer:
                    of_units = _scaled_product(gradient, weights[layer].transpose(1, 2), scale)  # (K, N, hidden_units)
                    gradient = torch.ops.aten.threshold_backward(of_units, layer_inputs[layer], 0)
            of_inputs = torch.bmm(gradient, weights[0].transpose(1, 2)).sum(0).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return of_inputs, of_values, None, None, None, None


def _scaled_product(left: Tensor, right: Tensor, scale: float, result: Tensor | None = None) -> Tensor:
    """`scale` times the batched product, without a pass of its own for the scale; written to `result` where there is one, of whatever type."""
    nothing = left.new_empty(1, 1, 1)  # with beta 0 the first argument is not read
    if result is None or result.dtype == left.dtype:
        return torch.baddbmm(nothing, left, right, beta=0, alpha=scale, out=result)
    return result.copy_(torch.baddbmm(nothing, left, right, beta=0, alpha=scale))
