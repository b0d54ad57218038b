import fcntl
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from sslmed.config import (
    DataError,
    Interrupted,
    MissingInputError,
    OutputExistsError,
    TemporaryError,
    TrainingAborted,
    UsageError,
)
from sslmed.run import Run, read, read_metrics, versions

FACTS: dict[str, Any] = {"seed": 3, "data_fingerprint": "abc"}
RECIPE = "method: {name: simclr}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def finished(path: Path, error: BaseException | None = None) -> Path:
    try:
        with Run.start(path, "pretrain", RECIPE, FACTS) as run:
            run.log(1, loss=0.5)
            if error is not None:
                raise error
    except BaseException as raised:
        if raised is not error:
            raise
    return path


def work_in(path: str, ready: Any, leave: Any) -> None:
    with Run.resume(path, "pretrain"):
        ready.set()
        leave.wait(30)


# What is in the folder.


def test_a_run_says_what_it_was(path: Path) -> None:
    created = Run.start(path, "pretrain", RECIPE, FACTS)
    assert read(path)["status"] == "created"  # killed here, it can be resumed already
    with created as run:
        running = read(path)
        run.finish({"score": 0.5, "files": ("a",), "intervals": {"auroc": (float("nan"), 1)}})
        assert (run.recipe, run.checkpoint, run.artifact) == (
            path / "recipe.yaml",
            path / "checkpoints" / "last.ckpt",
            path / "artifact",
        )
        assert not run.done
    assert run.recipe.read_text() == RECIPE
    assert run.checkpoint.parent.is_dir()
    assert running["status"] == "running"
    assert running["pid"] == os.getpid()
    assert "exit_code" not in running
    state = read(path)
    assert (state["status"], state["exit_code"], state["command"]) == ("done", 0, "pretrain")
    assert {name: state[name] for name in FACTS} == FACTS
    assert state["threads"] == torch.get_num_threads()
    assert state["versions"] == versions()
    assert len(state["id"]) == 12
    assert state["started"][:2] == "20"
    assert run.done
    assert run.result == state["result"] == {"score": 0.5, "files": ["a"], "intervals": {"auroc": [None, 1]}}
    assert run.fact("seed") == 3
    assert run.fact("nothing") is None


def test_versions_of_what_decides_the_numbers() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "sslmed", "timm", "albumentations", "numpy"} <= set(found)
    assert "absent" not in found.values()


def test_two_runs_have_two_ids(tmp_path: Path) -> None:
    assert read(finished(tmp_path / "a"))["id"] != read(finished(tmp_path / "b"))["id"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (None, "done", 0),
        (TrainingAborted("collapsed"), "failed", 3),
        (DataError("damaged"), "failed", 65),
        (ValueError("a bug"), "failed", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (Interrupted("saved", signal.SIGINT), "interrupted", 130),
        (Interrupted("saved", signal.SIGTERM), "interrupted", 143),
    ],
    ids=repr,
)
def test_how_it_ended(error: BaseException | None, status: str, code: int, path: Path) -> None:
    state = read(finished(path, error))
    assert (state["status"], state["exit_code"]) == (status, code)


def test_a_resumed_run_keeps_its_facts_and_forgets_its_end(path: Path) -> None:
    first = read(finished(path, Interrupted("saved", signal.SIGINT)))
    with Run.resume(path, "pretrain") as run:
        assert read(path)["status"] == "running"
        assert not run.done
    second = read(path)
    assert (second["status"], second["exit_code"]) == ("done", 0)
    for name in ("id", "started", "command", *FACTS):
        assert second[name] == first[name]


def test_another_number_of_threads_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(path, Interrupted("saved", signal.SIGINT))
    Run.resume(path, "pretrain").close()
    assert capsys.readouterr().err == ""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        Run.resume(path, "pretrain").close()
    finally:
        torch.set_num_threads(threads)
    assert f"note: {threads} threads before, {threads + 1} now" in capsys.readouterr().err


# Who may write there.


