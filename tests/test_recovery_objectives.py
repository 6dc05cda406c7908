"""The objectives of recovery against plain references with full logits and autograd."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from foldgpt.objectives import (
    Divergence,
    DivergenceLoss,
    Head,
    ReducedPredictions,
    Teaching,
    compare_products,
    cosine_distance,
    divergence,
    forward_kl,
    fused_logit_losses,
    product_rows,
    relative_error,
)
from models import head_of, tiny_model

ROWS, VOCABULARY = 7, 128


def plain_divergence(kind: Divergence, teacher: Tensor, student: Tensor, tau: float, skew: float) -> Tensor:
    """The summed divergence as one would write it down."""
    log_p, log_q = (teacher / tau).log_softmax(-1), (student / tau).log_softmax(-1)
    if kind == "forward":
        value = kl_div(log_q, log_p, log_target=True, reduction="sum")
    elif kind == "reverse":
        value = kl_div(log_p, log_q, log_target=True, reduction="sum")
    else:
        mixture = (skew * log_p.exp() + (1 - skew) * log_q.exp()).log()
        value = kl_div(mixture, log_p, log_target=True, reduction="sum")
    return value * tau**2


@pytest.mark.parametrize("kind", ["forward", "reverse", "skewed"])
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_each_divergence_has_the_value_and_gradient_of_autograd(kind: Divergence, tau: float) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, ROWS, VOCABULARY, dtype=torch.float64) * 3
    student.requires_grad_()
    expected = plain_divergence(kind, teacher, student, tau, 0.3)
    (gradient,) = torch.autograd.grad(expected, student)
    values, written = DivergenceLoss(kind, tau, 0.3)(teacher.clone(), student.detach().clone())
    torch.testing.assert_close(values.sum(), expected.detach())
    torch.testing.assert_close(written, gradient)


@pytest.mark.parametrize("kind", ["forward", "reverse", "skewed"])
def test_certain_models_that_disagree_give_finite_gradients(kind: Divergence) -> None:
    teacher, student = torch.zeros(2, 1, VOCABULARY)
    teacher[0, 1], student[0, 2] = 300.0, 300.0
    values, gradients = DivergenceLoss(kind)(teacher, student)
    assert bool(values.isfinite().all()) and bool(gradients.isfinite().all())


def comparison(how: str) -> Any:
    """As it is, or as a compiler sees it."""
    torch._dynamo.reset()
    return compare_products if how == "plainly" else torch.compile(compare_products, backend="aot_eager")


@pytest.mark.parametrize("how", ["plainly", "traced"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(("kind", "tau"), [("reverse", 2.0), ("forward", 2.0), ("forward", 1.0)])
def test_the_fused_losses_are_those_of_full_logits(
    family: str, how: str, kind: Divergence, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft-capping and factors of the head included, with chunks that do not divide the rows."""
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    compare = comparison(how)
    teacher, student = tiny_model(family, seed=0).double(), tiny_model(family, seed=1).double()
    teacher_head, student_head = Head(teacher), Head(student)
    # Head gives logits in fp32.
    states = torch.randn(2, ROWS, 32, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    hidden = states[1].clone().requires_grad_()
    logits = student_head.logits(hidden)
    expected_kl = plain_divergence(kind, teacher_head.logits(states[0]), logits, tau, 0.1)
    expected_lm = cross_entropy(logits, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(0.5 * expected_kl + 3 * expected_lm, hidden)

    fresh = states[1].clone().requires_grad_()
    total, kl, lm = fused_logit_losses(
        student_head,
        fresh,
        targets,
        teacher=(teacher_head, states[0]),
        divergence=DivergenceLoss(kind, temperature=tau),
        divergence_weight=0.5,
        lm_weight=3,
        compare=compare,
    )
    (3 * total).backward()  # as a division by the number of scored positions does
    assert float(kl) == pytest.approx(float(expected_kl), rel=1e-5)
    assert float(lm) == pytest.approx(float(expected_lm), rel=1e-5)
    assert float(total) == pytest.approx(float(0.5 * expected_kl + 3 * expected_lm), rel=1e-5)
    torch.testing.assert_close(fresh.grad, 3 * expected_gradient, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("how", ["plainly", "traced"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_reduced_predictions_teach_what_the_teachers_logits_do(
    family: str, tau: float, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor and a bias of the head included, more tokens than are kept one by one, and rows in chunks."""
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    compare = comparison(how)
    model = tiny_model(family).requires_grad_(False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
    head, (teacher, student) = Head(model), 3 * torch.randn(2, ROWS, 32)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    reduced = ReducedPredictions.of(head, teacher, tau)
    found = []
    for teaching in ((head, teacher), reduced):
        hidden = student.clone().requires_grad_()
        kind = DivergenceLoss("forward", tau)
        total, kl, lm = fused_logit_losses(
            head,
            hidden,
            targets,
            teacher=teaching,
            divergence=kind,
            divergence_weight=0.7,
            lm_weight=0.5,
            compare=compare,
        )
        (2 * total).backward()
        found.append((total.detach(), kl, lm, hidden.grad))
    assert float(found[0][1]) > 0.1
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=2e-5)
    # Of the teacher itself there is nothing to learn.
    assert float(reduced.kl_with_gradient(head.logits(teacher), teacher)[0].abs().max()) < 1e-4


def test_in_bf16_reduced_predictions_teach_as_well_as_logits_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector is rounded as well, as in a file, and the head widened in parts that do not divide it."""
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 4 * 128 * 1000)
    torch.manual_seed(0)
    weight = (0.12 * torch.randn(4096, 128)).bfloat16()
    # Each row likes one token, as a language model does.
    teacher = (3 * torch.randn(256, 128) + weight[torch.randint(4096, (256,))].float() / 0.12).bfloat16()
    student = teacher + 0.5 * torch.randn(256, 128).bfloat16()
    rounded, exact = head_of(weight), head_of(weight.float())

    def gradient(head: Head, states: Tensor, teaching: Teaching) -> Tensor:
        hidden = states.clone().requires_grad_()
        targets = torch.zeros(len(states), dtype=torch.int64)
        fused_logit_losses(head, hidden, targets, teacher=teaching, divergence=DivergenceLoss())[0].backward()
        assert hidden.grad is not None
        return hidden.grad.float()

    expected = gradient(exact, student.float(), (exact, teacher.float()))
    reduced = ReducedPredictions.of(rounded, teacher, dtype=torch.bfloat16)
    errors = [
        float((gradient(rounded, student, teaching) - expected).norm() / expected.norm())
        for teaching in ((rounded, teacher), reduced)
    ]
    assert errors[1] < 1.1 * errors[0] < 0.1
    # The same of values; and of the teacher itself there is nothing to learn.
    assert float(reduced.kl(rounded.logits(teacher), teacher).abs().max()) < 1e-5
    exact_R = forward_kl(exact, teacher.float(), student.float())
    of_logits = (forward_kl(rounded, teacher, student) - exact_R).std()
    assert float((reduced.kl(rounded.logits(student), student) - exact_R).std()) < 1.2 * float(of_logits)


def test_other_divergences_cannot_be_told_from_reduced_predictions() -> None:
    head, states = Head(tiny_model("llama")), torch.randn(ROWS, 32)
    reduced, targets = ReducedPredictions.of(head, states), torch.zeros(ROWS, dtype=torch.int64)
    for kind in ("reverse", "skewed"):
        with pytest.raises(ValueError, match=f"the {kind} divergence cannot be told"):
            fused_logit_losses(head, states, targets, teacher=reduced, divergence=DivergenceLoss(kind))
    with pytest.raises(ValueError, match=r"reduced at temperature 1\.0, not 2\.0"):
        fused_logit_losses(head, states, targets, teacher=reduced, divergence=DivergenceLoss(temperature=2.0))


def test_mixed_precision_of_fsdp_does_not_round_reduced_predictions() -> None:
    """It goes through what the forward pass is given, dataclasses included."""
    reduced = ReducedPredictions.of(Head(tiny_model("llama")), torch.randn(ROWS, 32))

    @dataclasses.dataclass
    class Found:
        p_RK: Tensor

    given = [reduced, Found(reduced.p_RK)]
    kept, rounded = _apply_to_tensors(lambda tensor: tensor.bfloat16(), given)
    assert kept.p_RK.dtype == torch.float32 and rounded.p_RK.dtype == torch.bfloat16


def test_heads_are_told_apart() -> None:
    llama, other = Head(tiny_model("llama")), Head(tiny_model("llama", seed=1))
    assert llama.is_linear_as(Head(tiny_model("llama"))) and not llama.is_linear_as(other)
    assert not llama.is_linear_as(Head(tiny_model("llama").bfloat16()))
    biased: Any = tiny_model("llama")
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    assert not llama.is_linear_as(Head(biased)) and Head(biased).is_linear_as(Head(biased))
    capped = Head(tiny_model("gemma2"))
    assert not capped.is_linear_as(capped)


def test_no_table_of_all_rows_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is asked for a chunk at a time, in training as well."""
    model = tiny_model("llama")
    head = Head(model)
    sizes = []
    product = head.product
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 4 * VOCABULARY * 2)
    monkeypatch.setattr(head, "product", lambda hidden: sizes.append(len(hidden)) or product(hidden))
    states = torch.randn(ROWS, 32, requires_grad=True)
    fused_logit_losses(head, states, torch.zeros(ROWS, dtype=torch.int64), lm_weight=1.0)[0].backward()
    assert max(sizes) == 2 and sum(sizes) == ROWS
    # Both heads, where two models are compared.
    teacher_head = Head(tiny_model("llama", seed=1))
    teachers, theirs = [], teacher_head.product
    monkeypatch.setattr(teacher_head, "product", lambda hidden: teachers.append(len(hidden)) or theirs(hidden))
    others = torch.randn(ROWS, 32)
    fused_logit_losses(
        head,
        states,
        torch.zeros(ROWS, dtype=torch.int64),
        teacher=(teacher_head, others),
        divergence=DivergenceLoss("forward", 1.0, 0.1),
    )[0].backward()
    assert max(teachers) == 2 and sum(teachers) == ROWS
    for seen in (sizes, teachers):
        seen.clear()
    forward_kl(teacher_head, others, states.detach(), student_head=head)
    assert max(sizes) <= 2 and max(teachers) <= 2 and sum(sizes) == sum(teachers) == ROWS


def test_hidden_losses_count_each_token_alike() -> None:
    teacher, student = torch.randn(2, ROWS, 16)
    expected = torch.stack([mse_loss(s, t) / t.square().mean() for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(relative_error(teacher, student), expected)
    scale = torch.logspace(-2, 3, ROWS)[:, None]  # a token of massive activations
    torch.testing.assert_close(relative_error(teacher * scale, student * scale), expected)
    cosines = torch.stack([s @ t / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(cosine_distance(teacher, student), 1 - cosines)
    assert relative_error(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32
    # In 16 bits the cosine of two states that are nearly alike is 1.
    near = (teacher + 0.02 * student).bfloat16(), teacher.bfloat16()
    torch.testing.assert_close(
        cosine_distance(*near).double(), cosine_distance(*(states.double() for states in near)), rtol=1e-2, atol=1e-7
    )


@pytest.mark.parametrize(("kl", "lm"), [(0.7, 0.0), (0.0, 0.5), (0.7, 0.5)])
def test_losses_for_a_compiler_are_the_others(kl: float, lm: float) -> None:
    """Each by itself and both, where models are certain and disagree as well, in chunks that do not divide the rows."""
    model = tiny_model("llama").bfloat16()
    head = Head(model)
    teacher, student = (30 * torch.randn(2, ROWS, 32)).bfloat16()
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    found = []
    for compare, rows in ((compare_products, None), (comparison("traced"), 3)):
        hidden = student.clone().requires_grad_()
        total, *parts = fused_logit_losses(
            head,
            hidden,
            targets,
            teacher=(head, teacher) if kl else None,
            divergence=DivergenceLoss() if kl else None,
            divergence_weight=kl,
            lm_weight=lm,
            compare=compare,
            rows=rows,
        )
        total.backward()
        assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
        found.append((total.detach(), *parts, hidden.grad))
    torch.testing.assert_close(found[1][:3], found[0][:3], rtol=1e-5, atol=1e-5)
    # A gradient of bf16 products.
    torch.testing.assert_close(found[1][3], found[0][3], rtol=2e-2, atol=1e-4)


def test_as_many_rows_are_compared_as_their_products_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(tiny_model("llama"))
    monkeypatch.setattr(divergence, "PRODUCT_BYTES", 4 * VOCABULARY * 9)
    assert product_rows(head) == 8
    assert product_rows(Head(tiny_model("llama").bfloat16())) == 16
    monkeypatch.setattr(divergence, "PRODUCT_BYTES", 1)
    assert product_rows(head) == 1
