"""The cells of the resume matrix: trainings that are stopped in every way, in this process or in others.

A cell's outcome is the weights at the end and the samples of every batch; both must be those of a training that
nothing has stopped.
"""

import itertools
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ranks
import torch

METHODS = ("simclr", "byol", "mae", "rotation")  # of the matrix; of the others there is a cell each
STOPS = {"mid-epoch 0": (2,), "epoch end": (4,), "mid-epoch 1": (6,), "twice": (3, 7)}
HOWS = ("kill -9", "SIGTERM")
STEPS, BATCH, EPOCH = 9, 8, 4
SMALL = {"hidden": 32, "out": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "simclr": SMALL,
    "byol": SMALL,
    "rotation": {"all_four": False},  # the variant that draws
}


@dataclass(frozen=True)
class Cell:
    """One way to be stopped. ``stop`` None is never."""

    method: str
    world: int
    stop: str | None
    workers: int
    accumulate: int
    how: str

    @property
    def never(self) -> "Cell":
        """The same without a stop: in this process, as neither workers nor place may matter."""
        return replace(self, stop=None, workers=0, how="")

    def __str__(self) -> str:
        parts = [self.method, f"world {self.world}", self.stop, f"workers {self.workers}"]
        return ", ".join(str(part) for part in [*parts, f"accumulate {self.accumulate}", self.how])


@dataclass(frozen=True)
class Outcome:
    """The weights by name, and the ids of each batch of each rank, ``RANK/BATCH``."""

    weights: dict[str, torch.Tensor]
    ids: dict[str, list[int]]

    def same(self, other: "Outcome") -> bool:
        """To the last bit."""
        equal = all(torch.equal(self.weights[name], other.weights[name]) for name in self.weights)
        return self.weights.keys() == other.weights.keys() and equal and self.ids == other.ids


def all_cells(worlds: Sequence[int]) -> list[Cell]:
    return [
        Cell(method, world, stop, workers, accumulate, how)
        for method, world, stop, workers, accumulate, how in itertools.product(
            METHODS, worlds, STOPS, (0, 2), (1, 2), HOWS
        )
    ]


