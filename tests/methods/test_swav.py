"""SwAV: even assignments over processes, prototypes of length 1, the queue, multi-crop. Its loss: tests/parity."""

import copy

import distillation_ranks
import pytest
import ranks
import torch
from courses import course
from distillation_ranks import batches, made, step
from torch import nn

from sslmed.data.modality import MODALITIES
from sslmed.methods.method import Progress
from sslmed.methods.swav import SwAVConfig, assignments


def cosines(rows: int = 24, prototypes: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    points = nn.functional.normalize(torch.randn(rows, 4, generator=generator, dtype=torch.float64))
    return points @ nn.functional.normalize(torch.randn(prototypes, 4, generator=generator, dtype=torch.float64)).T


def test_an_assignment_sums_to_one_and_prototypes_share_alike() -> None:
    found = assignments(cosines(), 0.05, 2000)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(found.sum(dim=0), torch.full((6,), 24 / 6, dtype=torch.float64))
    few = assignments(cosines(), 0.5, 3)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(24, dtype=torch.float64))
    plain = (cosines() / 0.5).softmax(dim=1).sum(dim=0)
    assert (few.sum(dim=0) - 4).abs().max() < 0.3 * (plain - 4).abs().max(), "a softmax alone would not be even"


@pytest.mark.ddp
def test_two_ranks_assign_what_one_process_assigns() -> None:
    scores = cosines()
    found = torch.cat(ranks.on_two_ranks(distillation_ranks.assigned, scores, 0.05, 3))
    torch.testing.assert_close(found, assignments(scores, 0.05, 3), rtol=1e-12, atol=1e-15)
    alone = torch.cat([assignments(half, 0.05, 3) for half in scores.chunk(2)])
    assert (found - alone).abs().max() > 0.01, "assignments within a rank are others"


