"""The module that starts ranks by `torchrun`: signals and exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_oss_vision.recipes.launch.torchrun import exit_code


@pytest.mark.parametrize(
    ("codes", "expected"),
    [({75}, 75), ({1}, 1), ({1, 2}, 1), (set(), 1), ({-signal.SIGTERM}, 143), ({-signal.SIGKILL}, 137)],
)
def test_the_exit_code_is_that_of_the_workers(codes: set[int], expected: int):
    assert exit_code(codes) == expected


def test_a_signal_before_there_are_workers_ends_the_launcher():
    command = [sys.executable, "-m", "gpt_oss_vision.recipes.launch.torchrun", "1", "train", "gpt_oss_vision_tiny_sft"]
    with subprocess.Popen(command) as launcher:
        end = time.monotonic() + 30
        while not is_handled(signal.SIGTERM, launcher.pid):
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.001)
        launcher.terminate()
        assert launcher.wait() == 128 + signal.SIGTERM


def is_handled(number: int, process: int) -> bool:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (handled,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(handled >> (number - 1) & 1)
