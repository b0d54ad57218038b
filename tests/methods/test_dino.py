"""DINO: teacher, centre, clipping, schedules, what keeps it from collapsing. Its loss: tests/parity."""

import copy
import math
from typing import Any

import distillation_ranks
import pytest
import ranks
import torch
from courses import course
from distillation_ranks import batches, made, step

from sslmed.data.modality import MODALITIES
from sslmed.methods.dino import DINOConfig
from sslmed.methods.method import Progress
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig, scheduled

FREE = {"freeze_last_layer": 0, "clip": 0.0}


def test_no_gradient_reaches_the_teacher() -> None:
    method, (batch,) = made("dino"), batches(1)
    method.loss(batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in method.averaged[1].parameters())
    assert not any(parameter.requires_grad for parameter in method.averaged[1].parameters())
    assert all(parameter.grad is not None for parameter in method.averaged[0].parameters())


def test_the_teacher_sees_whole_views_alone_and_the_student_all_of_them() -> None:
    method, (batch,) = made("dino", local_views=3), batches(1, local_views=3)
    seen: dict[str, list[Any]] = {"student": [], "teacher": []}
    for name, network in (("student", method.backbone), ("teacher", method.teacher_backbone)):
        network.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(tuple(inputs[0].shape[::3])))
    method.loss(batch)
    assert seen == {"student": [(16, 32), (24, 16)], "teacher": [(16, 32)]}


@pytest.mark.parametrize("number", [1, 50, 100])
def test_the_teacher_follows_by_the_cosine_and_leaves_the_run(number: int) -> None:
    method = made("dino", momentum=0.9, momentum_rule="constant")
    with torch.no_grad():
        for parameter in method.averaged[0].parameters():
            parameter += 1
    online, average = method.averaged
    pairs = [(a.clone(), o.clone()) for a, o in zip(average.parameters(), online.parameters(), strict=True)]
    method.after_step(Progress(number, 100, 0, 8))
    momentum = 1 - 0.1 * (math.cos(math.pi * (number - 1) / 100) + 1) / 2
    for (old, target), new in zip(pairs, average.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * target)
    assert method.exported is method.teacher_backbone.network


def test_the_centre_moves_after_the_step_to_the_mean_of_all_that_the_teacher_gave() -> None:
    method = made("dino", centre_momentum=0.9, **FREE)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    outputs: list[torch.Tensor] = []
    logits = method.teacher_head.logits
    method.teacher_head.logits = lambda embedded: outputs.append(logits(embedded)) or outputs[-1]
    expected = torch.zeros(64)
    for number, batch in enumerate(batches(3)):
        halves = [ranks.half(batch, part) for part in range(2)]
        outputs.clear()
        method.zero_grad()
        method.loss(batch)
        torch.testing.assert_close(method.centre.value, expected, msg="the loss alone changes nothing")
        outputs.clear()
        step(method, optimizer, halves, (number, 3))
        assert len(outputs) == 2
        mean = torch.cat([output.flatten(0, 1) for output in outputs]).mean(dim=0)
        expected = 0.9 * expected + 0.1 * mean
        torch.testing.assert_close(method.centre.value, expected)


