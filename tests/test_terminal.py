"""What a run shows and what goes to its log."""

import os
import subprocess
from io import StringIO
from pathlib import Path

from rich.console import Console

from gpt_oss_vision.terminal import LINES_PER_STAGE, Stage, quiet


def test_what_others_write_goes_to_the_log_and_what_we_show_to_the_terminal(tmp_path: Path):
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


def test_a_log_gets_plain_lines_with_words_and_time_left():
    shown = StringIO()
    with Stage(Console(file=shown, soft_wrap=True), "Training", 40) as stage:
        for step in range(40):
            stage.advance(f"loss {step}")
    lines = shown.getvalue().splitlines()
    assert len([line for line in lines if line]) == LINES_PER_STAGE
    assert lines[0].startswith("Training: 4/40 loss 3 ")
    assert lines[0].endswith(" s left")


def test_a_stage_that_is_not_shown_is_silent():
    shown = StringIO()
    with Stage(Console(file=shown), "Training", 4, shown=False) as stage:
        stage.advance()
    assert shown.getvalue() == ""


def test_a_terminal_gets_a_bar_and_nothing_that_others_print(capsys):
    shown = StringIO()
    with Stage(Console(file=shown, force_terminal=True), "Training", 4) as stage:
        print("chatter")
        stage.advance("loss 1.000")
    assert "━" in shown.getvalue()
    assert "loss 1.000" in shown.getvalue()
    assert "chatter" not in shown.getvalue()
    assert capsys.readouterr().out == "chatter\n"
