"""Copies of the metrics: each step once, nothing private, and no failure of theirs reaches the training."""

import csv
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sslmed.config import MissingDependencyError
from sslmed.training import loggers, sinks
from sslmed.training.loggers import LoggerName, Mirrors

RUN_ID = "0123456789ab"
RECIPE = {
    "backbone": {"name": "resnet18", "init": "/data/Anna Meier/last.ckpt"},
    "train": {"batch_size": 8, "max_steps": None},
    "views": [{"crop": [0.5, 1.0], "from": "~/secret"}],
}
FLAT = {
    "backbone.name": "resnet18",
    "backbone.init": "(a path)",
    "train.batch_size": 8,
    "train.max_steps": None,
    "views": [{"crop": [0.5, 1.0], "from": "(a path)"}],
}


class Fake:
    """A place that remembers what it was told; ``fails`` names the call that raises, ``wait`` holds up each."""

    def __init__(self, fails: str = "", wait: threading.Event | None = None) -> None:
        self.fails, self.wait, self.seen = fails, wait, list[tuple[Any, ...]]()
        self.origin: sinks.Origin | None = None

    def __call__(self, origin: sinks.Origin) -> "Fake":
        self.origin = origin
        return self.told("open")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.told("log", step, dict(values))

    def flush(self) -> None:
        self.told("flush")

    def close(self, ok: bool) -> None:
        self.told("close", ok)

    def told(self, *what: Any) -> "Fake":
        if self.wait is not None:
            self.wait.wait(20)
        if what[0] == self.fails:
            raise ConnectionRefusedError("nobody there\nand a long story")
        self.seen.append(what)
        return self


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def mirrors(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mirrors]:
    monkeypatch.setattr(loggers, "find_spec", lambda _: SimpleNamespace(origin="somewhere"))

    def make(*names: LoggerName, start: int = 0, **fakes: Fake) -> Mirrors:
        for name, fake in fakes.items():
            monkeypatch.setitem(sinks.SINKS, name, fake)
        return Mirrors([*names, *fakes], tmp_path, RUN_ID, RECIPE, said.append, start)

    return make


def events(run: Path) -> EventAccumulator:
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return read


def jsonl(run: Path, *lines: Mapping[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# TensorBoard.


@pytest.mark.parametrize("start", [0, 4])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(
    start: int, mirrors: Any, tmp_path: Path, said: list[str]
) -> None:
    killed = mirrors("tensorboard")
    for step in range(1, 7):
        killed.log(step, {"loss": float(step), "knn": 0.5})
    killed.flush()  # and no close
    assert [scalar.step for scalar in events(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    resumed = mirrors("tensorboard", start=start)
    for step in range(start + 1, 6):
        resumed.log(step, {"loss": 10.0 * step})
    resumed.close()
    expected = [(step, float(step) if step <= start else 10.0 * step) for step in range(1, 6)]
    assert [(scalar.step, scalar.value) for scalar in events(tmp_path).Scalars("loss")] == expected
    assert said == []


def test_tensorboard_gets_the_recipe_and_the_id_alone(mirrors: Any, tmp_path: Path) -> None:
    run = mirrors("tensorboard")
    run.log(1, {"loss": 1.0})
    run.close()
    read = events(tmp_path)
    assert read.Tags()["scalars"] == ["loss"]
    assert read.Tags()["tensors"] == ["recipe/text_summary"]
    (text,) = read.Tensors("recipe/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines == [f"    run: {RUN_ID}", *(f"    {name}: {value}" for name, value in FLAT.items())]
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or not {
            word for word in (b"Anna", b"secret", bytes(tmp_path)) if word in file.read_bytes()
        }


# CSV.


def test_the_csv_file_is_metrics_jsonl(mirrors: Any, tmp_path: Path) -> None:
    run = mirrors("csv")
    run.flush()  # nothing was logged yet
    assert not (tmp_path / "metrics.csv").exists()
    jsonl(tmp_path, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"step": 2, "knn": 0.75, "note": "a, b"})
    run.log(1, {"loss": 2.5})
    run.flush()
    jsonl(tmp_path, {"step": 1, "loss": 2.5}, {"step": 2, "knn": 0.5, "note": "a, b"})  # it was rewound and went on
    mirrors("csv", start=1).close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "2.5", "knn": "", "note": ""},
        {"step": "2", "loss": "", "knn": "0.5", "note": "a, b"},
    ]


# What is missing or fails.


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["absent", "a folder of its name"])
def test_a_library_that_is_not_installed_is_refused_at_the_start(
    name: LoggerName, spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: spec)
    with pytest.raises(MissingDependencyError, match=rf"has {name}, .*pip install 'sslmed\[loggers\]'") as caught:
        Mirrors([name], tmp_path, RUN_ID, RECIPE, print)
    assert caught.value.exit_code == 69
    Mirrors(["csv"], tmp_path, RUN_ID, RECIPE, print).close()  # needs none


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])  # here, and in a thread of its own
@pytest.mark.parametrize("call", ["open", "log", "close"])
def test_what_fails_is_switched_off_with_one_line(name: str, call: str, mirrors: Any, said: list[str]) -> None:
    bad, good = Fake(fails=call), Fake()
    run = mirrors(**{name: bad, "csv": good})
    for step in range(1, 4):
        run.log(step, {"loss": 1.0})
        time.sleep(0.02)
        run.flush()
    run.close()
    run.log(4, {"loss": 1.0})
    assert len(said) == 1
    assert said[0].startswith(f"warning: {name} gets no more metrics (ConnectionRefusedError: nobody there).")
    each = [what for step in (1, 2, 3) for what in (("log", step, {"loss": 1.0}), ("flush",))]
    assert good.seen == [("open",), *each, ("close", True)]


