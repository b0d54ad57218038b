"""MoCo v2's details: the queue and when it changes, shuffling, when the key encoder moves. Its loss: tests/parity."""

from collections import deque
from typing import Any

import contrastive_ranks
import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from courses import course
from torch import nn
from torch.utils.data import DataLoader

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES
from sslmed.methods.method import Progress
from sslmed.methods.moco_v2 import MoCoV2, MoCoV2Config, info_nce
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig
from sslmed.training.trainer import TrainConfig, build_trainer

SMALL = {"queue": 24, "hidden": 32, "out": 16, "shuffle_size": 4}


def small(**settings: Any) -> MoCoV2:
    torch.manual_seed(0)
    return MoCoV2(MoCoV2Config(**SMALL | settings), build(BackboneConfig(name="test_resnet"), 32, 0)).train()


def batch(rows: int = 8, seed: int = 0, groups: torch.Tensor | None = None) -> Batch:
    views = list(torch.randn(2, rows, 1, 32, 32, generator=torch.Generator().manual_seed(seed)))
    ids = torch.arange(rows) + 100 * seed
    return Batch(views=views, target=ids, ids=ids, groups=ids if groups is None else groups, seed=0, epoch=0)


def step(method: MoCoV2, data: Batch, number: int = 1, rate: float = 0.0) -> None:
    optimizer = torch.optim.SGD(method.parameters(), lr=rate)
    method.loss(data)["loss"].backward()
    optimizer.step()
    method.after_step(Progress(number, 10, 0, len(data.ids)))
    method.zero_grad()


def keys_of(method: MoCoV2, data: Batch) -> torch.Tensor:
    with torch.no_grad():
        return F.normalize(method.key_projector(method.key_backbone(data.views[1])), dim=1)


def test_the_head_and_the_numbers_are_the_references() -> None:
    method = small()
    assert [type(part) for part in method.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [part.bias is not None for part in method.projector if isinstance(part, nn.Linear)] == [True, True]
    assert method.projector[0].in_features == method.backbone.num_features
    knobs = MoCoV2Config()
    assert (knobs.temperature, knobs.momentum, knobs.queue, knobs.hidden, knobs.out) == (0.2, 0.999, 65536, 2048, 128)


def test_the_queue_begins_with_random_directions_from_the_runs_seed() -> None:
    method = small()
    assert method.queue.shape == (16, 24)
    torch.testing.assert_close(method.queue.norm(dim=0), torch.ones(24))
    assert method.pointer == 0
    assert (method.queue_groups == -1).all()
    assert torch.equal(method.queue, small().queue)
    assert {"queue", "queue_groups", "pointer"} <= set(method.state_dict())


def test_the_newest_keys_take_the_place_of_the_oldest() -> None:
    method = small(shuffle_size=0)
    method.key_backbone.eval()  # else its statistics would be those of another pass
    expected, owners = deque(method.queue.T.clone(), maxlen=24), deque([-1] * 24, maxlen=24)
    for number in range(7):
        data = batch(seed=number)
        expected.extend(keys_of(method, data))
        owners.extend(data.groups.tolist())
        step(method, data)
        places = (torch.arange(24) + method.pointer) % 24  # from the oldest
        assert method.pointer == 8 * (number + 1) % 24
        torch.testing.assert_close(method.queue[:, places].T, torch.stack(list(expected)))
        assert method.queue_groups[places].tolist() == list(owners)


def test_keys_are_enqueued_after_the_step_and_do_not_repel_in_it() -> None:
    method, data = small(), batch()
    before = method.queue.clone()
    first, second = method.loss(data)["loss"], method.loss(data)["loss"]
    assert torch.equal(first, second)
    assert torch.equal(method.queue, before)


@pytest.mark.ddp
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_two_processes_end_with_the_queue_of_one(rate: float) -> None:
    """Contents and pointer after four steps, once round and a batch on; BatchNorm's groups are the same on both."""
    settings = SMALL | {"momentum": 0.5, "momentum_rule": "constant"}
    alone = contrastive_ranks.moco_after(4, rate, settings)
    for found in ranks.on_two_ranks(contrastive_ranks.moco_after, 4, rate, settings):
        assert found["pointer"] == alone["pointer"] == 8
        assert torch.equal(found["queue_groups"], alone["queue_groups"])
        if rate == 0:
            assert torch.equal(found["queue"], alone["queue"])
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)