def pairwise() -> list[Cell]:
    """Few cells in which any two settings of two factors meet; greedily, always in the same order."""
    cells = all_cells((1, 2))
    missing = {pair for cell in cells for pair in _pairs(cell)}
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(missing & _pairs(cell)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[Any]:
    return set(itertools.combinations(vars(cell).items(), 2))


# In this process: world 1, by ``training.fit`` alone.


class Killed(BaseException):
    """What a kill -9 is to a process that must go on: nothing more is done or saved."""


class Recorder(pl.Callback):
    """Notes the ids of every batch, and stops at a step. The last callback but the one that saves."""

    def __init__(self, ids: dict[str, list[int]], stop: int | None, how: str, rank: int = 0) -> None:
        self.ids, self.stop, self.how, self.rank = ids, stop, how, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        name = f"{self.rank}/{batch_idx}"
        assert self.ids.setdefault(name, batch.ids.tolist()) == batch.ids.tolist(), f"batch {name} came back otherwise"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.stop or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise Killed


def in_this_process(cell: Cell, store: Any, folder: Path) -> Outcome:
    """Train, with the cell's stops."""
    ids: dict[str, list[int]] = {}
    for number, stop in enumerate([*STOPS.get(cell.stop or "", ()), None]):
        weights = _segment(cell, store, folder, Recorder(ids, stop, cell.how), resume=number > 0)
    return Outcome(weights, ids)


def _segment(cell: Cell, store: Any, folder: Path, recorder: Recorder, resume: bool) -> dict[str, torch.Tensor]:
    from sslmed.config import Interrupted
    from sslmed.data import modality
    from sslmed.data.loading import ViewDataset
    from sslmed.methods import METHODS as KINDS
    from sslmed.models.backbones import build
    from sslmed.optim import OptimConfig
    from sslmed.run import Run
    from sslmed.training.fit import fit, seed_everything
    from sslmed.training.monitors import MonitorConfig
    from sslmed.training.trainer import TrainConfig

    kind, policy = KINDS[cell.method], modality.named("xray")
    seed_everything(0)
    backbone = build(kind.example.model_copy(update={"drop_path": 0.1}), 32, 0)  # draws from torch's own random state
    settings = kind.example_settings | VARIANTS.get(cell.method, {})
    method = kind(kind.Config(name=cell.method, **settings), backbone)
    dataset = ViewDataset(store, policy, method.views(policy), 32, 1, 0, None)
    train = TrainConfig(
        max_steps=STEPS, batch_size=BATCH, accumulate=cell.accumulate, precision=32, devices="cpu", save_every_steps=3
    )
    run = Run.resume(folder, "pretrain") if resume else Run.start(folder, "pretrain", "", {})
    rows = store.rows("train", "unlabelled")[: BATCH * EPOCH]
    try:
        monitor = MonitorConfig(log_every=1, knn_every=0)
        fit(
            method,
            dataset,
            rows,
            train,
            OptimConfig(final_weight_decay=0.01),  # one that moves
            run,
            monitor=monitor,
            workers=cell.workers,
            recipe={},
            callbacks=[recorder],
        )
        assert recorder.stop is None, "the training was not stopped"
    except (Killed, Interrupted):
        pass
    finally:
        run.close()
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


# In other processes: the whole command, on one rank or two.


def in_processes(cell: Cell, store: Path, folder: Path) -> Outcome:
    """Pretrain by the command, with the cell's stops; of two ranks the second is stopped."""
    from sslmed.training.checkpoint_files import load

    folder.mkdir(parents=True)
    for number, stop in enumerate([*STOPS.get(cell.stop or "", ()), None]):
        codes = _launched(cell, store, folder, stop, resume=number > 0, meeting=folder / f"meeting-{number}")
        wanted = {None: 0, "SIGTERM": 143, "kill -9": -9}[stop and cell.how]
        assert codes[-1] == wanted, f"{cell}: the last rank ended with {codes[-1]}, not with {wanted}"
        assert all(codes) == bool(stop), f"{cell}: exit codes {codes}"
    ids: dict[str, list[int]] = {}
    for path in sorted(folder.glob("ids-*.jsonl")):
        for line in path.read_text().splitlines():
            name, batch = json.loads(line)
            assert ids.setdefault(name, batch) == batch, f"{cell}: batch {name} came back otherwise"
    return Outcome(load(folder / "run" / "checkpoints" / "last.ckpt")["state_dict"], ids)


def _launched(cell: Cell, store: Path, folder: Path, stop: int | None, resume: bool, meeting: Path) -> list[int]:
    """The exit code of each rank."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(_recipe(cell)))
    started = []
    context = ranks.context()
    server = str(forkserver._forkserver._forkserver_address)  # type: ignore[attr-defined]
    for rank in range(cell.world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cell.world, "LOCAL_WORLD_SIZE": cell.world}
        env = {name: str(value) for name, value in place.items()} if cell.world > 1 else {}
        env |= {"SSLMED_MEETING": str(meeting), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        here = stop if rank == cell.world - 1 else None
        words = [str(each) for each in (recipe, store, folder / "run", int(resume), here or 0, cell.how, folder, rank)]
        started.append(context.Process(target=child, args=(words, env, server)))
        started[-1].start()
    return [_wait(process) for process in started]


def _wait(process: Any) -> int:
    process.join(240)
    code: int | None = process.exitcode
    if code is None:
        process.kill()
        raise TimeoutError("a rank did not end")
    return code


def _recipe(cell: Cell) -> dict[str, Any]:
    from sslmed.methods import METHODS as KINDS

    kind = KINDS[cell.method]
    return {
        "backbone": kind.example.model_copy(update={"drop_path": 0.1}).model_dump(mode="json"),
        "data": {"size": 32, "workers": cell.workers},
        "method": {"name": cell.method, **kind.example_settings, **VARIANTS.get(cell.method, {})},
        "train": {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "accumulate": cell.accumulate,
            "precision": 32,
            "save_every_steps": 3,
        },
        "monitor": {"knn_every": 0, "log_every": 1},
    }


def child(words: Sequence[str], env: dict[str, str], server: str) -> None:
    """One rank, from start to end or stop; ends with the command's exit code.

    Its DataLoader's workers come from the forkserver at ``server`` too; one of its own would import torch again.
    """
    from sslmed.commands import pretrain as commands
    from sslmed.config import SslmedError
    from sslmed.training import fit

    os.environ |= env
    forkserver._forkserver._forkserver_address = server  # type: ignore[attr-defined]
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    recipe, store, out, resume, stop, how, folder, rank = words
    with open(Path(folder) / f"ids-{rank}-{os.getpid()}.jsonl", "w", buffering=1) as file:
        build = fit.build_trainer

        def with_recorder(config: Any, total: int, callbacks: list[Any], unused: bool) -> pl.Trainer:
            recorder = _ToFile(file, int(stop) or None, how, int(rank))
            return build(config, total, [*callbacks[:-2], recorder, *callbacks[-2:]], unused)

        fit.build_trainer = with_recorder
        _train_on_few(commands)
        try:
            commands.pretrain(recipe, store, out, resume=bool(int(resume)))
        except SslmedError as error:
            raise SystemExit(error.exit_code) from None


class _ToFile(Recorder):
    """Writes down what it notes, and really kills."""

    def __init__(self, file: Any, stop: int | None, how: str, rank: int) -> None:
        super().__init__({}, stop, how, rank)
        self.file = file

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.file.write(json.dumps([f"{self.rank}/{batch_idx}", batch.ids.tolist()]) + "\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        except Killed:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_on_few(commands: Any) -> None:
    """Four steps an epoch."""
    rows = commands._training_rows
    commands._training_rows = lambda store: rows(store)[: BATCH * EPOCH]


def outcomes(cells: Sequence[Cell], store: Any, folder: Path, alone_here: bool = False) -> Iterator[tuple[Cell, bool]]:
    """Whether each cell ends as its undisturbed twin does; every twin is trained once.

    With ``alone_here`` those of one process are trained in this one, where a kill -9 is an exception that nobody
    catches.
    """
    known: dict[Cell, Outcome] = {}

    def outcome(cell: Cell, name: str) -> Outcome:
        if alone_here and cell.world == 1:
            return in_this_process(cell, store, folder / name)
        return in_processes(cell, store.path, folder / name)

    for number, cell in enumerate(cells):
        twin = cell.never
        if twin not in known:
            known[twin] = outcome(twin, f"never-{len(known)}")
        yield cell, outcome(cell, f"cell-{number}").same(known[twin])
