"""The losses as formulas: values and gradients against derivations, finite differences and torch's own functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from asr_kd import losses
from asr_kd.losses import DistillationLoss, SparseTargets, average_teachers, distillation_loss, logit_matching_loss

B, T, C = 3, 5, 7
DOUBLE = torch.float64


def random_case(seed: int = 0, temperature: float = 2.0, classes: int = C) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits (B, T, C) with gradient, soft targets made at `temperature`, hard targets; float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, T, classes, generator=generator, dtype=DOUBLE)
    teacher = 3 * torch.randn(B, T, classes, generator=generator, dtype=DOUBLE)
    hard = torch.randint(classes, (B, T), generator=generator)
    return logits.requires_grad_(), (teacher / temperature).softmax(-1), hard


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def top_and_tail(probabilities: Tensor, k: int) -> SparseTargets:
    top, indices = probabilities.topk(k)
    return SparseTargets(indices, top, 1 - top.sum(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_value_and_gradient_are_those_of_the_paper(temperature: float) -> None:
    logits, soft, hard = random_case(temperature=temperature)
    loss = distillation_loss(logits, soft, hard, temperature=temperature, hard_weight=0.25)
    z = logits.detach()
    expected = 0.0
    for b in range(B):
        for t in range(T):
            q = [math.exp(v / temperature) for v in z[b, t].tolist()]
            expected += temperature**2 * sum(p * (math.log(sum(q)) - math.log(v)) for p, v in zip(soft[b, t].tolist(), q, strict=True))
            expected += 0.25 * (z[b, t].logsumexp(0) - z[b, t, hard[b, t]]).item()
    assert loss.item() == pytest.approx(expected / (B * T), rel=1e-12)
    # d/dz_i of T^2 * -sum_j p_j log q_j, with d log q_j / d z_i = ((i == j) - q_i) / T, is T * (q_i * sum_j p_j - p_i)
    by_hand = temperature * ((z / temperature).softmax(-1) - soft) + 0.25 * (z.softmax(-1) - functional.one_hot(hard, C))
    torch.testing.assert_close(gradient(loss, logits), by_hand / (B * T), rtol=0, atol=1e-15)


def targets_of_every_form(soft: Tensor) -> list[Tensor | SparseTargets]:
    sparse = top_and_tail(soft, 3)
    return [soft, sparse, sparse._replace(tail=None)]


@pytest.mark.parametrize("form", [0, 1, 2])
def test_first_and_second_derivative_by_finite_differences(form: int) -> None:
    logits, soft, hard = (t[:, :2] for t in random_case(temperature=3.0))
    target = targets_of_every_form(soft)[form]
    length = torch.tensor([1.0, 0.5, 1.0])

    def loss(z: Tensor) -> Tensor:
        return distillation_loss(z, target, hard, length, temperature=3.0, kl=True)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_blocks_change_nothing() -> None:
    logits, soft, hard = random_case()

    def value_and_gradient(target: Tensor | SparseTargets) -> tuple[Tensor, Tensor]:
        loss = distillation_loss(logits, target, hard, torch.tensor([1.0, 0.4, 0.6]), temperature=2.0)
        return loss, gradient(loss, logits)

    for target in targets_of_every_form(soft):
        whole = value_and_gradient(target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "CPU_BLOCK_ELEMENTS", 4 * C)  # four frames: a block with padding, blocks without, blocks of padding
            torch.testing.assert_close(value_and_gradient(target), whole)


def test_high_temperature_is_logit_matching() -> None:
    generator = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, 20, C, generator=generator, dtype=DOUBLE)
    z.requires_grad_()
    matching = logit_matching_loss(z, v)
    by_hand = (z - z.mean(-1, keepdim=True) - v + v.mean(-1, keepdim=True)) / C / len(z)
    torch.testing.assert_close(gradient(matching, z), by_hand.detach())

    def distance(temperature: float) -> tuple[float, float]:
        loss = distillation_loss(z, (v / temperature).softmax(-1), temperature=temperature, kl=True)
        return abs(loss.item() - matching.item()), (gradient(loss, z) - by_hand).norm().item()

    for at_100, at_200 in zip(distance(100), distance(200), strict=True):
        assert at_100 < 0.1
        assert at_200 / at_100 == pytest.approx(0.5, abs=0.03)  # first order in 1/T


def test_temperature_squared_keeps_the_ratio_of_soft_and_hard_gradients() -> None:
    logits, _, _ = random_case()
    teacher, _, hard = random_case(seed=1)

    def soft_norm(temperature: float) -> float:
        loss = distillation_loss(logits, (teacher.detach() / temperature).softmax(-1), temperature=temperature)
        return gradient(loss, logits).norm().item()

    def hard_norm(temperature: float) -> float:
        soft = (logits.detach() / temperature).softmax(-1)  # a perfect student: the soft gradient is 0
        return gradient(distillation_loss(logits, soft, hard, temperature=temperature), logits).norm().item()

    assert hard_norm(64.0) == pytest.approx(hard_norm(8.0), rel=1e-9)
    assert soft_norm(64.0) == pytest.approx(soft_norm(8.0), rel=0.1)  # without T^2 a factor of 64


@settings(deadline=None, max_examples=25)
@given(
    frames=st.lists(st.integers(1, T), min_size=B, max_size=B),
    reduction=st.sampled_from(losses.REDUCTIONS),
    form=st.integers(0, 2),
    filling=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]),
)
def test_padding_never_matters(frames: list[int], reduction: losses.Reduction, form: int, filling: float) -> None:
    logits, soft, hard = random_case()
    length = torch.tensor(frames) / T
    padding = torch.arange(T) >= torch.tensor(frames).unsqueeze(-1)

    def fill(t: Tensor) -> Tensor:
        return t.masked_fill(padding if t.dim() == 2 else padding.unsqueeze(-1), filling if t.is_floating_point() else 10**6)

    clean = targets_of_every_form(soft)[form]
    dirty = fill(clean) if isinstance(clean, Tensor) else clean.map(fill)
    padded = fill(logits.detach()).requires_grad_()
    expected = distillation_loss(logits, clean, hard, length, temperature=2.0, reduction=reduction)
    loss = distillation_loss(padded, dirty, fill(hard), length, temperature=2.0, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    found = gradient(loss.sum(), padded)
    torch.testing.assert_close(found, gradient(expected.sum(), logits), rtol=0, atol=0)
    assert (found[padding] == 0).all()


def test_reductions_by_utterances_cut_by_hand() -> None:
    logits, soft, hard = random_case()
    frames = [5, 2, 3]
    length = torch.tensor(frames) / T

    def loss(reduction: losses.Reduction) -> Tensor:
        return distillation_loss(logits, soft, hard, length, temperature=2.0, reduction=reduction)

    sums = torch.stack([distillation_loss(logits[b, :n], soft[b, :n], hard[b, :n], temperature=2.0, reduction="sum") for b, n in enumerate(frames)])
    torch.testing.assert_close(loss("sum"), sums.sum())
    torch.testing.assert_close(loss("mean"), sums.sum() / 10)
    torch.testing.assert_close(loss("batchmean"), sums.sum() / B)
    torch.testing.assert_close(loss("batch"), sums / torch.tensor(frames))
    torch.testing.assert_close(loss("none").sum(1), sums)
    assert loss("none").shape == (B, T)
    rows = distillation_loss(logits[0], soft[0], temperature=2.0, reduction="batch")
    torch.testing.assert_close(rows, distillation_loss(logits[0], soft[0], temperature=2.0, reduction="none"))


def test_the_shortest_length_is_one_frame() -> None:
    logits, soft, hard = random_case()
    loss = distillation_loss(logits, soft, hard, torch.full((B,), 1e-5), temperature=2.0)
    torch.testing.assert_close(loss, distillation_loss(logits[:, :1], soft[:, :1], hard[:, :1], temperature=2.0))


def test_lengths_kept_in_float32_mean_whole_frames() -> None:
    for num_frames in (7, 100, 1601):
        logits = torch.zeros(num_frames, num_frames, 2)
        length = torch.arange(1, num_frames + 1).float() / num_frames
        valid = losses._valid_frames(logits, length)
        assert valid is not None
        assert valid.sum(1).tolist() == list(range(1, num_frames + 1))


def test_mean_of_posteriors_and_of_logits() -> None:
    # two teachers at T = 2: softmax([0, 2 log 3] / 2) = [1/4, 3/4], softmax([2 log 9, 0] / 2) = [9/10, 1/10]
    logits = torch.tensor([[0.0, 2 * math.log(3)], [2 * math.log(9), 0.0]], dtype=DOUBLE)
    arithmetic = average_teachers(logits, 2.0)
    torch.testing.assert_close(arithmetic, torch.tensor([0.575, 0.425], dtype=DOUBLE))
    geometric = average_teachers(logits, 2.0, mean="geometric")  # sqrt(1/4 * 9/10) : sqrt(3/4 * 1/10) = sqrt(3) : 1
    torch.testing.assert_close(geometric, torch.tensor([math.sqrt(3), 1.0], dtype=DOUBLE) / (1 + math.sqrt(3)))
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(10, 4, C, generator=generator)
    torch.testing.assert_close(average_teachers(many, 3.0), (many / 3).softmax(-1).mean(0))
    torch.testing.assert_close(average_teachers(iter(many.unbind()), 3.0, "geometric"), (many / 3).log_softmax(-1).mean(0).softmax(-1))
    torch.testing.assert_close(average_teachers(many.log_softmax(-1), 3.0), average_teachers(many, 3.0))
    assert average_teachers(many.half(), 2.0).dtype == torch.float32


@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, C), kl=st.booleans(), labelled=st.booleans(), temperature=st.sampled_from([1.0, 2.0, 7.0]))
def test_sparse_targets_equal_their_dense_form(k: int, kl: bool, labelled: bool, temperature: float) -> None:
    logits, soft, hard = random_case(temperature=temperature)
    sparse = top_and_tail(soft, k)
    sparse = sparse._replace(tail=sparse.tail.clamp(min=0)) if sparse.tail is not None else sparse
    dense = sparse.dense(C)
    torch.testing.assert_close(dense.sum(-1), torch.ones(B, T, dtype=DOUBLE))
    a, b = (distillation_loss(logits, target, hard if labelled else None, temperature=temperature, kl=kl) for target in (sparse, dense))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradient(a, logits), gradient(b, logits))


def test_a_sampled_tail_is_right_in_expectation() -> None:
    """The two largest classes kept, eight draws of the others that carry their mass; repeated classes add up."""
    logits, soft, _ = random_case(temperature=4.0, classes=20)
    top, kept = soft.topk(2)
    others = soft.scatter(-1, kept, 0.0).flatten(0, 1)  # (B * T, C)
    generator = torch.Generator().manual_seed(0)
    rounds, draws = 2000, 8
    drawn = torch.multinomial(others.repeat(rounds, 1), draws, replacement=True, generator=generator).view(rounds * B, T, draws)
    share = (others.sum(-1) / draws).view(B, T, 1).expand(B, T, draws)
    indices = torch.cat([kept.repeat(rounds, 1, 1), drawn], -1)
    sparse = SparseTargets(indices, torch.cat([top, share], -1).repeat(rounds, 1, 1), torch.zeros(rounds * B, T))
    values = distillation_loss(logits.detach().repeat(rounds, 1, 1), sparse, temperature=4.0, reduction="none").view(rounds, B, T)
    exact = distillation_loss(logits, soft, temperature=4.0, reduction="none")
    mean, deviation = values.mean(0), values.std(0)
    assert (deviation > 0).all()
    assert ((mean - exact).abs() < 4.5 * deviation / rounds**0.5).all()
    truncated = distillation_loss(logits, SparseTargets(kept, top / top.sum(-1, keepdim=True)), temperature=4.0, reduction="none")
    assert ((truncated - exact).abs() > 4.5 * deviation / rounds**0.5).float().mean() > 0.8  # plain top-k is biased


def test_kl_divergence_agrees_with_torch_and_reaches_zero() -> None:
    logits, soft, _ = random_case()
    frames, targets = logits.flatten(0, 1), soft.flatten(0, 1)
    by_torch = functional.kl_div((frames / 2).log_softmax(-1), targets, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(frames, targets, temperature=2.0, kl=True), 4 * by_torch)
    entropy = torch.special.entr(targets).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(frames, targets, temperature=2.0), 4 * (by_torch + entropy))
    assert distillation_loss(2 * soft.log(), soft, temperature=2.0, kl=True).abs().item() < 1e-14
    estimates = torch.tensor([[0.75, 0.5, -0.25] + [0.0] * (C - 3)], dtype=DOUBLE)  # negative entries have no entropy
    entropy = -0.75 * math.log(0.75) - 0.5 * math.log(0.5)
    assert distillation_loss(torch.zeros(1, C, dtype=DOUBLE), estimates, temperature=1.0, kl=True).item() == pytest.approx(math.log(C) - entropy)
    one_hot = functional.one_hot(torch.tensor([2]), C).double()
    assert distillation_loss(torch.zeros(1, C, dtype=DOUBLE), one_hot, temperature=1.0, kl=True).item() == pytest.approx(math.log(C))


def test_log_probabilities_serve_as_logits() -> None:
    logits, soft, hard = random_case()
    a, b = (distillation_loss(z, soft, hard, temperature=2.0) for z in (logits, logits.log_softmax(-1)))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradient(a, logits), gradient(b, logits))


def test_no_labels_means_no_hard_term() -> None:
    logits, soft, hard = random_case()
    assert distillation_loss(logits, soft, temperature=2.0) == distillation_loss(logits, soft, hard, temperature=2.0, hard_weight=0.0)


def test_soft_targets_are_constants() -> None:
    logits, soft, _ = random_case()
    distillation_loss(logits, soft.requires_grad_(), temperature=2.0).backward()
    assert soft.grad is None


@pytest.mark.parametrize("form", [0, 1, 2])
def test_masked_classes_on_both_sides(form: int) -> None:
    logits, soft, _ = random_case()
    masked = logits.detach().clone()
    masked[..., 0] = -math.inf
    teacher = soft.log()
    teacher[..., 0] = -math.inf
    target: Tensor | SparseTargets = average_teachers(2 * teacher.unsqueeze(0), 2.0)
    assert isinstance(target, Tensor)
    if form:
        top, indices = target.topk(C)
        target = SparseTargets(indices, top, torch.zeros(B, T) if form == 1 else None)
    masked.requires_grad_()
    hard = torch.ones(B, T, dtype=torch.long)
    loss = distillation_loss(masked, target, hard, temperature=2.0)
    dense = target if isinstance(target, Tensor) else target.dense(C)
    without = distillation_loss(masked[..., 1:], dense[..., 1:], hard - 1, temperature=2.0)
    torch.testing.assert_close(loss, without)
    found = gradient(loss, masked)
    assert (found[..., 0] == 0).all()
    torch.testing.assert_close(found, gradient(without, masked))
    second = torch.autograd.grad(gradient_with_graph(masked, target).square().sum(), masked)[0]
    assert second.isfinite().all()


def gradient_with_graph(logits: Tensor, target: Tensor | SparseTargets) -> Tensor:
    return torch.autograd.grad(distillation_loss(logits, target, temperature=2.0), logits, create_graph=True)[0]


def test_logit_matching_leaves_padding_and_masked_classes_out() -> None:
    logits, _, _ = random_case()
    teacher = random_case(seed=3)[0].detach()
    length = torch.tensor([5, 2, 3]) / T
    masked_student, masked_teacher = logits.detach().clone(), teacher.clone()
    for z in (masked_student, masked_teacher):
        z[..., 0] = -math.inf
        z[1, 2:] = math.nan
    masked_student.requires_grad_()
    loss = logit_matching_loss(masked_student, masked_teacher, length)
    expected = logit_matching_loss(logits[..., 1:], teacher[..., 1:], length)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, masked_student), gradient(expected, logits))


def test_nan_in_a_valid_frame_is_seen() -> None:
    logits, soft, _ = random_case()
    logits = logits.detach()
    logits[1, 1, 3] = math.nan
    assert distillation_loss(logits, soft, temperature=2.0).isnan()


def test_lengths_may_differ_by_what_is_allowed() -> None:
    logits, soft, hard = random_case()
    loss = DistillationLoss(2.0, allowed_len_diff=2)
    expected = distillation_loss(logits[:, :3], soft[:, :3], hard[:, :3], temperature=2.0)
    assert loss(logits, soft[:, :3], hard[:, :4]) == expected
    assert loss(logits[:, :3], top_and_tail(soft, 6), hard).item() == pytest.approx(
        distillation_loss(logits[:, :3], top_and_tail(soft[:, :3], 6), hard[:, :3], temperature=2.0).item()
    )


SOFT, HARD = torch.full((B, T, C), 1 / C), torch.zeros(B, T, dtype=torch.long)
INDICES, LISTED, TAIL = HARD.unsqueeze(-1), torch.ones(B, T, 1), torch.zeros(B, T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number > 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "2"}, "temperature is '2'; expected a finite number > 0"),
        ({"hard_weight": None}, "hard_weight is None; expected a finite number >= 0"),
        ({"soft_targets": SOFT.numpy()}, "soft targets are ndarray; expected a torch.Tensor or SparseTargets"),
        ({"temperature": 1e-38}, "temperature is 1e-38; expected a finite number > 0, at least 1e-20"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"hard_weight": -0.5}, "hard_weight is -0.5; expected a finite number >= 0"),
        ({"reduction": "average"}, "reduction is 'average'; expected one of mean, sum, batch, batchmean, none"),
        ({"logits": torch.zeros(C)}, r"logits are torch.float32 \(7,\); expected floats \(B, T, C\) or \(N, C\)"),
        ({"logits": HARD}, r"logits are torch.int64 \(3, 5\)"),
        ({"soft_targets": SOFT[..., :6]}, r"soft targets are \(3, 5, 6\); expected 3 axes with 7 classes"),
        ({"soft_targets": SOFT[:, 0]}, r"soft targets are \(3, 7\); expected 3 axes"),
        ({"soft_targets": SOFT[:2]}, "soft targets hold 2 utterances, logits 3"),
        ({"soft_targets": SOFT[:, :4]}, "frames differ: 5 in logits, 4 in soft targets, 5 in hard targets; allowed_len_diff is 0; make the targets anew"),
        ({"soft_targets": SOFT[:, :2], "allowed_len_diff": 2}, "5 in logits, 2 in soft targets, 5 in hard targets; allowed_len_diff is 2"),
        ({"hard_targets": HARD[:, :4]}, "frames differ: 5 in logits, 5 in soft targets, 4 in hard targets"),
        ({"hard_targets": HARD[:1]}, "hard targets hold 1 utterances, logits 3"),
        ({"hard_targets": SOFT}, r"hard targets are torch.float32 \(3, 5, 7\); expected class ids"),
        ({"hard_targets": HARD == 0}, r"hard targets are torch.bool \(3, 5\); expected class ids"),
        ({"hard_targets": HARD + 7}, "hard targets hold class ids 7 to 7; expected 0 to 6"),
        ({"hard_targets": HARD - 100}, "hard targets hold class ids -100 to -100"),
        ({"length": torch.ones(2)}, r"length is \(2,\) for logits \(3, 5, 7\)"),
        ({"length": torch.tensor([5, 2, 3])}, r"length holds 2 to 5; expected relative lengths in \(0, 1\], not frames"),
        ({"length": torch.tensor([0.0, 1.0, 1.0])}, "length holds 0 to 1"),
        ({"soft_targets": SOFT.log()}, r"soft targets of frame 0 of 15 sum to -13\.\d+; expected probabilities"),
        ({"soft_targets": SOFT * math.nan}, "sum to nan"),
        ({"soft_targets": SOFT / 2}, r"soft targets of frame 0 of 15 sum to 0\.5; expected probabilities"),
        ({"soft_targets": SparseTargets(INDICES, LISTED * math.nan, TAIL)}, "soft targets of frame 0 of 15 sum to nan"),
        ({"soft_targets": SparseTargets(INDICES, LISTED, TAIL + 2)}, "soft targets of frame 0 of 15 sum to 3; expected probabilities"),
        ({"soft_targets": SparseTargets(INDICES, LISTED + 3, TAIL)}, "soft targets of frame 0 of 15 sum to 4; expected probabilities"),
        ({"soft_targets": SparseTargets(INDICES + 7, LISTED, TAIL)}, "sparse indices hold class ids 7 to 7; expected 0 to 6"),
        ({"soft_targets": SparseTargets(LISTED, LISTED, TAIL)}, r"sparse indices are torch.float32 \(3, 5, 1\)"),
        ({"soft_targets": SparseTargets(HARD, LISTED, TAIL)}, r"sparse indices are torch.int64 \(3, 5\); expected class ids with 3 axes"),
        ({"soft_targets": SparseTargets(INDICES, LISTED, LISTED)}, r"sparse targets do not fit: indices \(3, 5, 1\), .* tail \(3, 5, 1\)"),
        ({"soft_targets": SparseTargets(INDICES[:, :4], LISTED[:, :4], TAIL[:, :4])}, "5 in logits, 4 in sparse targets"),
    ],
)
def test_errors_say_what_was_got_and_expected(changes: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(B, T, C), "soft_targets": SOFT, "hard_targets": HARD, "temperature": 2.0} | changes
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments)


def test_errors_of_the_other_functions() -> None:
    with pytest.raises(ValueError, match="temperature is -1"):
        DistillationLoss(-1)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        DistillationLoss(1, reduction="avg")
    with pytest.raises(ValueError, match="no teachers to average"):
        average_teachers([], 1.0)
    with pytest.raises(ValueError, match="mean is 'median'"):
        average_teachers(SOFT, 1.0, mean="median")
    with pytest.raises(ValueError, match="5 in logits, 4 in soft targets"):
        logit_matching_loss(SOFT, SOFT[:, :4])
    with pytest.raises(ValueError, match=r"length is \(1,\) for logits \(5, 7\)"):
        distillation_loss(SOFT[0], SOFT[0], length=torch.ones(1), temperature=1.0)
