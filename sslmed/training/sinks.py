"""The places that metrics are copied to: how each is opened, fed and closed. `sslmed.training.loggers` guards them."""

import csv
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from sslmed.durable import write_atomically
from sslmed.run import read_metrics

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]
PROJECT = "sslmed"  # what a run is filed under, where the environment names nothing else
CLOSE_SECONDS = 5.0
INIT_SECONDS = 15.0  # in which W&B must answer
RUN_TAG = "sslmed.run"
# Left alone, MLflow tries each request for minutes. It and W&B also report on their users.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
WANDB_SETTINGS = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


@dataclass(frozen=True)
class Origin:
    """What a place learns of a run. ``recipe`` is flat and has no paths; ``start`` is the steps done before."""

    path: Path
    run_id: str
    recipe: Mapping[str, Any]
    start: int
    say: Callable[[str], None]


class Sink(Protocol):
    """A place that takes metrics. It may raise anything."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""

    def flush(self) -> None:
        """Have what was logged on the disk, where there is one: a checkpoint was saved."""

    def close(self, ok: bool) -> None:
        """End; ``ok`` says whether training came to its end."""


class Table:
    """metrics.csv beside metrics.jsonl: a row a line, with the columns of all of them.

    It is written anew from metrics.jsonl each time, so that a resumed run has no row twice.
    """

    def __init__(self, origin: Origin) -> None:
        self._run = origin.path

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: metrics.jsonl has it."""

    def flush(self) -> None:
        if not (self._run / "metrics.jsonl").exists():
            return
        rows = read_metrics(self._run)
        columns = dict.fromkeys(name for row in rows for name in row)
        with write_atomically(self._run / "metrics.csv") as partial, partial.open("w", newline="") as file:
            table = csv.DictWriter(file, list(columns))
            table.writeheader()
            table.writerows(rows)

    def close(self, ok: bool) -> None:
        self.flush()


class TensorBoard:
    """Event files in the run's folder ``tensorboard``."""

    def __init__(self, origin: Origin) -> None:
        from pytorch_lightning.loggers import TensorBoardLogger

        # what an earlier process wrote of later steps, or of all when there was no checkpoint, is not shown
        purge = origin.start + 1 if origin.start else 0
        self._logger = TensorBoardLogger(origin.path, "tensorboard", "", default_hp_metric=False, purge_step=purge)
        if not origin.start:
            lines = [f"    {name}: {value}" for name, value in origin.recipe.items()]  # indented is code in Markdown
            self._logger.experiment.add_text("recipe", "\n".join([f"    run: {origin.run_id}", *lines]), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._logger.log_metrics(dict(values), step)

    def flush(self) -> None:
        self._logger.experiment.flush()

    def close(self, ok: bool) -> None:
        self._logger.experiment.close()


class WeightsAndBiases:
    """A run of the id of ours in W&B, or in the run's folder ``wandb`` to be sent later.

    Where the environment says no mode it is online if W&B finds an API key, else offline: nobody is asked to log in.
    """

    def __init__(self, origin: Origin) -> None:
        for name, value in WANDB_SETTINGS.items():
            os.environ.setdefault(name, value)
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _wandb_key(wandb.setup().settings):
            mode = "offline"
            origin.say(f"wandb: no API key, so it writes to {origin.path / 'wandb'}; send that with `wandb sync`")
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # user, host, command line
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            login_timeout=1.0,
            init_timeout=INIT_SECONDS,
            finish_timeout=CLOSE_SECONDS,  # also of the hook at the end of the process
        )
        # not Lightning's logger: it passes an argument that W&B warns of
        self._run = wandb.init(
            name=origin.run_id,
            id=origin.run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=origin.path,
            config=dict(origin.recipe),
            settings=settings,
            mode=mode,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own count never goes back, as a resumed run does

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def flush(self) -> None:
        """Nothing: it sends by itself."""

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class MLflow:
    """A run with our id as its name and as its tag ``sslmed.run``.

    It is on the server of ``MLFLOW_TRACKING_URI``, else in the run's ``mlflow.db``. The run is made here and not by
    Lightning, which would add user name, script and commit.
    """

    def __init__(self, origin: Origin) -> None:
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells of each table of a new mlflow.db
        from mlflow.tracking import MlflowClient
        from pytorch_lightning.loggers import MLFlowLogger

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(origin.path / 'mlflow.db').resolve()}"
        client = MlflowClient(uri)
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else client.create_experiment(title)
        found = client.search_runs([number], f"tags.`{RUN_TAG}` = '{origin.run_id}'", max_results=1)
        made = found[0] if found else client.create_run(number, run_name=origin.run_id, tags={RUN_TAG: origin.run_id})
        self._logger = MLFlowLogger(tracking_uri=uri, run_id=made.info.run_id)
        if found:
            client.update_run(made.info.run_id, status="RUNNING")
        else:
            self._logger.log_hyperparams(dict(origin.recipe))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._logger.log_metrics(values, step)

    def flush(self) -> None:
        """Nothing: every call has sent its own."""

    def close(self, ok: bool) -> None:
        self._logger.finalize("success" if ok else "failed")


def _wandb_key(settings: Any) -> bool:
    """Whether W&B will find who the user is, without asking."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        known = netrc(os.environ.get("NETRC"))
    except (OSError, NetrcParseError):
        return False
    return known.authenticators(urlsplit(settings.base_url).hostname or "") is not None


SINKS: dict[LoggerName, Callable[[Origin], Sink]] = {
    "tensorboard": TensorBoard,
    "csv": Table,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
