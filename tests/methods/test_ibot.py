"""iBOT: what is hidden, from whom, and what is learnt of it; heads, centres, refusals. Its losses: tests/parity."""

import copy
from typing import Any

import distillation_ranks
import pytest
import ranks
import torch
from distillation_ranks import batches, made, step

from sslmed.config import UsageError
from sslmed.data.modality import MODALITIES
from sslmed.methods.ibot import IBOT, IBOTConfig, patch_loss
from sslmed.methods.method import Progress
from sslmed.models.backbones import BackboneConfig, build


def test_half_of_the_whole_views_have_a_tenth_to_a_half_of_their_patches_hidden() -> None:
    method = made("ibot", masked_views=0.5)
    (batch,) = batches(1, rows=1000)
    share = method._hidden(batch).double().mean(dim=1)
    assert share.shape == (2000,)
    assert 0.45 < (share > 0).double().mean() < 0.55
    assert share.max() <= 0.5
    assert 0.15 < share[share > 0].mean() < 0.35


def test_a_mask_belongs_to_an_image_a_view_and_an_epoch() -> None:
    method = made("ibot", masked_views=1.0)
    (batch,), (later,) = batches(1, rows=20), batches(1, rows=20, epoch=1)
    whole = method._hidden(batch)
    halves = [method._hidden(ranks.half(batch, part)) for part in range(2)]
    assert torch.equal(whole[:20], torch.cat([half[:10] for half in halves])), "first views"
    assert torch.equal(whole[20:], torch.cat([half[10:] for half in halves])), "second views"
    assert not torch.equal(whole[:20], whole[20:])
    assert not torch.equal(whole, method._hidden(later))


def test_hidden_pixels_reach_the_teacher_and_not_the_student() -> None:
    method, (batch,) = made("ibot", masked_views=1.0, mask_ratio=(0.3, 0.5), local_views=0), batches(1, local_views=0)
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for name, head in (("student", method.head.mlp), ("teacher", method.teacher_head.mlp)):
        head.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(inputs[0].detach()))
    other = copy.deepcopy(batch)
    hidden = method._hidden(batch).unflatten(0, (2, -1)).unflatten(2, method.encoder.grid)
    pixels = hidden.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    other.views = [torch.where(where[:, None], 50.0, view) for where, view in zip(pixels, batch.views, strict=True)]
    for each in (batch, other):
        method.loss(each)
    students, teachers = seen["student"], seen["teacher"]
    assert len(students) == len(teachers) == 4
    for place in (0, 1):  # class tokens, then patches
        assert torch.equal(students[place], students[place + 2])
        assert not torch.equal(teachers[place], teachers[place + 2])


def test_the_mask_token_and_every_part_but_the_teacher_has_a_gradient() -> None:
    method, (batch,) = made("ibot", shared_head=False), batches(1)
    optimizer = torch.optim.SGD([each for each in method.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):  # the first step sets free what begins at 0
        optimizer.zero_grad()
        method.loss(batch)["loss"].backward()
        optimizer.step()
    idle = [name for name, each in method.named_parameters() if each.requires_grad and not each.grad.any()]
    assert idle == []
    assert all(parameter.grad is None for parameter in method.averaged[1].parameters())


def test_one_head_serves_both_unless_told_otherwise() -> None:
    shared, two = made("ibot"), made("ibot", shared_head=False)
    assert shared.patch_head is shared.head
    assert shared.teacher_patch_head is shared.teacher_head
    assert two.patch_head is not two.head
    names = {name.partition(".")[0] for name, _ in two.named_parameters()}
    assert {"patch_head", "teacher_patch_head"} <= names
    assert len(two.averaged[1]) == len(two.averaged[0]) == 3
    optimized = [id(parameter) for group in shared.parameter_groups(0.1) for parameter in group["params"]]
    assert len(optimized) == len(set(optimized))


def test_the_last_layers_stay_for_the_first_epoch() -> None:
    method, (batch,) = made("ibot", shared_head=False), batches(1)
    for epoch, frozen in ((0, True), (1, False)):
        method.zero_grad()
        method.loss(batch)["loss"].backward()
        method.before_step(Progress(0, 10, epoch, 8))
        for head in (method.head, method.patch_head):
            assert (head.last.weight.grad is None) == frozen


def test_the_patches_centre_is_the_mean_over_all_patches_and_its_own() -> None:
    method, (batch,) = made("ibot", centre_momentum=0.5), batches(1)
    with torch.no_grad():
        encoder = method.teacher_encoder
        seen = encoder.encode(encoder.embed(torch.cat(batch.views[:2])))
        classes, patches = method.teacher_head(seen[:, 0]), method.teacher_head(seen[:, 1:])
    assert patches.shape == (16, 16, 64)
    step(method, torch.optim.SGD(method.parameters(), lr=0.0), [batch], (0, 2))
    torch.testing.assert_close(method.centre.value, 0.5 * classes.mean(dim=0))
    torch.testing.assert_close(method.patch_centre.value, 0.5 * patches.mean(dim=(0, 1)))


@pytest.mark.ddp
def test_two_ranks_leave_what_one_process_leaves() -> None:
    one = distillation_ranks.state_after("ibot", {}, 2)
    for found in ranks.on_two_ranks(distillation_ranks.state_after, "ibot", {}, 2):
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8, msg=name)


