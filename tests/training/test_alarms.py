"""Each alarm provoked in a training by the command's own path, and the bookkeeping of one alarm alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sslmed.commands.pretrain import pretrain
from sslmed.config import TrainingAborted
from sslmed.data.loading import Batch
from sslmed.data.store import Store
from sslmed.methods import METHODS
from sslmed.methods.byol import BYOL, BYOLConfig
from sslmed.methods.method import Progress
from sslmed.models.backbones import Backbone
from sslmed.run import read_metrics
from sslmed.training.alarms import EXPLODED, FEWEST_NORMS, Alarm, Alarms


class AttractOnly(BYOL):
    """Every view attracts every other and nothing holds them apart: all may become one point, and do."""

    def __init__(self, config: BYOLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = torch.nn.Sequential(torch.nn.Linear(backbone.num_features, 16))

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        points = torch.nn.functional.normalize(self.projector(self.backbone(torch.cat(batch.views))), dim=1)
        return {"loss": points.var(dim=0).sum(), "embeddings": points}

    def after_step(self, progress: Progress) -> None:
        pass


class Forgetful(BYOL):
    """BYOL whose target is never updated."""

    def after_step(self, progress: Progress) -> None:
        pass


class Exploding(BYOL):
    """BYOL whose loss grows a million times from the tenth step on."""

    steps = 0

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        outputs = super().loss(batch)
        self.steps += 1
        return outputs if self.steps < 10 else outputs | {"loss": 1e6 * outputs["loss"]}


@pytest.fixture
def train(phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "backbone: {name: test_resnet}\n"
        "data: {size: 32, workers: 0}\n"
        "method: {name: byol, hidden: 32, out: 16, momentum: 0.9}\n"
        "train: {max_steps: 60, batch_size: 8}\n"
        "monitor: {log_every: 1, knn_every: 0, collapse_steps: 5}\n"
    )

    def run(method: type[BYOL], *overrides: str) -> list[dict[str, Any]]:
        monkeypatch.setitem(METHODS, "byol", method)
        pretrain(recipe, phantom_store.path, tmp_path / "run", overrides=overrides)
        return read_metrics(tmp_path / "run")

    return run


def test_a_collapse_stops_the_run(train: Any) -> None:
    with pytest.raises(TrainingAborted, match=r"embeddings have collapsed.*lower optim\.lr.*monitor\.collapse=warn"):
        train(AttractOnly, "optim.lr=3e-2", "optim.warmup=0", "monitor.frozen=off")


def test_a_frozen_momentum_network_stops_the_run(train: Any) -> None:
    with pytest.raises(TrainingAborted, match=r"momentum network is frozen.*method\.momentum.*monitor\.frozen=warn"):
        train(Forgetful)


def test_an_exploding_norm_stops_when_told(train: Any) -> None:
    with pytest.raises(TrainingAborted, match=r"norm of the gradient has exploded.*optim\.lr.*monitor\.explosion=warn"):
        train(Exploding, "monitor.explosion=stop")


def test_a_healthy_run_rings_nothing_and_logs_the_norms(train: Any, tmp_path: Path) -> None:
    metrics = train(BYOL)
    assert "warning" not in (tmp_path / "run" / "train.log").read_text()
    assert all(line["gradient_norm"] > 0 and line["embedding_norm"] > 0 for line in metrics)


def alarms(said: list[str], **actions: Any) -> Alarms:
    return Alarms({"collapse": "warn", "explosion": "warn", "frozen": "warn"} | actions, 5, 1, said.append)


def test_one_outlier_is_no_explosion_and_what_is_wrong_never_becomes_usual() -> None:
    said: list[str] = []
    watch = alarms(said)
    for step in range(FEWEST_NORMS):
        watch.look_at_norm(step, "gradient_norm", 1.0)
    watch.look_at_norm(5, "gradient_norm", 2 * EXPLODED)
    watch.look_at_norm(6, "gradient_norm", 1.0)
    assert not said
    for step in range(7, 10):
        watch.look_at_norm(step, "gradient_norm", 2 * EXPLODED)
    assert len(said) == 1
    assert "200 since step 7, where 1 was usual" in said[0]


def test_a_standstill_in_the_second_half_is_the_cosines_end() -> None:
    said: list[str] = []
    watch, still = alarms(said), torch.nn.Linear(2, 2)
    for step in range(50, 100):
        watch.look_at_average(step, 99, still)
    assert not said
    for step in range(10):
        watch.look_at_average(step, 99, still)
    assert "frozen" in said[0]


def test_off_never_rings_and_the_state_survives_a_resume() -> None:
    said: list[str] = []
    off = Alarm("collapse", "off", 0, said.append)
    off.look(1, True, str)
    assert off.since is None
    first, second = alarms(said), alarms(said)
    for step in range(6):
        first.look_at_norm(step, "embedding_norm", 1.0 if step < 5 else 1e6)
    first.look_at_embeddings(3, 0.0, 16)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    second.look_at_embeddings(8, 0.0, 16)
    assert "since step 3" in said[0]


def test_a_standstill_is_remembered_over_a_resume() -> None:
    said: list[str] = []
    still = torch.nn.Linear(2, 2)
    first, second = alarms(said), alarms(said)
    for step in (1, 2, 3):
        first.look_at_average(step, 100, still)
    second.load_state_dict(first.state_dict())
    for step in (4, 5, 6):
        second.look_at_average(step, 100, still)
    assert not said
    second.look_at_average(7, 100, still)
    assert "since step 2" in said[0]


def test_a_short_training_rings_within_a_quarter_of_it() -> None:
    said: list[str] = []
    watch, still = (
        Alarms({"collapse": "warn", "explosion": "warn", "frozen": "warn"}, 200, 1, said.append),
        torch.nn.Linear(2, 2),
    )
    for step in range(1, 30):
        watch.look_at_average(step, 80, still)
    assert "frozen" in said[0]


def test_a_norm_that_is_no_number_is_wrong_and_never_usual() -> None:
    said: list[str] = []
    watch = alarms(said)
    for step in range(FEWEST_NORMS):
        watch.look_at_norm(step, "gradient_norm", 1.0)
    for step in (5, 6, 7):
        watch.look_at_norm(step, "gradient_norm", float("nan"))
    assert len(said) == 1
    assert watch.state_dict()["norms"]["gradient_norm"] == [1.0] * FEWEST_NORMS
