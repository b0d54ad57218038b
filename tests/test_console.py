import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from sslmed import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later."""
    ticks = itertools.count()
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def test_lines_go_to_standard_error_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("one line")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "one line\n")


@pytest.mark.usefixtures("clock")
def test_progress_is_a_plain_line_every_five_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress(iter("abcdefghijkl"), 12, "ingest")) == list("abcdefghijkl")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["ingest 5/12, 1/s", "ingest 10/12, 1/s", "ingest 12/12, 1/s"]


def test_progress_is_lazy_and_passes_errors_on(capsys: pytest.CaptureFixture[str]) -> None:
    taken = []

    def items() -> object:
        for number in range(3):
            taken.append(number)
            yield number
        raise ValueError("oops")

    shown = console.progress(items(), 9, "predict")  # type: ignore[arg-type]
    assert next(shown) == 0
    assert taken == [0]
    with pytest.raises(ValueError, match="oops"):
        list(shown)


def test_nothing_to_do_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress([], 0, "ingest")) == []
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(console.progress(range(3), 3, "ingest")) == [0, 1, 2]
    assert "ingest" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""
