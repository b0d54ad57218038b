import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sslmed.config import TrainingAborted
from sslmed.run import Run, read_metrics
from sslmed.training import monitors
from sslmed.training.monitors import RANKME_ROWS, Monitor, MonitorConfig, embedding_std, rankme

ROWS, WIDTH = 64, 16
HEALTHY = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
COLLAPSED = torch.ones(ROWS, WIDTH) + 1e-4 * HEALTHY


# The measures.


@pytest.mark.parametrize(
    ("embeddings", "rank"),
    [
        (torch.eye(8), 8.0),
        (3 * torch.eye(40)[:, :5], 5.0),
        (torch.ones(50, 12), 1.0),
        (torch.outer(torch.arange(1.0, 30), torch.linspace(-1, 1, 9)), 1.0),
        # exp of the entropy of (2/3, 1/3)
        (torch.diag(torch.tensor([2.0, 1.0, 0.0])), math.exp(math.log(3) - 2 / 3 * math.log(2))),
        (
            torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])),
            math.exp(0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)),
        ),
    ],
)
def test_rankme_in_closed_form(embeddings: torch.Tensor, rank: float) -> None:
    assert rankme(embeddings) == pytest.approx(rank, rel=1e-3)
    assert rankme(100 * embeddings) == pytest.approx(rank, rel=1e-3)
    assert rankme(embeddings.T) == pytest.approx(rank, rel=1e-3)


def test_rankme_of_nothing_but_zeros_is_finite() -> None:
    assert math.isfinite(rankme(torch.zeros(8, 4)))


@pytest.mark.parametrize("width", [4, 64, 512])
def test_embedding_std_on_the_sphere_is_one_by_root_width(width: int) -> None:
    spread = torch.randn(4000, width, generator=torch.Generator().manual_seed(1))
    assert embedding_std(spread) == pytest.approx(1 / math.sqrt(width), rel=0.02)
    assert embedding_std(7 * spread) == pytest.approx(embedding_std(spread), rel=1e-5)  # length does not count


def test_embedding_std_in_closed_form() -> None:
    assert embedding_std(torch.full((10, 5), 3.0)) == pytest.approx(0, abs=1e-7)
    assert embedding_std(torch.ones(1, 5)) == 0
    both_ways = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 50)  # deviation 1 (of 100 values) and 0
    assert embedding_std(both_ways) == pytest.approx(math.sqrt(100 / 99) / 2)


# The callback.


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run.start(tmp_path / "run", "pretrain", "", {}) as run:
        return run


class Driver:
    """Calls a Monitor as Lightning does; the default is one part a step, a hundred steps."""

    def __init__(self, monitor: Monitor, total: int = 100, accumulate: int = 1) -> None:
        self.monitor = monitor
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
        self.trainer: Any = SimpleNamespace(
            global_step=0, max_steps=total, accumulate_grad_batches=accumulate, optimizers=[optimizer]
        )
        self.parts = 0
        monitor.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def step(
        self,
        embeddings: torch.Tensor | None = HEALTHY,
        count: int = 1,
        loss: float = 0.5,
        skipped: bool = False,
        **more: float,
    ) -> None:
        for _ in range(count * self.trainer.accumulate_grad_batches):
            self.parts += 1
            self.trainer.global_step = self.parts // self.trainer.accumulate_grad_batches
            outputs = {"loss": torch.tensor(loss), **{name: torch.tensor(value) for name, value in more.items()}}
            if embeddings is not None:
                outputs["embeddings"] = embeddings
            module = SimpleNamespace(monitored=outputs, skipped=skipped)
            self.monitor.on_train_batch_start(self.trainer, module, None, self.parts - 1)  # type: ignore[arg-type]
            self.monitor.on_train_batch_end(self.trainer, module, None, None, self.parts - 1)


def driver(run: Run, *, total: int = 100, accumulate: int = 1, probe: Any = None, **config: Any) -> Driver:
    settings = MonitorConfig(**({"log_every": 1, "collapse_steps": 5} | config))
    return Driver(Monitor(settings, run, images=32, epoch_steps=4, probe=probe), total, accumulate)


def said(run: Run) -> str:
    path = run.path / "train.log"
    return path.read_text() if path.exists() else ""


def test_a_collapse_stops_the_training_and_says_what_it_saw(run: Run) -> None:
    training = driver(run)
    training.step(HEALTHY, 3)
    training.step(COLLAPSED, 5)
    with pytest.raises(TrainingAborted) as caught:
        training.step(COLLAPSED)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert f"{embedding_std(COLLAPSED):.2g} since step 4" in message
    assert "0.25 is healthy" in message  # 1 / sqrt(16)
    for remedy in ("optim.lr", "optim.warmup", "train.batch_size", "monitor.collapse=warn"):
        assert remedy in message
    assert len(message.splitlines()) <= 6


def test_a_short_dip_is_no_collapse(run: Run) -> None:
    training = driver(run)
    for _ in range(4):
        training.step(COLLAPSED, 5)
        training.step(HEALTHY)
    assert "collapsed" not in said(run)


@pytest.mark.parametrize(("strength", "alarms"), [(0.12, False), (0.08, True)])
def test_the_threshold_is_a_tenth_of_healthy(strength: float, alarms: bool, run: Run) -> None:
    direction = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
    near = direction + strength / math.sqrt(WIDTH) * HEALTHY  # a cap of the sphere of that share of its spread
    assert embedding_std(near) * math.sqrt(WIDTH) == pytest.approx(strength, rel=0.1)
    training = driver(run, collapse="warn")
    training.step(near, 7)
    assert ("collapsed" in said(run)) is alarms


