"""How far ours and another computation of the same loss are apart, by value and by gradient."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import ranks
import torch
from case import Case

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES

SPANS = {"simsiam": 1.0}  # of losses that run through 0; others are their own measure


def ours(case: Case) -> Callable[..., Any]:
    module, name = case.loss.rsplit(".", 1)
    loss: Callable[..., Any] = getattr(import_module(module), name)
    return loss


def value_and_gradient(case: Case, loss: Callable[..., Any]) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient by the inputs that the case names, stacked."""
    inputs = case.inputs()
    for name in case.by:
        inputs[name].requires_grad_()
    value = ranks.scalar(loss(**inputs, **case.settings))
    value.backward()
    return value.item(), torch.stack([inputs[name].grad for name in case.by])


def apart(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> tuple[float, float]:
    """|difference| of the values, and the largest difference of the gradients over the largest gradient."""
    gradient = float((one[1] - other[1]).abs().max() / other[1].abs().max())
    return abs(one[0] - other[0]), gradient


def against(case: Case, oracle: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """Ours and another computation in this process."""
    return apart(value_and_gradient(case, ours(case)), value_and_gradient(case, oracle))


def two_processes(case: Case, sabotage: str | None = None) -> tuple[float, float]:
    """Two processes that hold half of the rows each, gradients averaged as DDP does, and one."""
    answers = ranks.on_two_ranks(
        ranks.loss_gradient, case.loss, case.inputs(), case.settings, case.by, sabotage, case.shared
    )
    gradients = torch.stack([torch.cat(parts) for parts in zip(*(answer[1] for answer in answers), strict=True)])
    return apart((answers[0][0], gradients), value_and_gradient(case, ours(case)))


def images(name: str, rows: int = 8) -> Batch:
    """Textured images, the views related, as the method takes them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(rows, 1, 32, 32, generator=generator)
    views = []
    for config in ranks.small_method(name).views(MODALITIES["xray"]):
        view = 4 * base - 2 + 0.2 * torch.randn(base.shape, generator=generator)
        side = round(config.scale * view.shape[-1])
        views.append(view[..., :side, :side].contiguous())
    ids = torch.arange(rows)
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def parameter_gradients(name: str) -> tuple[float, float]:
    """Two processes against one on a network without BatchNorm in float64: cosine, and ratio of the norms."""
    batch = images(name)
    batch.views = [view.double() for view in batch.views]
    expected = ranks.gradients(name, batch)
    (found, _) = ranks.on_two_ranks(ranks.parameter_gradient, name, batch)
    assert found.keys() == expected.keys()
    one, two = (torch.cat([each[key].flatten() for key in sorted(expected)]) for each in (expected, found))
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0)), float(two.norm() / one.norm())


def bf16(name: str) -> float:
    """The relative difference of the whole method's loss under bf16 autocast."""
    method, batch = ranks.small_method(name), images(name)
    exact = method.loss(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method.loss(batch)["loss"]
    assert rounded.dtype == torch.float32
    return abs(rounded.item() - exact.item()) / SPANS.get(name, abs(exact.item()))


def flat_is_finite(name: str, level: float) -> bool:
    """Whether loss and gradients are finite on images of one grey level."""
    method, batch = ranks.small_method(name), images(name)
    batch.views = [torch.full_like(view, level) for view in batch.views]
    loss = method.loss(batch)["loss"]
    loss.backward()
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return bool(torch.isfinite(loss)) and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
