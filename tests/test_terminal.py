"""The output of a run on the terminal and in its log."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gpt_oss_vision import terminal
from gpt_oss_vision.terminal import Progress, quiet


def test_output_of_libraries_goes_to_the_log_and_ours_to_the_terminal(tmp_path: Path):
    reader, writer = os.pipe()
    saved = os.dup(1)
    os.dup2(writer, 1)
    try:
        with quiet(tmp_path / "log") as console:
            os.write(1, b"written below python\n")
            subprocess.run(["sh", "-c", "echo from a worker >&2"], check=True)
            console.print("shown")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writer)
    assert os.read(reader, 1000) == b"shown\n"
    os.close(reader)
    assert (tmp_path / "log").read_text() == "written below python\nfrom a worker\n"


def test_a_sentence_is_in_the_log_and_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture):
    program = f"""
from pathlib import Path
from gpt_oss_vision.terminal import quiet, say
say("before")
with quiet(Path({str(tmp_path / "log")!r})):
    say("inside [1]")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert capfd.readouterr().out == "before\ninside [1]\n"
    assert (tmp_path / "log").read_text() == "inside [1]\n"


def shown_in_a_log(monkeypatch: pytest.MonkeyPatch, total: int, *, in_bytes: bool = False) -> tuple[Progress, StringIO]:
    """A progress display with a stopped clock, and its output."""
    monkeypatch.setattr(terminal.time, "monotonic", lambda: 0.0)
    shown = StringIO()
    return Progress("Task", total, Console(file=shown), in_bytes=in_bytes), shown


def at(monkeypatch: pytest.MonkeyPatch, second: float) -> None:
    monkeypatch.setattr(terminal.time, "monotonic", lambda: second)


def test_a_log_gets_a_line_every_ten_seconds_with_words_and_time_left_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
):
    progress, shown = shown_in_a_log(monkeypatch, 40)
    with progress:
        for step in range(1, 41):
            at(monkeypatch, step)
            progress.advance(words=f"loss {step}")
    assert shown.getvalue().splitlines() == [
        "Task: 10 of 40, loss 10, 30 s left",
        "Task: 20 of 40, loss 20, 20 s left",
        "Task: 30 of 40, loss 30, 10 s left",
        "Task: 40 of 40, loss 40, 0 s left",
    ]


def test_bytes_are_shown_with_their_rate_and_without_those_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch):
    progress, shown = shown_in_a_log(monkeypatch, 10 * 10**9, in_bytes=True)
    with progress:
        progress.skip(4 * 10**9)
        at(monkeypatch, 10)
        progress.advance(2 * 10**9)
    assert shown.getvalue().splitlines() == [
        "Task: 4.00 of 10.00 GB were done before",
        "Task: 6.00 of 10.00 GB, 0.20 GB/s, 20 s left",
    ]


def test_the_rate_of_a_bar_excludes_the_bytes_of_an_earlier_run():
    with Progress("Task", 10**10, Console(file=StringIO(), force_terminal=True), in_bytes=True) as progress:
        progress.skip(4 * 10**9)
        (task,) = progress._bar.tasks
        assert (task.completed, task.speed) == (4 * 10**9, None)


def test_without_a_console_nothing_is_shown(capfd: pytest.CaptureFixture[str]):
    with Progress("Task", 1) as progress:
        progress.advance()
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_nothing_that_others_print(capsys: pytest.CaptureFixture[str]):
    shown = StringIO()
    with Progress("Training", 4, Console(file=shown, force_terminal=True)) as progress:
        print("chatter")
        progress.advance(words="loss 1.000")
    assert "━" in shown.getvalue()
    assert "loss 1.000" in shown.getvalue()
    assert "chatter" not in shown.getvalue()
    assert capsys.readouterr().out == "chatter\n"
