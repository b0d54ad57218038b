"""What every entry of HEADS must do, with every kind of target that it learns."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from sslmed import recipe
from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.evaluation import detections, overlap
from sslmed.evaluation.metrics import METRICS
from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.models import boxes
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig
from sslmed.training.trainer import TrainConfig, build_trainer

EVERY = [(name, kind) for name, head in HEADS.items() for kind in head.kinds]
every_head = pytest.mark.parametrize(("name", "kind"), EVERY)
CLASSES, SIDE, SCANS = 3, 32, 8
VOID = 255
SETTINGS = {"frozen": 2, "probe_steps": 3, "layer_decay": 0.7, "ema": 0.99}  # every head has them


def small(name: str, kind: str, network: str = "test_resnet", seed: int = 0, **settings: object) -> Head:
    """A tiny head; its last layer moved from zero, so that what comes before it has a gradient at once."""
    torch.manual_seed(seed)
    chosen = HEADS[name]
    head = chosen(chosen.Config(**settings), build(BackboneConfig(name=network), SIDE, 0), CLASSES, kind)
    with torch.no_grad():
        for parameter in head.head.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    return head


def batch_of(kind: str) -> Batch:
    """Eight images that show their target, if faintly: a column is brighter, or a square is."""
    stream = torch.Generator().manual_seed(0)
    images = torch.randn(SCANS, 1, SIDE, SIDE, generator=stream)
    number = torch.arange(SCANS) % CLASSES
    if kind == "class":
        target = number
    elif kind == "findings":
        target = torch.stack([number == 1, number == 2, number > 0], dim=1).long()
        target[0, 2] = -1
    elif kind == "boxes":
        target = torch.tensor([[[0.0, 0.0, 0.0, 0.0, -1.0]] * 2] * SCANS)
        for at in range(1, SCANS):  # the first image has none
            left, top, width, height = 2 + at, 12 - at, 12, 10 + at
            target[at, 0] = torch.tensor([left, top, left + width, top + height, number[at]])
            images[at, 0, top : top + height, left : left + width] += 2.0 * (1 + number[at])
    else:
        target = torch.zeros(SCANS, SIDE, SIDE, dtype=torch.int64)
        for image, mask, which in zip(images, target, number.tolist(), strict=True):
            mask[8:24, 8:24] = which
            image[0] += 2.0 * mask
            mask[:2] = VOID
    ids = torch.arange(SCANS)
    return Batch([images], target, ids, ids, seed=0, epoch=0)


def outputs(head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and probabilities, or boxes, of the eight images, in evaluation mode."""
    features = head.eval().features(batch_of(head.kind).views[0])
    return head.logits(features), head.predict(features)


def train(
    head: Head, steps: int, callbacks: Sequence[pl.Callback] = (), **optim: Any
) -> tuple[pl.Trainer, dict[str, torch.Tensor]]:
    """Through Lightning, the same batch in every step; and the backbone's tensors from before."""
    before = {key: value.clone() for key, value in head.backbone.state_dict().items()}
    trainer = build_trainer(TrainConfig(max_steps=steps, precision=32, devices="cpu"), steps, callbacks)
    head.prepare(OptimConfig(**({"lr": 1e-2, "warmup": 0} | optim)), SCANS, steps, 1)
    trainer.fit(
        head.train(), DataLoader([batch_of(head.kind)] * steps, batch_size=None, collate_fn=lambda batch: batch)
    )
    return trainer, before


