"""What every entry of METHODS must do. A new method gets all of this from its line in the dict, and more in parity/."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch
from torch.utils.data import DataLoader

from sslmed import recipe
from sslmed.data.loading import Batch, ViewDataset, stream_loader
from sslmed.data.modality import MODALITIES
from sslmed.data.sampling import StreamSampler
from sslmed.data.store import Store
from sslmed.methods import METHODS
from sslmed.methods.method import Method, Progress
from sslmed.models.backbones import build
from sslmed.optim import OptimConfig
from sslmed.training.monitors import embedding_std
from sslmed.training.trainer import TrainConfig, build_trainer

every_method = pytest.mark.parametrize("name", METHODS)
SIZE = 32


def batch_for(method: Method, store: Store, scans: int = 8) -> Batch:
    policy = MODALITIES[store.modality]
    dataset = ViewDataset(store, policy, method.views(policy), SIZE, 1, seed=0, target=None)
    sampler = StreamSampler(store.rows("train")[:scans], scans, steps=1, seed=0)
    return next(iter(stream_loader(dataset, sampler, workers=0)))


@every_method
def test_the_loss_is_finite_and_reaches_every_parameter(name: str, phantom_store: Store) -> None:
    method = ranks.small_method(name)
    batch = batch_for(method, phantom_store)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    for _ in range(2):  # timm starts residual branches at zero; one step opens them
        optimizer.zero_grad()
        outputs = method.loss(batch)
        assert outputs["loss"].shape == ()
        assert torch.isfinite(outputs["loss"])
        outputs["loss"].backward()
        optimizer.step()
    without = {
        key
        for key, value in method.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.any())
    }
    assert without == set(method.without_gradient)


@every_method
def test_it_overfits_eight_fixed_scans_without_collapsing(name: str, phantom_store: Store) -> None:
    method = ranks.small_method(name)
    batch = batch_for(method, phantom_store)
    optimizer = torch.optim.AdamW(method.parameter_groups(1e-4), lr=1e-3)
    goal, found = method.overfit, []
    for step in range(goal.steps):
        outputs = method.loss(batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        method.before_step(Progress(step, goal.steps, step, len(batch.ids)))
        optimizer.step()
        method.after_step(Progress(step + 1, goal.steps, step + 1, len(batch.ids)))
        found.append(outputs[goal.quantity].item())
    assert (goal.ratio is None) != (goal.least is None), "one criterion"
    assert found[-1] <= goal.ratio * found[0] if goal.least is None else found[-1] >= goal.least
    if "embeddings" in outputs:
        assert embedding_std(outputs["embeddings"]) > 0.1 / math.sqrt(outputs["embeddings"].shape[1])


@every_method
def test_the_exported_network_is_timms_own(name: str) -> None:
    method = ranks.small_method(name)
    names = set(build(METHODS[name].example, SIZE, 1).network.state_dict())
    assert set(method.exported.state_dict()) == names


@every_method
def test_save_and_load_give_the_same_loss(name: str, phantom_store: Store) -> None:
    method, other = ranks.small_method(name), ranks.small_method(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    other.load_state_dict(method.state_dict())
    batch = batch_for(method, phantom_store)
    assert torch.equal(method.loss(batch)["loss"], other.loss(batch)["loss"])


@every_method
def test_its_settings_survive_a_recipe(name: str, tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "recipe.yaml"  # type: ignore[operator]
    path.write_text(f"method: {{name: {name}}}\n")
    first = recipe.load_pretrain(path)
    path.write_text(recipe.dump(first))
    assert recipe.load_pretrain(path) == first


@pytest.mark.gpu
@every_method
def test_a_gpu_has_the_loss_and_the_gradient_of_the_cpu(name: str, phantom_store: Store) -> None:
    method = ranks.small_method(name).double()
    batch = batch_for(method, phantom_store)
    other = copy.deepcopy(method).to("cuda")
    found = []
    for one, given in ((method, batch), (other, batch.to("cuda"))):
        one.before_step(Progress(0, 10, 0, len(batch.ids)))
        outputs = one.loss(replace(given, views=[view.double() for view in given.views]))
        outputs["loss"].backward()
        gradients = {key: value.grad.cpu() for key, value in one.named_parameters() if value.grad is not None}
        found.append({"loss": outputs["loss"].detach().cpu(), **gradients})
    assert found[0].keys() == found[1].keys()
    for key, here in found[0].items():
        torch.testing.assert_close(found[1][key], here, rtol=1e-4, atol=1e-6, msg=f"{key} {{}}".format)


@pytest.mark.gpu
@every_method
def test_a_gpu_trains_it_in_bf16(name: str, phantom_store: Store) -> None:
    method, steps, losses = ranks.small_method(name), 3, []
    batch = batch_for(method, phantom_store)

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.prepare(OptimConfig(lr=1e-3, warmup=0), len(batch.ids), steps, 1)
    trainer = build_trainer(TrainConfig(max_steps=steps, precision="bf16", devices="auto"), steps, [Keep()])
    trainer.fit(method.train(), DataLoader([batch] * steps, batch_size=None, collate_fn=lambda given: given))
    assert trainer.strategy.root_device.type == "cuda"
    assert len(losses) == steps
    assert all(map(math.isfinite, losses))
    after = {key: value.cpu() for key, value in method.state_dict().items()}
    assert all(torch.isfinite(value).all() for value in after.values())
    trained = {key for key, value in method.named_parameters() if value.requires_grad} - set(method.without_gradient)
    assert {key for key in trained if torch.equal(before[key], after[key])} == set()
