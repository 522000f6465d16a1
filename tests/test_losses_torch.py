"""The losses within torch and SpeechBrain: autocast, compile, vmap, DistributedDataParallel, memory, CTC and seq2seq heads."""

import doctest
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from asr_kd import losses
from asr_kd.losses import DistillationLoss, SparseTargets, average_teachers, distillation_loss

DOCS = Path(__file__).parent.parent / "docs" / "losses.md"


def random_case(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = 3 * torch.randn(2, *shape, generator=generator)
    return logits.requires_grad_(), (teacher / 2).softmax(-1), torch.randint(shape[-1], shape[:-1], generator=generator)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, soft, hard = random_case((8, 3000))
    halved = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation_loss(halved, soft, hard, temperature=2.0)
    exact_logits = halved.detach().double().requires_grad_()
    exact = distillation_loss(exact_logits, soft.double(), hard, temperature=2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    found = gradient(loss, halved)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), gradient(exact, exact_logits), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_ten_thousand_do_not_overflow(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    soft = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    loss = distillation_loss(logits, soft, torch.tensor([1, 2]), temperature=2.0)
    large = logits.detach()[0, 0].item()  # bfloat16 has no 10,000
    assert loss.item() == pytest.approx((4 * large + 4 * large / 2 + 0.5 * 2 * large) / 2, rel=1e-6)
    assert gradient(loss, logits).isfinite().all()


def test_a_linear_layer_under_autocast_gets_the_float32_gradient_up_to_rounding() -> None:
    torch.manual_seed(0)
    layer, features = nn.Linear(16, 40), torch.randn(32, 16)
    _, soft, hard = random_case((32, 40))
    found = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = layer(features)
            assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = distillation_loss(logits, soft, hard, temperature=2.0)
        loss.backward()
        found.append(layer.weight.grad.clone())
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.parametrize(("backend", "sparse"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiles_to_one_graph(backend: str, sparse: bool) -> None:
    if backend == "inductor" and not has_cpp_compiler():
        pytest.skip("torch.compile's inductor needs a C++ compiler; none was found")
    logits, soft, hard = random_case((2, 6, 9))
    top, indices = soft.topk(3)
    target = SparseTargets(indices, top, 1 - top.sum(-1)) if sparse else soft
    length = torch.tensor([1.0, 0.5])
    module = DistillationLoss(temperature=2.0, kl=True)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    expected, loss = module(logits, target, hard, length), compiled(logits, target, hard, length)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_once_for_temperatures_and_lengths_that_change(dynamic: bool | None) -> None:
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for frames, temperature, hard_weight in ((6, 2.0, 0.5), (6, 3.0, 0.25), (7, 4.5, 0.125)):
        logits, soft, hard = random_case((2, frames, 9))
        settings = {"temperature": temperature, "hard_weight": hard_weight}
        torch.testing.assert_close(compiled(logits, soft, hard, **settings), distillation_loss(logits, soft, hard, **settings))


def test_vmap_and_per_utterance_gradients() -> None:
    logits, soft, hard = random_case((4, 6, 9))
    z = logits.detach()

    def loss(z: Tensor, p: Tensor, y: Tensor) -> Tensor:
        return distillation_loss(z, p, y, temperature=2.0)

    each = torch.stack([loss(*utterance) for utterance in zip(logits, soft, hard, strict=True)])
    expected = gradient(each.sum(), logits)
    by_vmap = torch.vmap(loss)(logits, soft, hard)
    torch.testing.assert_close(by_vmap, each)
    torch.testing.assert_close(gradient(by_vmap.sum(), logits), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(z, soft, hard), expected)
    many_teachers = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, None))(z[0], soft, hard[0])
    for k in range(4):
        torch.testing.assert_close(many_teachers[k], gradient(loss(logits[0], soft[k], hard[0]), logits)[0])


def test_several_backward_passes_at_once() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    soft = torch.randn(2, 3, 5, generator=generator).softmax(-1)
    losses = distillation_loss(logits, soft, length=torch.tensor([1.0, 0.67]), temperature=2.0, reduction="none").flatten()
    directions = torch.eye(len(losses))
    (together,) = torch.autograd.grad(losses, logits, directions, is_grads_batched=True, retain_graph=True)
    for direction, found in zip(directions, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(losses, logits, direction, retain_graph=True)[0])


def test_vmap_over_batches_with_lengths() -> None:
    logits, soft, hard = random_case((4, 3, 6, 5))
    length = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).clamp(min=0.2)
    by_vmap = torch.vmap(torch.func.grad(DistillationLoss(2.0)))(logits.detach(), soft, hard, length)
    for k in range(4):
        expected = gradient(distillation_loss(logits[k], soft[k], hard[k], length[k], temperature=2.0), logits)[k]
        torch.testing.assert_close(by_vmap[k], expected)


def test_hessian_by_torch_func() -> None:
    logits, soft, _ = random_case((1, 5))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda z: distillation_loss(z, soft, temperature=2.0)))(logits.detach())
    q = (logits.detach()[0] / 2).softmax(-1)
    torch.testing.assert_close(hessian[0, :, 0], q.diag() - q.outer(q))  # d/dz of T * (q - p) is diag(q) - q q'