def never(name: str, kind: str) -> set[str]:
    """Names of the backbone's parameters that the head never reaches, by its own word."""
    return {key.removeprefix("backbone.") for key in small(name, kind).without_gradient}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are no longer the same, bit for bit."""
    return {key for key in before if not torch.equal(before[key], after[key])}


@every_head
@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_logits_and_probabilities(name: str, kind: str, network: str) -> None:
    head = small(name, kind, network)
    logits, scores = outputs(head)
    if kind == "boxes":
        places = sum((SIDE // each) ** 2 for each in (4, 8, 16, 32))
        assert logits.shape == (SCANS, places, CLASSES)
        assert scores.shape == (SCANS, head.config.detections, 6)
        check_boxes(head, scores)
        return
    assert logits.shape == scores.shape == ((SCANS, CLASSES, SIDE, SIDE) if kind == "mask" else (SCANS, CLASSES))
    assert ((scores >= 0) & (scores <= 1)).all()
    if kind != "findings":
        torch.testing.assert_close(scores.sum(dim=1), torch.ones_like(scores[:, 0]))
    assert torch.equal(head(batch_of(kind).views[0]), scores)
    head.temperature = 2.0
    softer = outputs(head)[1]
    torch.testing.assert_close(softer, (logits / 2).sigmoid() if kind == "findings" else (logits / 2).softmax(dim=1))


def check_boxes(head: Head, found: torch.Tensor) -> None:
    """Within the input, by falling score, then what is no box; and how calibration changes the scores alone."""
    there = found[..., 5] >= 0
    assert there.any()
    assert (found[~there] == torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0])).all()
    assert ((found[..., :4] >= 0) & (found[..., :4] <= SIDE)).all()
    assert (found[..., 2:4] > found[..., :2])[there].all()
    assert set(found[..., 5][there].tolist()) <= set(map(float, range(CLASSES)))
    score = found[..., 4]
    assert ((score > 0) & (score < 1))[there].all()
    assert (score[:, 1:] <= score[:, :-1]).all()
    assert torch.equal(head(batch_of("boxes").views[0]), found)
    head.temperature, head.offset = 2.0, -0.5
    calibrated = outputs(head)[1]
    expected = torch.where(there, (score.logit() / 2 - 0.5).sigmoid(), 0)
    torch.testing.assert_close(calibrated[..., 4], expected)
    assert torch.equal(calibrated[..., [0, 1, 2, 3, 5]], found[..., [0, 1, 2, 3, 5]])


@every_head
def test_it_overfits_eight_images(name: str, kind: str) -> None:
    head, batch = small(name, kind).train(), batch_of(kind)
    optimizer = torch.optim.AdamW(head.parameter_groups(0.0), lr=3e-3)
    losses = []
    for _ in range(80 if kind == "boxes" else 60):
        loss = head.loss(head.features(batch.views[0]), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if kind == "boxes":  # how central places are is no 0 or 1, so that the loss has a floor
        check_found(head, batch)
    else:
        assert losses[-1] < 0.15 * losses[0]
    without = [key for key, value in head.named_parameters() if value.grad is None or not value.grad.any()]
    assert set(without) == head.without_gradient


def check_found(head: Head, batch: Batch) -> None:
    """The best box of every image that has one is there, of its class; and the image without one has none as good."""
    with torch.no_grad():
        best = head.predict(head.features(batch.views[0]))[:, 0]
    true = batch.target[1:, 0]
    overlaps = boxes.iou(best[1:, None, :4], true[:, None, :4])[:, 0, 0]
    assert (overlaps > 0.5).all(), overlaps
    assert torch.equal(best[1:, 5], true[:, 4])
    assert best[0, 4] < best[1:, 4].min()


@every_head
@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_a_frozen_backbone_does_not_move(name: str, kind: str, network: str) -> None:
    head = small(name, kind, network, frozen="all")
    head_before = {key: value.clone() for key, value in head.head.state_dict().items()}
    _, before = train(head, 3, weight_decay=0.1)
    assert not moved(before, head.backbone.state_dict()), "weights, BatchNorm statistics and counters"
    assert moved(head_before, head.head.state_dict())
    groups = head.parameter_groups(0.1)
    own = {id(parameter) for parameter in head.head.parameters()}
    assert {id(parameter) for group in groups for parameter in group["params"]} == own


@every_head
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_first_layers_can_stay(name: str, kind: str, layer_decay: float) -> None:
    head = small(name, kind, frozen=2, layer_decay=layer_decay)
    number, depth = head.backbone.layers()
    assert depth > 2
    _, before = train(head, 3)
    changed = moved(before, head.backbone.state_dict())
    first = {f"network.{key}" for key, layer in number.items() if layer < 2}
    assert first
    assert not changed & first
    assert {f"network.{key}" for key, layer in number.items() if layer >= 2} - never(name, kind) <= changed
    statistics = {key for key in before if "running" in key or "tracked" in key}
    owners = {key.rpartition(".")[0] for key in first}
    assert {key for key in statistics if key not in changed} == {
        key for key in statistics if key.rpartition(".")[0] in owners
    }


class Watch(pl.Callback):
    """Rates of the head's and the backbone's groups as each step uses them, and the backbone after it."""

    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []
        self.backbone: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        own = {id(parameter) for parameter in pl_module.head.parameters()}
        found: dict[bool, set[float]] = {True: set(), False: set()}
        for group in optimizer.param_groups:
            found[id(group["params"][0]) in own].add(group["lr"])
        ((head,), (backbone,)) = found[True], found[False]
        self.rates.append((head, backbone))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.backbone.append({key: value.clone() for key, value in pl_module.backbone.state_dict().items()})


@every_head
def test_the_backbone_begins_after_the_probe_with_its_own_warm_up(name: str, kind: str) -> None:
    head, watch = small(name, kind, probe_steps=4), Watch()
    _, before = train(head, 14, [watch], lr=0.01, warmup=0.2, weight_decay=0.1)
    assert not moved(before, watch.backbone[3])
    weights = {f"network.{key}" for key, _ in head.backbone.network.named_parameters()} - never(name, kind)
    assert not moved(before, watch.backbone[4]) & weights, "the first step of a warm-up has a rate of 0"
    assert weights & moved(before, watch.backbone[5])
    assert weights <= moved(before, watch.backbone[7]), "timm starts residual branches at zero; one step opens them"
    heads, backbones = zip(*watch.rates, strict=True)
    assert backbones[:6] == pytest.approx([0, 0, 0, 0, 0, 0.005])
    assert backbones[6] == 0.01
    assert heads[:4] == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01])


@every_head
def test_a_probe_that_never_ends_is_refused(name: str, kind: str) -> None:
    with pytest.raises(UsageError, match="probe_steps is 10, of 10 steps"):
        small(name, kind, probe_steps=10).prepare(OptimConfig(), SCANS, 10, 1)
    small(name, kind, probe_steps=10, frozen="all").prepare(OptimConfig(), SCANS, 10, 1)


@every_head
@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_the_rate_of_every_layer(name: str, kind: str, network: str) -> None:
    decay, lr = 0.7, 1e-3
    head = small(name, kind, network, layer_decay=decay)
    head.prepare(OptimConfig(lr=lr, warmup=0, weight_decay=0.05), SCANS, 10, 1)
    optimizer = head.configure_optimizers()["optimizer"]
    found = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    number, depth = head.backbone.layers()
    for key, parameter in head.backbone.network.named_parameters():
        assert found[id(parameter)]["lr"] == lr * decay ** (depth - number[key])
    for parameter in head.head.parameters():
        assert found[id(parameter)]["lr"] == lr
    for parameter in head.parameters():
        assert found[id(parameter)]["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)
    assert max(number.values()) <= depth
    assert min(number.values()) == 0


@every_head
def test_half_precision_loss_and_probabilities_are_fp32(name: str, kind: str) -> None:
    head, batch = small(name, kind), batch_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        features = head.features(batch.views[0])
        assert head.logits(features).dtype == torch.float32
        assert head.loss(features, batch.target).dtype == torch.float32
        assert head.predict(features).dtype == torch.float32
        assert torch.isfinite(head.loss(features, batch.target))


@pytest.mark.gpu
@every_head
@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_a_gpu_has_the_loss_the_gradient_and_the_answer_of_the_cpu(name: str, kind: str, network: str) -> None:
    head, batch = small(name, kind, network).double().train(), batch_of(kind)
    found = []
    for one, given in ((copy.deepcopy(head).to("cuda"), batch.to("cuda")), (head, batch)):
        images = given.views[0].double()
        loss = one.loss(one.features(images), given.target)
        loss.backward()
        gradients = {key: value.grad.cpu() for key, value in one.named_parameters() if value.grad is not None}
        answer = one.eval().predict(one.features(images)).detach().cpu()
        found.append({"loss": loss.detach().cpu(), "answer": answer, **gradients})
    assert found[0].keys() == found[1].keys()
    for key, there in found[0].items():
        torch.testing.assert_close(there, found[1][key], rtol=1e-4, atol=1e-5, msg=f"{key} {{}}".format)


@every_head
def test_saved_and_loaded_it_says_the_same(name: str, kind: str) -> None:
    head, other = small(name, kind), small(name, kind, seed=1)
    train(head, 2)
    assert not torch.equal(outputs(head)[0], outputs(other)[0])
    other.backbone.load_state_dict(head.backbone.state_dict())
    other.head.load_state_dict(head.head.state_dict())
    assert torch.equal(outputs(head)[0], outputs(other)[0])
    assert head.state_dict().keys() == {f"backbone.{key}" for key in head.backbone.state_dict()} | {
        f"head.{key}" for key in head.head.state_dict()
    }


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("settings", [{}, SETTINGS, {"frozen": "all"}])
def test_its_settings_survive_a_recipe(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    written = ", ".join(f"{key}: {value}" for key, value in {"name": name, **settings}.items())
    path.write_text(f"head: {{{written}}}\n")
    first = recipe.load_finetune(path)
    assert first.head == HEADS[name].Config(**settings)
    path.write_text(recipe.dump(first))
    assert recipe.load_finetune(path) == first


@every_head
def test_its_metrics_exist_and_the_first_is_better_when_larger(name: str, kind: str) -> None:
    names = small(name, kind).metrics()
    classes = ("background", "one", "two")
    known = {"mask": overlap.measures(classes), "boxes": detections.measures(classes)}.get(kind, METRICS)
    assert set(names) <= set(known)
    assert names[0] == {"mask": "dice", "boxes": "map50"}.get(kind, "auroc")


@pytest.mark.parametrize("name", HEADS)
def test_another_kind_of_target_is_refused(name: str) -> None:
    kinds = HEADS[name].kinds
    other = next(each for each in ("class", "findings", "mask") if each not in kinds)
    with pytest.raises(UsageError, match=f"{name} learns {' or '.join(kinds)}, not {other}"):
        small(name, other)