def test_warn_goes_on_and_repeats_itself_only_after_as_many_steps(run: Run) -> None:
    training = driver(run, collapse="warn")
    training.step(COLLAPSED, 17)
    assert said(run).count("warning: the embeddings have collapsed") == 3
    assert len(read_metrics(run.path)) == 17


def test_off_says_nothing_and_still_measures(run: Run) -> None:
    training = driver(run, collapse="off")
    training.step(COLLAPSED, 20)
    assert "collapsed" not in said(run)
    assert read_metrics(run.path)[-1]["embedding_std"] == pytest.approx(embedding_std(COLLAPSED))


def test_steps_are_counted_even_when_few_are_logged(run: Run) -> None:
    training = driver(run, log_every=10, collapse_steps=20)
    training.step(COLLAPSED, 29)
    with pytest.raises(TrainingAborted, match="since step 10"):
        training.step(COLLAPSED)


def test_a_skipped_step_is_neither_remembered_nor_logged(run: Run) -> None:
    training = driver(run)
    training.step(count=2)
    training.step(loss=math.nan, embeddings=torch.full((ROWS, WIDTH), math.nan), skipped=True)
    training.step()
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2, 4]
    assert math.isfinite(read_metrics(run.path)[-1]["rankme"])


def test_a_line_of_metrics(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    training = driver(run, total=10, log_every=4)
    training.step(count=3)
    assert not (run.path / "metrics.jsonl").exists()
    training.step(loss=0.75, accuracy=0.5)
    training.step(count=6)
    lines = read_metrics(run.path)
    assert [line["step"] for line in lines] == [4, 8, 10]
    first = lines[0]
    assert (first["loss"], first["accuracy"], first["lr"], first["epoch"]) == (0.75, 0.5, 0.25, 1)
    assert first["images_per_second"] > 0
    assert lines[-1]["seconds_left"] == 0
    assert first["embedding_std"] == pytest.approx(embedding_std(HEALTHY))
    assert first["rankme"] == pytest.approx(rankme(torch.cat([HEALTHY] * 4)), rel=1e-4)
    assert all(json.loads(json.dumps(line, allow_nan=False)) == line for line in lines)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 10/10  epoch 2.5  loss 0.5000  embedding_std" in shown.err
    assert "images/s  0:00 left" in shown.err


def test_a_method_without_embeddings_is_watched_too(run: Run) -> None:
    training = driver(run)
    training.step(None, 3)
    assert {"embedding_std", "rankme"}.isdisjoint(read_metrics(run.path)[-1])


def test_the_rank_is_of_many_small_batches(run: Run) -> None:
    """A batch of 64 could show no rank above 64; one class a batch would look collapsed."""
    training = driver(run, collapse="off")
    for number in range(10):
        training.step(torch.eye(WIDTH)[number].expand(ROWS, -1))
    assert read_metrics(run.path)[-1]["rankme"] == pytest.approx(10, rel=1e-3)
    training.step(torch.eye(WIDTH)[0].expand(ROWS, -1), RANKME_ROWS // ROWS)
    assert read_metrics(run.path)[-1]["rankme"] == pytest.approx(1, rel=1e-3)  # and forgets
    assert sum(map(len, training.monitor._recent)) == RANKME_ROWS


def test_accumulated_parts_are_one_step(run: Run) -> None:
    training = driver(run, accumulate=3)
    training.step(count=4)
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("every", "steps"), [(2, [8, 16, 18]), (0, []), (9, [18])])
def test_the_probe_runs_every_so_many_epochs_and_at_the_end(every: int, steps: list[int], run: Run) -> None:
    training = driver(run, total=18, knn_every=every, log_every=100, probe=lambda: {"knn_val_auroc": 0.875})
    training.step(count=18)
    probed = [line for line in read_metrics(run.path) if "knn_val_auroc" in line]
    assert [line["step"] for line in probed] == steps
    assert all(line["knn_val_auroc"] == 0.875 for line in probed)
    assert said(run).count("knn_val_auroc 0.875") == len(steps)


def test_the_probes_time_is_not_training_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(monitors, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def probe() -> dict[str, float]:
        clock.now += 1000
        return {"knn_val_auroc": 0.5}

    training = driver(run, total=8, knn_every=1, probe=probe)
    for _ in range(8):
        clock.now += 2
        training.step()
    rates = [line["images_per_second"] for line in read_metrics(run.path) if "loss" in line]
    assert rates == pytest.approx([16] * 8)
    left = [line["seconds_left"] for line in read_metrics(run.path) if "loss" in line]
    assert left == pytest.approx([14, 12, 10, 8, 6, 4, 2, 0])


def test_a_plain_line_at_most_every_ten_seconds_and_at_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(monitors, "time", SimpleNamespace(monotonic=lambda: clock.now))
    training = driver(run, total=40)
    for _ in range(40):
        clock.now += 1
        training.step()
    assert [line.split()[2] for line in said(run).splitlines()] == ["10/40", "20/40", "30/40", "40/40"]


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (75, "1:15"), (3599.6, "1:00:00"), (7384, "2:03:04")])
def test_clock(seconds: float, shown: str) -> None:
    assert monitors._clock(seconds) == shown


@pytest.mark.parametrize("settings", [{"log_every": 0}, {"knn_every": -1}, {"collapse": "halt"}, {"collapse_steps": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MonitorConfig(**settings)