def test_an_existing_output_is_not_touched(path: Path) -> None:
    finished(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(OutputExistsError, match=r"exists already.*--resume.*--out") as caught:
        Run.start(path, "pretrain", "other", {})
    assert caught.value.exit_code == 73
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_file_in_the_way_is_an_existing_output(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(OutputExistsError):
        Run.start(path, "pretrain", RECIPE, {})
    assert path.read_text() == "mine"


def test_an_empty_folder_may_become_a_run(path: Path) -> None:
    path.mkdir(parents=True)
    assert read(finished(path))["status"] == "done"


def test_resuming_nothing(path: Path) -> None:
    for _ in range(2):
        with pytest.raises(MissingInputError, match=r"no run at .*without --resume") as caught:
            Run.resume(path, "pretrain")
        assert caught.value.exit_code == 66
        path.mkdir(parents=True, exist_ok=True)
    assert list(path.iterdir()) == []


def test_resuming_another_commands_run(path: Path) -> None:
    finished(path)
    with pytest.raises(DataError, match="a run of `sslmed pretrain`, not of `sslmed finetune`") as caught:
        Run.resume(path, "finetune")
    assert caught.value.exit_code == 65
    Run.resume(path, "pretrain").close()  # not left locked


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", "{}"])
def test_a_damaged_run_json(content: str, path: Path) -> None:
    finished(path)
    (path / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        Run.resume(path, "pretrain")


def test_a_run_at_work_is_locked(path: Path) -> None:
    finished(path)
    with Run.resume(path, "pretrain"):
        with pytest.raises(TemporaryError, match="another process works in") as caught:
            Run.resume(path, "pretrain")
        assert caught.value.exit_code == 75
    Run.resume(path, "pretrain").close()


def test_a_lock_of_another_process_ends_with_it_even_when_killed(path: Path) -> None:
    finished(path)
    processes = multiprocessing.get_context("fork")
    ready, leave = processes.Event(), processes.Event()
    other = processes.Process(target=work_in, args=(str(path), ready, leave))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(TemporaryError):
            Run.resume(path, "pretrain")
        os.kill(other.pid or 0, signal.SIGKILL)
        other.join(30)
        assert read(path)["status"] == "running"  # nobody could write down how it ended
        with Run.resume(path, "pretrain"):
            pass
        assert read(path)["status"] == "done"
    finally:
        other.kill()


def test_a_lock_without_a_run_is_found_too(path: Path) -> None:
    """Two processes that start the same run: the second sees the first one's folder or its lock."""
    path.mkdir(parents=True)
    with (path.parent / "lock").open("w") as file:
        (path.parent / "lock").rename(path / ".lock")
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises((TemporaryError, OutputExistsError)):
            Run.start(path, "pretrain", RECIPE, {})


# What a resume must not change.


def test_a_resume_that_changes_nothing_goes_on(path: Path) -> None:
    finished(path)
    run = Run.resume(path, "pretrain")
    run.refuse_changes([], FACTS)
    run.close()


@pytest.mark.parametrize("changes", [1, 2, 3, 4, 40])
def test_a_resume_that_changes_the_recipe_is_refused_in_six_lines(changes: int, path: Path) -> None:
    finished(path)
    run = Run.resume(path, "pretrain")
    lines = [f"optim.key{number}: 1 -> 2" for number in range(changes)]
    with pytest.raises(UsageError) as caught:
        run.refuse_changes(lines, FACTS)
    assert caught.value.exit_code == 2
    shown = str(caught.value).splitlines()
    assert len(shown) <= 6
    assert shown[0].startswith("--resume cannot change")
    assert shown[1 : 1 + min(3, changes)] == lines[:3]
    assert any(f"and {changes - 3} more" in line for line in shown) is (changes > 3)
    assert "--out" in shown[-1]
    Run.resume(path, "pretrain").close()  # not left locked


def test_a_resume_on_other_data_is_refused(path: Path) -> None:
    finished(path)
    with pytest.raises(UsageError, match="data_fingerprint: abc -> def"):
        Run.resume(path, "pretrain").refuse_changes([], FACTS | {"data_fingerprint": "def"})


def test_a_refused_resume_leaves_the_run_as_it_was(path: Path) -> None:
    before = (finished(path) / "run.json").read_bytes()
    with pytest.raises(UsageError):
        Run.resume(path, "pretrain").refuse_changes(["a: 1 -> 2"], {})
    assert (path / "run.json").read_bytes() == before


# Metrics and log.


def test_metrics_are_lines_of_json(path: Path) -> None:
    with Run.start(path, "pretrain", RECIPE, {}) as run:
        run.log(1, loss=0.5, note="a", nothing=None)
        run.log(2, loss=0.25)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(path)
    assert read_metrics(path) == [
        {"step": 1, "loss": 0.5, "note": "a", "nothing": None},
        {"step": 2, "loss": 0.25},
    ]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", '{"step": 3}'])
def test_a_last_line_cut_off_by_a_kill_is_left_out(rest: str, path: Path) -> None:
    with Run.start(path, "pretrain", RECIPE, {}) as run:
        run.log(1, loss=0.5)
        run.log(2, loss=0.25)
        with (path / "metrics.jsonl").open("a") as file:
            file.write(rest)
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
        run.rewind(2)
        run.log(3, loss=0.125)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0.5), (2, 0.25), (3, 0.125)]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
def test_rewinding_forgets_later_steps_and_nothing_else(step: int, path: Path) -> None:
    with Run.start(path, "pretrain", RECIPE, {}) as run:
        run.rewind(step)  # nothing logged yet
        for number in (1, 2, 3):
            run.log(number, loss=1 / number)
            run.log(number, knn=0.5)
        before = read_metrics(path)
        run.rewind(step)
    assert read_metrics(path) == [line for line in before if line["step"] <= step]


def test_what_is_said_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.start(path, "pretrain", RECIPE, {}) as run:
        run.say("step 1  größer")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "step 1  größer\n")
    assert (path / "train.log").read_text(encoding="utf-8").endswith(" step 1  größer\n")


# Of several processes.


@pytest.mark.ddp
def test_two_processes_have_one_run(tmp_path: Path) -> None:
    zero, one = ranks.on_two_ranks(ranks.one_run, str(tmp_path))
    path = tmp_path / "run"
    assert zero["id"] == one["id"] == read(path)["id"]
    assert (zero["seed"], one["seed"]) == (3, 3)
    assert (read(path)["status"], read(path)["result"]) == ("done", {"of": 0}), "the first one's"
    assert zero["resumed"] == [[zero["id"], True, {"of": 0}], ["OutputExistsError", 73]]
    assert one["resumed"] == [[zero["id"], True, {"of": 0}], ["ElsewhereError", 73]]
    for what, kind, code in (
        ("other command", "DataError", 65),
        ("absent", "MissingInputError", 66),
        ("in the way", "NotADirectoryError", 74),
        ("locked", "TemporaryError", 75),
    ):
        assert (zero[what], one[what]) == ([kind, code], ["ElsewhereError", code])
    # written once, and what the other one has said lies beside
    assert {file.name for file in path.iterdir()} == {
        *("recipe.yaml", "run.json", "metrics.jsonl", "train.log", "train-rank-1.log", "checkpoints", ".lock"),
    }
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    assert "hello from 0" in (path / "train.log").read_text()
    assert (path / "train-rank-1.log").read_text().endswith(" hello from 1\n")
    assert "hello from 1" not in (path / "train.log").read_text()