@pytest.mark.parametrize("epsilon", [0.02, 0.05, 1.0])
def test_assignments_are_finite_in_fp32_for_any_cosines(epsilon: float) -> None:
    extremes = torch.tensor([[1.0, -1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    found = assignments(extremes, epsilon, 3)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))


def test_the_head_is_the_references() -> None:
    method = made("swav", hidden=20, out=10, prototypes=7)
    assert [type(part) for part in method.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert all(part.bias is not None for part in method.projector if isinstance(part, nn.Linear))
    assert method.prototypes.bias is None
    assert method.prototypes.weight.shape == (7, 10)


def test_prototypes_have_length_one_before_every_forward_pass() -> None:
    method = made("swav")
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    for number, batch in enumerate(batches(3)):
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(6))
        before = method.prototypes.weight.clone()
        step(method, optimizer, [batch], (number, 3))
        assert not torch.allclose(before, method.prototypes.weight)


def test_prototypes_stay_to_the_bit_while_frozen_and_have_no_moments() -> None:
    method = made("swav", freeze_steps=2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    first, moved = method.prototypes.weight.clone(), []
    for number, batch in enumerate(batches(4)):
        step(method, optimizer, [batch], (number, 4))
        moved.append(not torch.equal(first, method.prototypes.weight))
        assert (method.prototypes.weight in optimizer.state) == (number >= 2)
    assert moved == [False, False, True, True]


def test_no_gradient_goes_through_the_assignments() -> None:
    method, (batch,) = made("swav"), batches(1)
    seen: list[torch.Tensor] = []
    method.prototypes.register_forward_hook(lambda _, __, output: seen.append(output) or output.retain_grad())
    method.loss(batch)["loss"].backward()
    (scores,) = seen
    q = assignments(scores[0].detach(), 0.05, 3), assignments(scores[1].detach(), 0.05, 3)
    p = (scores.detach() / 0.1).softmax(dim=2)
    rows, pairs = len(batch.ids), 2 * 2
    torch.testing.assert_close(scores.grad[2], (2 * p[2] - q[0] - q[1]) / (0.1 * rows * pairs), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.grad[0], (p[0] - q[1]) / (0.1 * rows * pairs), atol=1e-6, rtol=1e-4)


def test_the_queue_holds_the_newest_embeddings_of_performed_steps_alone() -> None:
    method = made("swav", queue=20, queue_from=0)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    seen = []
    for number, batch in enumerate(batches(3)):
        method.eval()  # so that the embeddings can be had again
        before = copy.deepcopy(method.queue)
        method.zero_grad()
        seen.append(method.loss(batch)["embeddings"].detach())
        assert torch.equal(before, method.queue), "loss alone changes nothing"
        step(method, optimizer, [batch], (number, 3))
    assert int(method.queued) == 20
    torch.testing.assert_close(method.queue[0], torch.cat([seen[2], seen[1], seen[0]])[:20])
    kept = method.queue.clone()
    method.loss(batches(4)[3])
    for parameter in method.parameters():
        parameter.grad = None  # what the trainer does to a step that it skips
    step(method, optimizer, [batches(5)[4]], (3, 4))
    torch.testing.assert_close(method.queue[:, 8:], kept[:, :12], msg="a skipped step leaves nothing")


def test_the_queue_counts_once_it_is_full_and_its_epoch_has_come() -> None:
    method = made("swav", queue=16, queue_from=1)
    method.eval()
    (now,), (later,) = batches(1), batches(1, epoch=1)
    empty = method.loss(later)["loss"]
    assert torch.equal(method.loss(now)["loss"], empty)
    method.queue.copy_(nn.functional.normalize(torch.randn(2, 16, 32), dim=2))
    method.queued.fill_(16)
    assert torch.equal(method.loss(now)["loss"], empty)
    assert not torch.equal(method.loss(later)["loss"], empty)


@pytest.mark.ddp
@pytest.mark.parametrize("queue", [0, 12])
def test_two_ranks_leave_what_one_process_leaves(queue: int) -> None:
    settings = {"queue": queue, "queue_from": 0, "epsilon": 0.5}
    one = distillation_ranks.state_after("swav", settings, 3)
    two = ranks.on_two_ranks(distillation_ranks.state_after, "swav", settings, 3)
    for found in two:
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_queue_goes_on_after_save_and_load_to_the_bit() -> None:
    settings = {"queue": 12, "queue_from": 0}
    whole, part = made("swav", **settings), made("swav", **settings)
    data = batches(4)
    for number in range(4):
        step(whole, torch.optim.SGD(whole.parameters(), lr=0.1), [data[number]], (number, 4))
    for number in range(2):
        step(part, torch.optim.SGD(part.parameters(), lr=0.1), [data[number]], (number, 4))
    resumed = made("swav", **settings)
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    for number in (2, 3):
        step(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), [data[number]], (number, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_batchnorm_sees_all_views_of_a_size_at_once_and_the_head_all_views() -> None:
    method, (batch,) = made("swav", local_views=3), batches(1, local_views=3)
    seen: list[int] = []
    method.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    method.projector.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    method.loss(batch)
    assert seen == [16, 24, 40]


def test_without_local_views_two_views_swap() -> None:
    method, (batch,) = made("swav", local_views=0), batches(1, local_views=0)
    assert len(method.views(MODALITIES["xray"])) == 2
    assert torch.isfinite(method.loss(batch)["loss"])


def test_cosines_and_what_is_queued_stay_in_fp32_under_autocast() -> None:
    method, (batch,) = made("swav", queue=16, queue_from=0), batches(1)
    method.queue.normal_(generator=torch.Generator().manual_seed(0))
    method.queued.fill_(16)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    method.prototypes.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        method.loss(batch)
    assert seen == [(torch.float32, torch.float32)] * 2


def test_more_prototypes_than_images_are_warned_of() -> None:
    method, xray = made("swav", prototypes=100), MODALITIES["xray"]
    (note,) = method.notes(xray, course(64))
    assert note.startswith("warning: 64 images are spread over 100 prototypes")
    assert not method.notes(xray, course(128))
    assert not made("swav", prototypes=100, queue=64).notes(xray, course(64))
    assert "train.accumulate" in method.notes(xray, course(128, accumulate=2))[0]


def test_what_would_never_come_is_warned_of() -> None:
    xray = MODALITIES["xray"]
    (frozen,) = made("swav", freeze_steps=20).notes(xray, course(total=20))
    assert "method.freeze_steps is 20, and there are 20 steps: the prototypes stay" in frozen
    assert not made("swav", freeze_steps=19).notes(xray, course(total=20))
    (unused,) = made("swav", queue=64, queue_from=2).notes(xray, course(total=20, steps_per_epoch=10))
    assert "from epoch 2 (method.queue_from, counted from 0), and there are 2" in unused
    assert not made("swav", queue=64, queue_from=2).notes(xray, course(total=21, steps_per_epoch=10))


def test_the_defaults_are_the_papers_but_for_the_crops() -> None:
    config = SwAVConfig()
    assert (config.prototypes, config.temperature, config.epsilon, config.iterations) == (3000, 0.1, 0.05, 3)
    assert (config.freeze_steps, config.hidden, config.out, config.local_views) == (313, 2048, 128, 6)
    assert config.local_scale == pytest.approx(96 / 224)


def test_after_step_without_a_loss_before_it_does_nothing_to_the_queue() -> None:
    method = made("swav", queue=12)
    method.after_step(Progress(1, 10, 0, 8))
    assert int(method.queued) == 0