def test_forward_mode_derivative_by_torch_func_and_by_autograd() -> None:
    logits, soft, hard = random_case((4, 5))
    along = torch.linspace(-1, 1, 20).view(4, 5)

    def loss(z: Tensor) -> Tensor:
        return distillation_loss(z, soft, hard, temperature=2.0)

    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits.detach(), along))).tangent
    torch.testing.assert_close(derivative, (gradient(loss(logits), logits) * along).sum())

    value, slope = torch.func.jvp(loss, (logits.detach(),), (along,))
    torch.testing.assert_close(value, loss(logits).detach())
    torch.testing.assert_close(slope, (torch.autograd.grad(loss(logits), logits)[0] * along).sum())


def distributed_gradients(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch, gradients averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.parallel.DistributedDataParallel(nn.Linear(5, 9))
    features, soft, hard = distributed_case()
    half = slice(4 * rank, 4 * rank + 4)
    DistillationLoss(temperature=2.0)(layer(features[half]), soft[half], hard[half]).backward()
    torch.save(layer.module.weight.grad, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_case() -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(1))
    return features, *random_case((8, 3, 9))[1:]


def test_distributed_data_parallel_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed_gradients, args=(str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    layer = nn.Linear(5, 9)
    features, soft, hard = distributed_case()
    DistillationLoss(temperature=2.0)(layer(features), soft, hard).backward()
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), layer.weight.grad)


def allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """(time, bytes taken or, negative, given back) of every allocation below the profiler's events."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


def peak_in_logits(loss: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    """The most that forward and backward had allocated at one time, the gradient included, as a multiple of the logits' own size."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(logits).backward()
    logits.grad = None
    changes = sorted(allocations(profile.profiler.kineto_results.experimental_event_tree()))
    return max(accumulate(size for _, size in changes)) / (logits.numel() * 4)