def test_a_skipped_step_leaves_nothing_in_the_queue() -> None:
    one, other = small(), small()
    one.loss(batch(seed=1))["loss"].backward()
    one.zero_grad()  # as the guard does, which then calls no after_step
    for method in (one, other):
        for part in method.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
        step(method, batch(seed=2))
    assert torch.equal(one.queue, other.queue)
    assert one.pointer == 8


def test_in_training_a_performed_step_enqueues_all_its_batches_in_their_order() -> None:
    method, seen = small(), []
    method.prepare(OptimConfig(warmup=0), batch_size=8, total_steps=2, steps_per_epoch=2)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            seen.append(int(method.pointer))

    config = TrainConfig(max_steps=2, batch_size=8, accumulate=2, precision=32, devices="cpu")
    trainer = build_trainer(config, 2, [Watch()])
    trainer.fit(method.train(), DataLoader([batch(4, seed) for seed in range(4)], batch_size=None))
    assert seen == [0, 8, 8, 16]
    assert method.queue_groups.tolist() == [100 * seed + row for seed in range(4) for row in range(4)] + [-1] * 8


def test_a_queue_must_hold_whole_batches() -> None:
    small(queue=64).check(course(16))
    with pytest.raises(UsageError, match=r"method\.queue is 64 with train\.batch_size 24.*method\.queue=48 or 72"):
        small(queue=64).check(course(24))
    with pytest.raises(UsageError, match=r"method\.queue=128, or another"):
        small(queue=64).check(course(128))


def test_groups_of_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_size is 1, of which BatchNorm has no statistics; allowed: 0, or 2"):
        MoCoV2Config(shuffle_size=1)


def test_no_gradient_reaches_keys_and_their_batch_statistics_are_their_own() -> None:
    method = small()
    method.loss(batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in method.averaged[1].parameters())
    means = [
        dict(network.named_buffers())["network.bn1.running_mean"] for network in (method.backbone, method.key_backbone)
    ]
    assert not torch.equal(*means)


def test_moving_after_the_step_is_moving_before_the_keys() -> None:
    """The reference's order, from the same start: follow, keys, step. Ours: keys, step, follow."""
    settings = {"momentum": 0.7, "momentum_rule": "constant", "shuffle_size": 0}
    ours, theirs = (small(**settings).double() for _ in range(2))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for number in range(3):
        data = batch(seed=number)
        data.views = [view.double() for view in data.views]
        for average, online in zip(theirs.averaged[1].parameters(), theirs.averaged[0].parameters(), strict=True):
            average.data = 0.7 * average.data + 0.3 * online.data
        optimizer.zero_grad()
        theirs.loss(data)["loss"].backward()
        keys = torch.cat(theirs._new_keys.take())
        theirs._new_groups.take()
        optimizer.step()
        theirs.queue[:, 8 * number : 8 * number + 8] = keys.T
        step(ours, data, number + 1, rate=0.1)
        torch.testing.assert_close(ours.queue, theirs.queue, rtol=0, atol=1e-9)


