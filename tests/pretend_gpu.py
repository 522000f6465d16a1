"""A GPU that is none: tensors say that they are on "cuda:0" and are computed on the CPU, so that tests see where a tensor was left behind.

Operations that mix tensors of both places raise, as on a real GPU; an index that lies on the CPU does so too, where PyTorch would copy it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class PretendGpuTensor(Tensor):
    """A tensor "on the GPU", around one on the CPU; to PyTorch's own code it is one on "meta", which needs no driver."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendGpuTensor:
        with torch.inference_mode(False):  # else it could not be a view of a parameter
            made = Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                                                 device="meta")
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def __repr__(self) -> str:
        return f"PretendGpuTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, PretendGpuTensor) for tensor in tensors]
    if any(on_gpu) and func not in CROSSING and any(tensor.dim() and not gpu for tensor, gpu in zip(tensors, on_gpu, strict=True)):
        raise RuntimeError(f"{func}: tensors on the CPU and on the GPU")
    device = kwargs.get("device")
    result_on_gpu = torch.device(device).type in {"cuda", "meta"} if device is not None else any(on_gpu)
    inner_args, inner_kwargs = tree_map_only(PretendGpuTensor, lambda tensor: tensor.inner, (args, kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    changed = [argument for argument, schema in zip(args, func._schema.arguments, strict=False) if schema.is_write]
    changed += [kwargs[schema.name] for schema in func._schema.arguments if schema.is_write and schema.name in kwargs]
    if not func._schema.returns:
        return None
    if changed:
        return changed[0] if len(changed) == 1 else tuple(changed)
    return tree_map_only(Tensor, PretendGpuTensor, result) if result_on_gpu else result


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and isinstance(args[0], PretendGpuTensor):
            return args[0].inner.tolist()
        if func is Tensor.__setitem__ and isinstance(args[0], PretendGpuTensor) and not isinstance(args[2], Tensor):  # else a number becomes one of "meta"
            args = (args[0], args[1], PretendGpuTensor(torch.tensor(args[2], dtype=args[0].dtype)))
        if not any(map(_is_gpu, (*args, kwargs.get("device")))):
            return func(*args, **kwargs)
        here = func(*(CPU if _is_gpu(argument) else argument for argument in args), **(kwargs | ({"device": CPU} if "device" in kwargs else {})))
        return PretendGpuTensor(here) if isinstance(here, Tensor) else func(*args, **kwargs)


class _Generator(torch.Generator):
    """One that says where its tensors are; the numbers are the CPU's."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    place: torch.device

    @property
    def device(self) -> torch.device:
        return self.place


def _is_gpu(argument: object) -> bool:
    return (isinstance(argument, str) and argument.startswith("cuda")) or (isinstance(argument, torch.device) and argument.type == "cuda")


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Inside, `device="cuda"` works. This package's threads become this one, for they would not know of it, and Triton's kernels stay out."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.Generator", _Generator))
        stack.enter_context(mock.patch("torch.cuda.get_device_name", return_value="a GPU that is none"))
        stack.enter_context(mock.patch("asr_kd.hmm.corpus.num_threads", return_value=1))
        for module in ("training", "soft_targets"):
            stack.enter_context(mock.patch(f"asr_kd.{module}.load_ahead", lambda loads: (load() for load in loads)))
        stack.enter_context(mock.patch("asr_kd.losses.FUSED_DEVICES", ()))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # operations are small here
        stack.enter_context(_Mode())
        yield GPU
