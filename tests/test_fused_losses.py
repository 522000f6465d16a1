"""The Triton kernels against the plain form: on a CUDA device where there is one, else on the CPU by Triton's interpreter, in a process of its own."""

import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asr_kd import losses
from asr_kd.losses import DistillationLoss, SparseTargets, average_teachers, distillation_loss

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it comes with torch's Linux wheels)")
on_device = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; test_by_the_interpreter runs this on the CPU"),
]
in_this_process = pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")


@needs_triton
@in_this_process
def test_by_the_interpreter() -> None:
    """The other tests of this file: Triton decides at its import whether it compiles or interprets."""
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", "TestOnDevice"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout, result.stdout


@pytest.fixture(name="kernels")
def kernels_of_small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels, with blocks of 4 classes so that a frame takes several; on the CPU too, where the interpreter runs them."""
    from asr_kd import fused_losses

    monkeypatch.setattr(fused_losses, "MAX_BLOCK", 4)
    monkeypatch.setattr(losses, "FUSED_DEVICES", (DEVICE,))
    losses._working_kernels.cache_clear()
    yield fused_losses
    losses._working_kernels.cache_clear()


def case(dtype: torch.dtype = torch.float32, classes: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (2, 2, C) with one class masked, soft targets, hard targets, lengths with padding that holds NaN and ids out of range."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = 3 * torch.randn(2, 2, 2, classes, generator=generator)
    for z in (logits, teacher):
        z[..., 1] = -math.inf
    soft, hard = (teacher / 2).softmax(-1), torch.randint(2, classes, (2, 2), generator=generator)
    logits[1, 1], soft[1, 1], hard[1, 1] = math.nan, math.nan, 10**6
    length = torch.tensor([1.0, 0.5])
    logits, soft, hard, length = (t.to(DEVICE) for t in (logits.to(dtype), soft, hard, length))
    return logits.requires_grad_(), soft, hard, length


def forms(soft: Tensor) -> dict[str, Tensor | SparseTargets]:
    top, indices = soft.nan_to_num(nan=1.0).topk(3)
    twice = indices.clone()
    twice[..., 1] = twice[..., 0]
    unmasked = torch.where(indices == 1, 0, indices)
    return {
        "dense": soft,
        "dense float16": soft.half(),
        "dense with strides": soft.mT.contiguous().mT,
        "sparse": SparseTargets(unmasked, top),
        "one class": SparseTargets(unmasked[..., :1], torch.ones_like(top[..., :1])),
        "repeated classes": SparseTargets(twice, top, torch.zeros_like(top[..., 0])),
        "tail": SparseTargets(indices, top, (1 - top.sum(-1)).clamp(min=0)),
        "tail of nothing": SparseTargets(indices.int(), top / top.sum(-1, keepdim=True), torch.zeros_like(top[..., 0])),
    }


def value_and_gradient(logits: Tensor, *targets: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    loss = distillation_loss(logits, *targets, reduction="none", **settings)
    weights = torch.arange(1.0, 5.0, device=loss.device).view(2, 2)
    return loss.detach(), torch.autograd.grad(loss, logits, weights)[0]


def assert_as_plain(logits: Tensor, *targets: Any, **settings: Any) -> None:
    fused, plain = (value_and_gradient(logits, *targets, fused=choice, **settings) for choice in (True, False))
    torch.testing.assert_close(fused[0], plain[0], equal_nan=True)
    assert fused[1].dtype == logits.dtype
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(fused[1], plain[1], rtol=max(1e-5, eps), atol=1e-6, equal_nan=True)


class TestOnDevice:
    pytestmark = on_device

    @pytest.mark.parametrize("form", ["dense", "dense float16", "dense with strides", "sparse", "one class", "repeated classes", "tail", "tail of nothing"])
    def test_as_the_plain_form(self, kernels: Any, form: str) -> None:
        for temperature, dtype, labelled, kl in ((1.0, torch.float32, True, True), (2.0, torch.bfloat16, False, False), (0.7, torch.float16, True, True)):
            logits, soft, hard, length = case(dtype)
            if form == "tail":  # a uniform tail reaches every class: none may be masked
                logits = torch.where(logits.isinf(), 0.0, logits).detach().requires_grad_()
            assert_as_plain(logits, forms(soft)[form], hard if labelled else None, length, temperature=temperature, hard_weight=0.3, kl=kl)

    @pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min])
    def test_several_masked_classes(self, kernels: Any, masked: float) -> None:
        logits, soft, hard, length = case()
        where = torch.arange(logits.shape[-1], device=DEVICE)
        logits = logits.detach().masked_fill((where < 5) & ~logits.isnan(), masked).requires_grad_()  # a whole block of them, and one more
        soft = soft.masked_fill(where < 5, 0)
        soft /= soft.sum(-1, keepdim=True)
        indices = where[4:].expand(*soft.shape[:-1], -1)
        listed = soft.gather(-1, indices)
        hard = hard.clamp(min=5)
        for temperature in (0.7, 1.0, 2.0):
            dense = distillation_loss(logits, soft, hard, length, temperature=temperature, fused=False)
            assert dense.isfinite()
            for targets in (soft, SparseTargets(indices, listed), SparseTargets(indices, listed, torch.zeros_like(listed[..., 0]))):
                assert_as_plain(logits, targets, hard, length, temperature=temperature)
                torch.testing.assert_close(distillation_loss(logits, targets, hard, length, temperature=temperature, fused=True), dense)
                torch.testing.assert_close(distillation_loss(logits, targets, hard, length, temperature=temperature, fused=False), dense)

    def test_the_kernels_are_what_runs(self, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        launched = []
        launch = kernels._launch
        monkeypatch.setattr(kernels, "_launch", lambda kernel, *args, **kwargs: (launched.append(kernel), launch(kernel, *args, **kwargs)))
        logits, soft, _, length = case()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert losses._working_kernels(logits.device) is kernels
        launched.clear()
        DistillationLoss(2.0)(logits, soft, None, length).backward()
        assert launched == [kernels._loss_kernel, kernels._gradient_kernel]
        DistillationLoss(2.0, fused=False)(logits, soft, None, length).backward()
        assert len(launched) == 2

    def test_large_logits_and_masked_beginnings(self, kernels: Any) -> None:
        logits = torch.tensor([[-1e4] * 5 + [1e4], [1e4] * 2 + [-1e4] * 4, [-math.inf] * 5 + [3.0]], device=DEVICE, requires_grad=True)
        soft = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5], [0, 0, 0, 0, 0, 1.0]], device=DEVICE)
        loss = distillation_loss(logits, soft, temperature=2.0, reduction="none")
        expected = torch.tensor([4e4, 4 * (1e4 + math.log(2)), 0.0], device=DEVICE)
        torch.testing.assert_close(loss, expected)
        gradient = torch.autograd.grad(loss.sum(), logits)[0]
        expected = torch.tensor([[-1, -1, 0, 0, 0, 2.0], [1, 1, 0, 0, -1, -1.0], [0.0] * 6], device=DEVICE)
        torch.testing.assert_close(gradient, expected)

    def test_masked_class_with_probability(self, kernels: Any) -> None:
        logits = torch.tensor([[-math.inf, 0.0, 0.0]], device=DEVICE, requires_grad=True)
        soft = torch.tensor([[0.25, 0.5, 0.25]], device=DEVICE)
        loss = distillation_loss(logits, soft, temperature=1.0)
        assert loss > 1e37
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.tensor([[-0.25, 0.0, 0.25]], device=DEVICE))

    def test_masked_classes_beside_a_tail(self, kernels: Any) -> None:
        logits = torch.tensor([[-math.inf, 0.0, 1.0, 2.0, 3.0], [0.0, 1.0, -math.inf, 2.0, 3.0]], device=DEVICE, requires_grad=True)
        for p in (0.0, 0.25):  # of a class that is masked in the first frame; in the second, the tail has a masked one
            indices, listed, tail = torch.tensor([[0, 4]] * 2), torch.tensor([[p, 0.5 - p]] * 2), torch.full((2,), 0.5)
            soft = SparseTargets(indices, listed, tail).map(lambda tensor: tensor.to(DEVICE))
            fused, plain = (distillation_loss(logits, soft, temperature=2.0, reduction="none", fused=choice) for choice in (True, False))
            assert (fused > 1e30).tolist() == (plain > 1e30).tolist() == [p > 0, True]
            torch.testing.assert_close(fused[fused < 1e30], plain[plain < 1e30])
            weights = torch.ones(2, device=DEVICE)
            torch.testing.assert_close(torch.autograd.grad(fused, logits, weights)[0], torch.autograd.grad(plain, logits, weights)[0])

    def test_nan_where_there_is_no_distribution(self, kernels: Any) -> None:
        logits = torch.zeros(4, 6, device=DEVICE)
        logits[0, 5], logits[1], soft = math.nan, -math.inf, torch.full((4, 6), 1 / 6, device=DEVICE)
        hard = torch.tensor([0, 0, 6, 0], device=DEVICE)
        rows = losses._Rows(soft, None, None, hard, None)
        found = kernels.row_losses(logits, rows, losses._Settings(2.0, 0.5, False, True))
        assert found.isnan().tolist() == [True, True, True, False]  # NaN, all masked, id out of range
        listed = losses._Rows(soft[:, :1] * 6, torch.tensor([[0], [1], [6], [-1]], device=DEVICE), None, None, None)
        found = kernels.row_losses(torch.zeros(4, 6, device=DEVICE), listed, losses._Settings(2.0, 0.5, False, True))
        assert found.isnan().tolist() == [False, False, True, True]

    def test_mean_of_teachers_as_the_plain_form(self, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[int] = []
        assert losses._working_kernels(torch.device(DEVICE)) is kernels
        fused = kernels.mean_posteriors
        monkeypatch.setattr(kernels, "mean_posteriors", lambda *args: (called.append(1), fused(*args))[1])
        generator = torch.Generator().manual_seed(0)
        for dtype, classes, temperature in ((torch.float32, 11, 0.7), (torch.bfloat16, 16, 2.0), (torch.float16, 1, 1.0), (torch.bfloat16, 300, 5.0)):
            logits = (4 * torch.randn(3, 2, 5, classes, generator=generator)).to(DEVICE, dtype)
            logits[1, 0, 2, :1] = -math.inf if classes > 1 else 0.0
            logits[2, 1, 3, 0] = math.nan
            expected = average_teachers(list(logits), temperature)  # one by one: the plain form
            called.clear()
            for given in (logits, logits.mT.contiguous().mT, torch.stack([logits, logits], 2)[:, :, 0]):
                torch.testing.assert_close(average_teachers(given, temperature), expected, equal_nan=True)
            assert len(called) == 3
            assert expected[1, 3].isnan().all()
        gradient = torch.autograd.grad(average_teachers(logits.requires_grad_(), 2.0)[0, 0, 0], logits)[0]
        assert len(called) == 3
        assert gradient[:, 0, 0].abs().sum() > 0
        average_teachers(logits.detach(), 2.0, "geometric")
        assert len(called) == 3
        assert not kernels.supports_mean(torch.empty(2, 3, kernels.MAX_AVERAGED + 1, device="meta"))

    def test_higher_derivatives_and_transforms_take_the_plain_form(self, kernels: Any) -> None:
        logits, soft, hard, _ = case(classes=5)
        z, p, y = logits.detach()[:1, :2, 2:].contiguous(), soft[:1, :2, 2:], hard[:1, :2].clamp(max=4) - 2
        p = p / p.sum(-1, keepdim=True)

        def loss(z: Tensor) -> Tensor:
            return distillation_loss(z, p, y, temperature=2.0)

        once = torch.func.grad(loss)(z)
        torch.testing.assert_close(once, torch.autograd.grad(loss(z.requires_grad_()), z)[0])
        graph = torch.autograd.grad(loss(z), z, create_graph=True)[0]
        assert torch.autograd.grad(graph.square().sum(), z)[0].isfinite().all()

    def test_what_the_kernels_do_not_take(self, kernels: Any) -> None:
        listed = torch.zeros(2, kernels.MAX_LISTED + 1, dtype=torch.long)
        many = losses._Rows(listed.float(), listed, None, None, None)
        dense = losses._Rows(torch.ones(2, 500), None, None, None, None)
        assert not kernels.supports(torch.zeros(2, 500), many)
        assert not kernels.supports(torch.zeros(2, 500), many._replace(probabilities=torch.zeros(2, 0), indices=listed[:, :0]))
        assert not kernels.supports(torch.zeros(2, 500, dtype=torch.float64), dense)
        assert not kernels.supports(torch.zeros(0, 500), dense)
        assert kernels.supports(torch.zeros(2, 500), dense)


@needs_triton
@in_this_process
def test_the_kernels_compile_for_gpus_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Types, masks and loops that the interpreter does not look at: Triton's compiler down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from asr_kd import fused_losses

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"index_ptr": "*i64", "tail_ptr": "*fp32", "hard_ptr": "*i64", "valid_ptr": "*i1"}
    cases = (("*bf16", ("hard_ptr", "valid_ptr"), 63), ("*fp16", tuple(pointers), 63), ("*fp32", ("index_ptr",), 63), ("*bf16", ("index_ptr",), 1))
    for dtype, present, listed in cases:
        for kernel, result, others in (
            (fused_losses._loss_kernel, {"loss_ptr": "*fp32"}, {"KL": True}),
            (fused_losses._gradient_kernel, {"gradient_ptr": dtype, "weights_ptr": "*fp32"}, {}),
        ):
            constants = {name: None for name in pointers if name not in present} | others
            constants |= {"NUM_CLASSES": 14000, "NUM_LISTED": listed if "index_ptr" in present else 0, "LISTED_BLOCK": triton.next_power_of_2(listed)}
            constants |= {"BLOCK": 4096}
            types = {"logits_ptr": dtype, "soft_ptr": "*fp32", "logits_stride": "i64", "soft_stride": "i64", "temperature": "fp32", "hard_weight": "fp32"}
            types |= result | pointers | dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants)
            assert "cubin" in compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8}).asm
    for dtype in ("*bf16", "*fp16", "*fp32"):
        types = {"means_ptr": "*fp32", "logits_ptr": dtype, "teacher_stride": "i64", "frame_stride": "i64", "temperature": "fp32"}
        constants = {"NUM_TEACHERS": 10, "NUM_CLASSES": 14000, "BLOCK": 16384}
        source = ASTSource(fused_losses._mean_kernel, types | dict.fromkeys(constants, "constexpr"), constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
        assert compiled.metadata.shared < 48 * 1024


@in_this_process
def test_kernels_that_do_not_work_are_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because compiled kernels cannot run on a CPU; on a GPU because there is no compiler, say."""
    monkeypatch.setattr(losses, "FUSED_DEVICES", ("cpu",))
    losses._working_kernels.cache_clear()
    logits, soft = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.full((4, 9), 1 / 9)
    expected = distillation_loss(logits, soft, temperature=2.0, fused=False)
    if importlib.util.find_spec("triton") is None:
        assert distillation_loss(logits, soft, temperature=2.0) == expected
    else:
        with pytest.warns(UserWarning, match="asr_kd.fused_losses does not work on cpu, the plain form is used"):
            assert distillation_loss(logits, soft, temperature=2.0) == expected
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            assert distillation_loss(logits, soft, temperature=2.0) == expected
    monkeypatch.setitem(sys.modules, "asr_kd.fused_losses", None)  # as where Triton is missing: no word about it
    monkeypatch.delattr("asr_kd.fused_losses", raising=False)
    losses._working_kernels.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distillation_loss(logits, soft, temperature=2.0) == expected
    losses._working_kernels.cache_clear()