def test_it_goes_on_after_save_and_load_to_the_bit() -> None:
    whole, part, data = made("ibot"), made("ibot"), batches(2)
    for number in range(2):
        step(whole, torch.optim.SGD(whole.parameters(), lr=0.1), [data[number]], (number, 2))
    step(part, torch.optim.SGD(part.parameters(), lr=0.1), [data[0]], (0, 2))
    resumed = made("ibot")
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    step(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), [data[1]], (1, 2))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_image_without_hidden_patches_counts_nothing_and_a_batch_of_such_is_finite() -> None:
    hidden = torch.tensor([[True, False, True], [False, False, False]])
    student, teacher, centre = torch.randn(2, 4), torch.randn(2, 4), torch.zeros(4)
    alone = patch_loss(student, teacher, hidden[:1], centre, 0.1, 0.04)
    torch.testing.assert_close(patch_loss(student, teacher, hidden, centre, 0.1, 0.04), alone / 2)
    empty = torch.zeros(0, 4, requires_grad=True)
    none = patch_loss(empty, torch.zeros(0, 4), hidden[1:], centre, 0.1, 0.04)
    none.backward()
    assert none.item() == 0
    method, (batch,) = made("ibot", masked_views=1e-9), batches(1)
    outputs = method.loss(batch)
    outputs["loss"].backward()
    assert outputs["patch_loss"].item() == 0
    assert torch.isfinite(outputs["loss"])


def test_the_parts_add_up_with_their_weights() -> None:
    method, (batch,) = made("ibot", patch_weight=0.5, koleo=0.2), batches(1)
    outputs = method.loss(batch)
    expected = outputs["class_loss"] + 0.5 * outputs["patch_loss"] + 0.2 * outputs["koleo"]
    torch.testing.assert_close(outputs["loss"].detach(), expected)
    assert "koleo" not in made("ibot", koleo=0.0).loss(batch)


def test_images_of_one_patient_are_not_pushed_apart() -> None:
    method, (batch,) = made("ibot"), batches(1)
    apart = method.loss(batch)["koleo"]
    batch.groups = torch.zeros(8, dtype=torch.int64)
    assert method.loss(batch)["koleo"].item() == 0
    assert apart.item() != 0


@pytest.mark.parametrize(
    ("backbone", "settings", "said"),
    [
        ({"name": "test_resnet"}, {}, "ibot needs a vision transformer"),
        ({"name": "test_vit4", "patch": 8}, {}, "ibot needs a class token, and test_vit4 has none"),
        ({"name": "eva02_tiny_patch14_224", "patch": 8}, {"local_views": 1}, "method.local_views=0"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(backbone: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        IBOT(IBOTConfig(**IBOT.example_settings | settings), build(BackboneConfig.model_validate(backbone), 32, 0))


@pytest.mark.parametrize("ratio", [(0.5, 0.3), (0.0, 0.0), (0.1, 1.0)])
def test_ratios_that_make_no_sense_are_refused(ratio: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        IBOTConfig(mask_ratio=ratio)


def test_the_teacher_leaves_the_run_and_views_are_multi_crop() -> None:
    method = made("ibot", local_views=3)
    assert method.exported is method.teacher_backbone.network
    assert [view.size(32) for view in method.views(MODALITIES["ct"])] == [(32, 32)] * 2 + [(16, 16)] * 3


def test_the_defaults_are_the_papers_but_for_crops_koleo_and_momentum_rule() -> None:
    config = IBOTConfig()
    assert (config.out, config.shared_head, config.local_views) == (8192, True, 10)
    assert (config.masked_views, config.mask_ratio, config.patch_weight, config.koleo) == (0.5, (0.1, 0.5), 1.0, 0.1)