@pytest.mark.ddp
def test_two_ranks_leave_teacher_and_centre_where_one_process_leaves_them() -> None:
    one = distillation_ranks.state_after("dino", {}, 3)
    assert one["centre.value"].abs().max() > 0.01
    for found in ranks.on_two_ranks(distillation_ranks.state_after, "dino", {}, 3):
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_skipped_step_leaves_the_centre_alone() -> None:
    method, other = made("dino", **FREE), made("dino", **FREE)
    first, wrong, second = batches(3)
    for each, skipped in ((method, True), (other, False)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        each.eval()  # so that BatchNorm does not remember the skipped step, which the trainer undoes
        step(each, optimizer, [first], (0, 3))
        if skipped:
            each.loss(wrong)["loss"].backward()
            each.zero_grad()
        step(each, optimizer, [second], (1, 3))
    assert torch.equal(method.centre.value, other.centre.value)


def test_it_goes_on_after_save_and_load_to_the_bit() -> None:
    whole, part, data = made("dino"), made("dino"), batches(4)
    for number in range(4):
        step(whole, torch.optim.SGD(whole.parameters(), lr=0.1), [data[number]], (number, 4))
    for number in range(2):
        step(part, torch.optim.SGD(part.parameters(), lr=0.1), [data[number]], (number, 4))
    resumed = made("dino")
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    for number in (2, 3):
        step(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), [data[number]], (number, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_last_layer_stays_for_the_first_epoch(norm_last_layer: bool) -> None:
    method, (batch,) = made("dino", norm_last_layer=norm_last_layer), batches(1)
    for epoch, frozen in ((0, True), (1, False)):
        method.zero_grad()
        method.loss(batch)["loss"].backward()
        method.before_step(Progress(5, 100, epoch, 8))
        assert len(method.head.last_layer()) == (1 if norm_last_layer else 2)
        assert all((parameter.grad is None) == frozen for parameter in method.head.last_layer())
        assert method.head.mlp[0].weight.grad is not None


def test_each_tensors_gradient_is_clipped_by_itself() -> None:
    method, (batch,) = made("dino", clip=0.05, freeze_last_layer=0), batches(1)
    method.loss(batch)["loss"].backward()
    before = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.before_step(Progress(0, 100, 0, 8))
    after = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    large = {name for name, gradient in before.items() if gradient.norm() > 0.05}
    assert 0 < len(large) < len(before)
    for name, gradient in before.items():
        share = 0.05 / gradient.norm() if name in large else 1.0
        torch.testing.assert_close(after[name], gradient * share, atol=1e-6, rtol=1e-3)


def test_weight_decay_comes_to_its_end_and_biases_have_none() -> None:
    method = made("dino", norm_last_layer=False)
    config = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)
    schedule = scheduled(config, method.parameter_groups(0.04), 8, 10)
    groups = schedule["optimizer"].param_groups
    held = {id(parameter) for parameter in groups[0]["params"]}
    assert all((id(p) in held) == (p.ndim > 1) for p in method.parameters() if p.requires_grad)
    found = [groups[0]["weight_decay"]]
    for _ in range(10):
        schedule["optimizer"].step()
        schedule["lr_scheduler"]["scheduler"].step()
        found.append(groups[0]["weight_decay"])
    assert found[0] == pytest.approx(0.04)
    assert found[5] == pytest.approx(0.22)
    assert found[10] == pytest.approx(0.4)
    assert groups[1]["weight_decay"] == 0


def collapse(sharpen: bool, centre: bool) -> tuple[float, float]:
    """A toy of the output alone: entropy of the teacher's mean distribution, and mean entropy of its distributions.

    Both in shares of log K, after 300 steps in which 32 logits without any network follow a teacher that is their
    moving average: what centring and sharpening do by themselves (paper, section 5.3).
    """
    from sslmed.models.self_distillation import distillation_loss, entropy, targets

    generator = torch.Generator().manual_seed(0)
    common, student = torch.randn(8, generator=generator), torch.randn(32, 2, 8, generator=generator)
    student = (0.3 * student + common).requires_grad_()
    teacher, middle = student.detach().clone(), torch.zeros(8)
    temperature = 0.04 if sharpen else 0.2
    optimizer = torch.optim.SGD([student], lr=2.0)
    for _ in range(300):
        loss = distillation_loss(student, teacher, middle, 0.1, temperature)
        optimizer.zero_grad()
        loss.backward()
        student.grad = student.grad.mean(dim=(0, 1)).expand_as(student) + 0.03 * student.grad  # shared weights
        optimizer.step()
        teacher.lerp_(student.detach(), 0.1)
        if centre:
            middle.lerp_(teacher.mean(dim=(0, 1)), 0.1)
    found = targets(teacher, middle, temperature)
    return (
        float(entropy(found.mean(dim=(0, 1)))) / math.log(8),
        float(entropy(found)) / math.log(8),
    )


def test_centring_alone_ends_uniform_and_sharpening_alone_in_one_prototype() -> None:
    mean, each = collapse(sharpen=False, centre=True)
    assert each > 0.9, "every distribution is uniform"
    mean, each = collapse(sharpen=True, centre=False)
    assert mean < 0.1, "all have the same outcome"
    mean, each = collapse(sharpen=True, centre=True)
    assert mean > 0.9, "all prototypes are used"
    assert each < 0.1, "and each distribution has few"


def test_a_transformer_takes_local_views_of_whole_patches() -> None:
    torch.manual_seed(0)
    from sslmed.methods.dino import DINO

    settings = DINO.example_settings | {"local_views": 1}
    method = DINO(DINOConfig(**settings), build(BackboneConfig(name="test_vit", patch=8), 32, 0))
    views = method.views(MODALITIES["xray"])
    assert [view.size(32) for view in views] == [(32, 32), (32, 32), (16, 16)]
    (batch,) = batches(1)
    loss = method.loss(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    (note,) = method.notes(MODALITIES["xray"], course(8))
    assert "method.local_scale 0.429 becomes 0.5" in note


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_last_layer_that_never_trains_is_warned_of(name: str) -> None:
    method = made(name, freeze_last_layer=2, local_views=0)
    (note,) = method.notes(MODALITIES["xray"], course(total=20, steps_per_epoch=10))
    assert "method.freeze_last_layer is 2 epochs, and 2 are begun: the last layer stays" in note
    assert not method.notes(MODALITIES["xray"], course(total=21, steps_per_epoch=10))


def test_the_momentum_is_rescaled_with_the_batch_and_said() -> None:
    method = made("dino", momentum=0.996, momentum_rule="scaled")
    (note,) = method.notes(MODALITIES["xray"], course(64))
    assert "method.momentum 0.996 is quoted for batch 256; at batch 64" in note
    before = method.head.last.weight.clone()
    with torch.no_grad():
        method.head.last.weight += 1
    method.after_step(Progress(1, 100, 0, 64))
    torch.testing.assert_close(method.teacher_head.last.weight, before + (1 - 0.996**0.25), atol=1e-6, rtol=0)


def test_without_local_views_two_views_teach_each_other() -> None:
    method, (batch,) = made("dino", local_views=0), batches(1, local_views=0)
    assert len(method.views(MODALITIES["xray"])) == 2
    assert torch.isfinite(method.loss(batch)["loss"])


def test_the_teachers_entropy_is_told_in_shares_of_the_greatest() -> None:
    method, (batch,) = made("dino", first_temperature=1.0), batches(1)
    assert 0.98 < method.loss(batch)["teacher_entropy"].item() <= 1
    method = made("dino", first_temperature=0.001)
    assert method.loss(batch)["teacher_entropy"].item() < 0.1


def test_the_defaults_are_the_papers_but_for_crops_and_momentum_rule() -> None:
    config = DINOConfig()
    assert not config.head_batchnorm
    assert (config.out, config.hidden, config.bottleneck, config.norm_last_layer) == (65536, 2048, 256, True)
    assert (config.student_temperature, config.first_temperature, config.teacher_temperature) == (0.1, 0.04, 0.07)
    assert (config.warmup_epochs, config.centre_momentum, config.momentum) == (30, 0.9, 0.996)
    assert (config.freeze_last_layer, config.clip, config.local_views) == (1, 3.0, 8)