def test_a_file_in_the_way_of_tensorboard_stops_nothing(mirrors: Any, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "tensorboard").write_text("")
    good = Fake()
    run = mirrors("tensorboard", csv=good)
    run.log(1, {"loss": 1.0})
    assert [line.split(" (")[0] for line in said] == ["warning: tensorboard gets no more metrics"]
    assert good.seen[-1] == ("log", 1, {"loss": 1.0})


def test_numbers_alone_are_copied(mirrors: Any) -> None:
    fake = Fake()
    run = mirrors(csv=fake)
    run.log(1, {"loss": 1, "path": "/data/anna", "knn": None, "ok": True, "nan": float("inf")})
    run.log(2, {"note": "text"})
    assert fake.seen[1:] == [("log", 1, {"loss": 1.0, "nan": float("inf")})]
    assert fake.origin is not None
    assert fake.origin.recipe == FLAT


# The network.


@pytest.mark.parametrize("ok", [True, False])
def test_a_thread_passes_everything_on_in_order(ok: bool, mirrors: Any, said: list[str]) -> None:
    fake = Fake()
    run = mirrors(wandb=fake)
    for step in range(50):
        run.log(step, {"loss": float(step)})
    run.close(ok)
    assert fake.seen == [("open",), *(("log", step, {"loss": float(step)}) for step in range(50)), ("close", ok)]
    assert said == []


def test_a_network_that_hangs_holds_up_neither_steps_nor_the_end(
    mirrors: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "QUEUE", 10)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    answer = threading.Event()
    run = mirrors(mlflow=Fake(wait=answer))
    started = time.monotonic()
    for step in range(200):
        run.log(step, {"loss": 1.0})
    assert time.monotonic() - started < 1
    run.close()
    assert time.monotonic() - started < 3
    answer.set()
    assert [line.split(";")[0].split(" (")[0] for line in said] == [
        "warning: mlflow is slower than training",
        "warning: mlflow gets no more metrics",
    ]


def test_a_library_that_ends_its_process_ends_its_thread(mirrors: Any, said: list[str]) -> None:
    def leave(_: sinks.Origin) -> Any:
        raise SystemExit(1)

    run = mirrors(wandb=leave)
    time.sleep(0.05)
    run.log(1, {"loss": 1.0})
    assert [line[:40] for line in said] == ["warning: wandb gets no more metrics (Run"]


class Netrc:
    """Of a user who is logged in to ``host``."""

    def __init__(self, host: str) -> None:
        self.host = host

    def authenticators(self, host: str) -> tuple[str, str, str] | None:
        return ("user", "", "key") if host == self.host else None