def test_a_patients_keys_in_the_queue_do_not_repel_but_an_images_own_do() -> None:
    patients = torch.tensor([5, 5, 6, 7, 5, 6, 7, 8])
    method = small(shuffle_size=0)
    step(method, batch(groups=patients))
    data = batch(seed=1, groups=patients)
    queries = method.projector(method.backbone(data.views[0]))
    keys = keys_of(method, data)
    without = info_nce(queries, keys, method.queue, 0.2)["loss"]
    masked = info_nce(queries, keys, method.queue, 0.2, patients, method.queue_groups)["loss"]
    assert masked < without
    torch.testing.assert_close(method.loss(data)["loss"], masked)
    own = small(shuffle_size=0)
    step(own, batch())
    assert own.queue_groups[:8].tolist() == list(range(8))
    queries, keys = own.projector(own.backbone(batch().views[0])), keys_of(own, batch())
    torch.testing.assert_close(own.loss(batch())["loss"], info_nce(queries, keys, own.queue, 0.2)["loss"])


def test_batchnorm_sees_keys_in_other_groups_than_queries() -> None:
    method, data = small(), batch()
    data.views = [torch.arange(8.0)[:, None, None, None].expand(8, 1, 32, 32).clone() for _ in range(2)]
    seen: dict[str, list[list[int]]] = {"queries": [], "keys": []}
    for name, network in (("queries", method.backbone), ("keys", method.key_backbone)):
        network.register_forward_hook(
            lambda _, inputs, __, name=name: seen[name].append(inputs[0][:, 0, 0, 0].int().tolist())
        )
    method.loss(data)
    assert seen["queries"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(group) for group in seen["keys"]] == [4, 4]
    assert sorted(row for group in seen["keys"] for row in group) == list(range(8))
    assert seen["keys"] != seen["queries"]
    first = seen["keys"][:]
    method.loss(data)
    assert seen["keys"][2:] == first, "the order is keyed"
    data.epoch = 1
    method.loss(data)
    assert seen["keys"][4:] != first


@pytest.mark.parametrize("size", [4, 0])
def test_shuffled_keys_come_back_in_order(size: int) -> None:
    method, data = small(shuffle_size=size), batch()
    method.key_backbone.eval()  # statistics of no batch, so that only the order could differ
    torch.testing.assert_close(F.normalize(method._keys(data), dim=1), keys_of(method, data))


def test_a_network_without_batchnorm_is_not_shuffled() -> None:
    torch.manual_seed(0)
    method = MoCoV2(MoCoV2Config(**SMALL), build(BackboneConfig(name="test_vit", patch=8), 32, 0))
    seen: list[int] = []
    for network in (method.backbone, method.key_backbone):
        network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    method.loss(batch())["loss"].backward()
    assert seen == [8, 8]
    assert not method.notes(MODALITIES["xray"], course(256))


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    settings = {"momentum": 0.9, "momentum_rule": "constant"}
    whole, begun, resumed = (small(**settings) for _ in range(3))
    for number in range(4):
        step(whole, batch(seed=number), number + 1, rate=0.1)
    for number in range(2):
        step(begun, batch(seed=number), number + 1, rate=0.1)
    resumed.load_state_dict(begun.state_dict())
    for number in range(2, 4):
        step(resumed, batch(seed=number), number + 1, rate=0.1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_is_said_of_momentum_and_groups() -> None:
    xray = MODALITIES["xray"]
    assert not small(momentum=0.999).notes(xray, course(256))
    (note,) = small(momentum=0.96).notes(xray, course(64))
    assert "0.96 is quoted for batch 256; at batch 64 it is 0.989846" in note
    (note,) = small(momentum_rule="constant", shuffle_size=32).notes(xray, course(48))
    assert "48 images at a time are one group of method.shuffle_size 32" in note
    assert small(momentum_rule="constant", shuffle_size=32).notes(xray, course(64, accumulate=2))
    assert not small(momentum_rule="constant", shuffle_size=32).notes(xray, course(64))
    assert not small(momentum_rule="constant", shuffle_size=32).notes(
        xray, course(32, processes=2)
    )  # keys change places among them
    assert not small(momentum_rule="constant", shuffle_size=0).notes(xray, course(48))