@pytest.mark.filterwarnings("ignore:Profiler clears events")
def test_memory_beside_input_and_gradient_is_below_one_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, soft, hard = random_case((1024, 8000))
    top, indices = soft.topk(20)
    sparse = SparseTargets(indices, top, 1 - top.sum(-1))
    assert peak_in_logits(lambda z: functional.cross_entropy(z, hard), logits) == pytest.approx(3.0, abs=0.05)  # two temporaries
    for target in (soft, sparse):
        assert peak_in_logits(lambda z, p=target: distillation_loss(z, p, hard, temperature=2.0), logits) < 1.4
    half = logits.detach().bfloat16().requires_grad_()
    for weight in (1.0, 0.3):  # of the float32 size; 1.5 if the gradient were kept in float32
        assert peak_in_logits(lambda z, w=weight: w * distillation_loss(z, soft, hard, temperature=2.0), half) < 0.9
    monkeypatch.setattr(losses, "CPU_BLOCK_ELEMENTS", logits.numel() // losses.NUM_BLOCKS)  # as on an accelerator
    for target in (soft, sparse):
        assert peak_in_logits(lambda z, p=target: distillation_loss(z, p, hard, temperature=2.0), logits) < 2


def test_the_gradient_of_bfloat16_logits_is_kept_in_bfloat16_and_rounded_once() -> None:
    """Of a mean over 1000 frames: had the sum's gradient been kept, a quarter of the entries would be off by a unit."""
    logits, soft, hard = random_case((1000, 3000))
    half = logits.detach().bfloat16().requires_grad_()
    exact = half.detach().float().requires_grad_()
    for z in (half, exact):
        distillation_loss(z, soft, hard, temperature=2.0).backward()
    gradient, expected = half.grad, exact.grad.bfloat16()
    assert (gradient == expected).float().mean() > 0.999
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=0)
    distillation_loss(exact, soft, hard, temperature=2.0).mul(0.3).backward()
    distillation_loss(half, soft, hard, temperature=2.0).mul(0.3).backward()
    torch.testing.assert_close(half.grad.float(), exact.grad, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("form", ["dense", "sparse", "sparse with tail"])
def test_gradients_made_beside_the_loss_are_those_of_autograd(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding with NaN, masked classes, half precision, several blocks, a second backward pass; autograd differentiates the plain form, as in a compiler."""
    logits, soft, hard = random_case((3, 6, 9))
    length = torch.tensor([1.0, 0.5, 0.7])
    with torch.no_grad():
        logits[..., 2], soft[..., 2] = -torch.inf, 0.0
        soft /= soft.sum(-1, keepdim=True)
        logits[1, 3:], soft[1, 3:] = torch.nan, torch.nan
    top, indices = soft.nan_to_num().topk(3)
    unlisted = (1 - top.sum(-1)) * (form == "sparse with tail")
    if form == "sparse with tail":  # a tail that reaches a masked class makes the loss infinite
        logits = logits.detach().masked_fill(logits == -torch.inf, -1.0).requires_grad_()
    target = soft if form == "dense" else SparseTargets(indices, top, unlisted if form == "sparse with tail" else None)
    monkeypatch.setattr(losses, "CPU_BLOCK_ELEMENTS", 4 * 9)
    for dtype, temperature, labels in ((torch.float32, 2.0, hard % 2), (torch.bfloat16, 1.0, hard % 2), (torch.float64, 0.7, None)):
        z = logits.detach().to(dtype).requires_grad_()
        for reduction in ("mean", "none"):
            found = []
            for plain in (False, True):
                with mock.patch("torch.compiler.is_compiling", return_value=plain):
                    loss = distillation_loss(z, target, labels, length, temperature=temperature, reduction=reduction, kl=True)
                weights = torch.linspace(-1, 2, loss.numel()).view_as(loss)
                if reduction == "none":
                    weights[1, 3:] = torch.nan  # padding again
                once = torch.autograd.grad(loss, z, weights, retain_graph=True)[0]
                torch.testing.assert_close(torch.autograd.grad(loss, z, weights)[0], once, rtol=0, atol=0)
                found.append((loss, once))
            for own, expected in zip(*found, strict=True):
                torch.testing.assert_close(own, expected)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    both = losses._losses_and_gradient
    monkeypatch.setattr(losses, "_losses_and_gradient", lambda *args: (made.append(1), both(*args))[1])
    logits, soft, hard = random_case((3, 9))
    loss = distillation_loss(logits, soft, hard, temperature=2.0)
    assert len(made) == 1
    loss.backward()
    assert len(made) == 1
    with torch.no_grad():
        distillation_loss(logits, soft, hard, temperature=2.0)
    distillation_loss(logits.detach(), soft, hard, temperature=2.0)
    assert len(made) == 1


def test_one_hot_targets_at_temperature_one_are_speechbrains_nll_loss() -> None:
    from speechbrain.nnet.losses import nll_loss

    logits, _, hard = random_case((3, 10, 6))
    length = torch.tensor([1.0, 0.5, 0.7])
    one_hot = functional.one_hot(hard, 6).float()
    for reduction in ("mean", "batch", "batchmean"):
        by_speechbrain = nll_loss(logits.log_softmax(-1), hard, length=length, reduction=reduction)
        torch.testing.assert_close(distillation_loss(logits, one_hot, length=length, temperature=1.0, hard_weight=0.0, reduction=reduction), by_speechbrain)


def fit(student: nn.Module, loss: Any, steps: int = 150) -> float:
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value.item()


def test_frame_posteriors_of_a_speechbrain_ctc_head() -> None:
    """Two teachers' CTC heads into one: the student's frame posteriors become their mean, and its CTC loss comes with them."""
    from speechbrain.nnet.activations import Softmax
    from speechbrain.nnet.containers import Sequential
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.losses import ctc_loss

    torch.manual_seed(0)
    features, wav_lens = torch.randn(3, 20, 8), torch.tensor([1.0, 0.6, 0.8])
    tokens, token_lens = torch.randint(1, 5, (3, 4)), torch.tensor([1.0, 0.5, 0.75])
    heads = [Sequential(Linear(n_neurons=5, input_size=8), Softmax(apply_log=True), input_shape=[None, None, 8]) for _ in range(3)]
    *teachers, student = heads
    with torch.no_grad():
        soft = average_teachers((teacher(features) for teacher in teachers), temperature=2.0)
    loss = DistillationLoss(temperature=2.0, kl=True)

    def both() -> Tensor:
        log_probs = student(features)
        return loss(log_probs, soft, length=wav_lens) + 0.0 * ctc_loss(log_probs, tokens, wav_lens, token_lens, blank_index=0)

    before = both().item()
    assert fit(student, both) < 0.02 * before
    valid = losses._valid_frames(features, wav_lens)
    assert (student(features).exp() - average_teachers(torch.stack([t(features) for t in teachers]), 1.0))[valid].abs().max() < 0.15


def test_token_posteriors_of_a_speechbrain_attention_decoder() -> None:
    """A seq2seq head: padding by token length, mean per token, hard targets with end-of-sentence."""
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.RNN import AttentionalRNNDecoder

    torch.manual_seed(0)
    encoded, wav_lens = torch.randn(2, 12, 6), torch.tensor([1.0, 0.75])
    embedded_with_bos = torch.randn(2, 5, 4)
    tokens_with_eos, token_lens = torch.randint(7, (2, 5)), torch.tensor([1.0, 0.6])
    decoder = AttentionalRNNDecoder("gru", "content", hidden_size=8, attn_dim=8, num_layers=1, enc_dim=6, input_size=4)
    head = Linear(n_neurons=7, input_size=8)
    soft = (torch.randn(2, 5, 7) / 2).softmax(-1)
    loss = DistillationLoss(temperature=2.0, hard_weight=0.5)
    logits = head(decoder(embedded_with_bos, encoded, wav_lens)[0])  # (B, U, 7)
    value = loss(logits, soft, tokens_with_eos, token_lens)
    tokens = torch.cat([logits[0], logits[1, :3]])  # the eight tokens that are not padding
    soft_term = functional.cross_entropy(tokens / 2, torch.cat([soft[0], soft[1, :3]]))
    hard_term = functional.cross_entropy(tokens, torch.cat([tokens_with_eos[0], tokens_with_eos[1, :3]]))
    torch.testing.assert_close(value, 4 * soft_term + 0.5 * hard_term)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_made_from_yaml() -> None:
    from hyperpyyaml import load_hyperpyyaml

    loss = load_hyperpyyaml("loss: !new:asr_kd.losses.DistillationLoss\n    temperature: 2\n    hard_weight: 0.5\n    reduction: batchmean")["loss"]
    assert repr(loss) == "DistillationLoss(temperature=2, hard_weight=0.5, reduction='batchmean', kl=False)"
    logits, soft, hard = random_case((2, 6, 9))
    assert loss(logits, soft, hard) == distillation_loss(logits, soft, hard, temperature=2, reduction="batchmean")


def test_documentation_runs() -> None:
    assert doctest.testmod(losses).failed == 0
    results = doctest.testfile(str(DOCS), module_relative=False)
    assert results.attempted > 10
    assert results.failed == 0


def test_losses_import_nothing_but_torch() -> None:
    source = Path(losses.__file__).read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported - sys.stdlib_module_names == {"torch"}


def test_the_kernels_are_not_imported_with_the_losses_nor_by_their_use_on_a_cpu() -> None:
    code = "import sys, torch; from asr_kd import losses; losses.DistillationLoss(2.0)(torch.zeros(1, 2), torch.full((1, 2), 0.5)); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "asr_kd.losses" in modules
    assert not {"asr_kd.fused_losses", "triton", "speechbrain"} & set(modules)