@pytest.mark.parametrize(
    ("environment", "host", "mode"),
    [
        ({}, "", "offline"),
        ({}, "api.other", "offline"),
        ({}, "api.here", None),  # W&B's own default
        ({"WANDB_API_KEY": "x"}, "", None),
        ({"WANDB_MODE": "online"}, "", "online"),
        ({"WANDB_MODE": "disabled", "WANDB_PROJECT": "mine"}, "api.here", "disabled"),
    ],
)
def test_wandb_never_asks_and_tells_nothing_else(
    environment: dict[str, str],
    host: str,
    mode: str | None,
    mirrors: Any,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, seen = {"HOME": str(tmp_path), "WANDB_SILENT": "false", **environment}, list[Any]()
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=seen.append, finish=lambda **how: seen.append(how))
    fake = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(api_key=None, base_url="https://api.here/")),
        Settings=SimpleNamespace,
        init=lambda **how: seen.append(how) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(os, "environ", kept)
    monkeypatch.setattr(sinks, "netrc", lambda _: Netrc(host))
    copied = mirrors("wandb")
    copied.log(3, {"loss": 1.5})
    copied.close(False)
    begun, line, end = seen
    assert (begun.pop("mode"), begun.pop("project")) == (mode, kept.get("WANDB_PROJECT", "sslmed"))
    settings = vars(begun.pop("settings"))
    assert begun == {"name": RUN_ID, "id": RUN_ID, "resume": "allow", "dir": tmp_path, "config": FLAT}
    private = ("disable_code", "disable_git", "x_disable_meta", "x_disable_machine_info", "x_disable_stats")
    assert [settings[name] for name in private] == [True] * 5
    assert (settings["console"], settings["x_save_requirements"]) == ("off", False)
    assert (line, end) == ({"loss": 1.5, "step": 3}, {"exit_code": 1})
    assert kept["WANDB_ERROR_REPORTING"] == "false"
    assert kept["WANDB_SILENT"] == "false", "what the user has set stands"
    assert [text.partition(",")[0] for text in said] == (["wandb: no API key"] if mode == "offline" else [])


class Server:
    """What an MLflow client finds: experiments and runs, or none yet."""

    def __init__(self) -> None:
        self.uri, self.experiments, self.runs, self.seen = "", dict[str, Any](), list[Any](), list[Any]()

    def __call__(self, uri: str) -> "Server":
        self.uri = uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = SimpleNamespace(experiment_id="7")
        return "7"

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        assert (experiments, max_results) == (["7"], 1)
        return [run for run in self.runs if query == f"tags.`sslmed.run` = '{run.tags['sslmed.run']}'"]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.runs.append(SimpleNamespace(info=SimpleNamespace(run_id="made"), name=run_name, tags=tags))
        return self.runs[-1]

    def update_run(self, run_id: str, status: str) -> None:
        self.seen.append((run_id, status))

    def logger(self, tracking_uri: str, run_id: str) -> Any:
        assert tracking_uri == self.uri
        return SimpleNamespace(
            log_hyperparams=self.seen.append,
            log_metrics=lambda values, step: self.seen.append((run_id, step, values)),
            finalize=self.seen.append,
        )


def test_mlflow_goes_on_with_the_run_of_our_id(
    mirrors: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, kept = Server(), {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mlflow.tracking", SimpleNamespace(MlflowClient=server))
    monkeypatch.setattr("pytorch_lightning.loggers.MLFlowLogger", server.logger)
    monkeypatch.setattr(os, "environ", kept)
    for start, ok in ((0, False), (3, True)):
        run = mirrors("mlflow", start=start)
        run.log(start + 1, {"loss": 0.5})
        run.close(ok)
    assert server.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert [(run.name, run.tags) for run in server.runs] == [(RUN_ID, {"sslmed.run": RUN_ID})]
    first, again = [FLAT, ("made", 1, {"loss": 0.5}), "failed"], [("made", 4, {"loss": 0.5}), "success"]
    assert server.seen == [*first, ("made", "RUNNING"), *again]
    assert said == []
    assert kept["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3", "what the user has set stands"
    assert (kept["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], kept["MLFLOW_DISABLE_TELEMETRY"]) == ("1", "true")
    kept["MLFLOW_TRACKING_URI"] = "http://server"
    mirrors("mlflow").close()
    assert server.uri == "http://server"
