"""Killing a conversion at random moments, in processes forked from this warm one, until it has got through."""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import files_of


def fork(work: Callable[[], object]) -> int:
    """Run something in a process of its own; its exit code is 0, or 1 where it raised."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - told by the exit code
            traceback.print_exc()
        os._exit(code)
    return child


def many_small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a tiny conversion many tasks, each recorded on its own, so that a kill can fall between any two."""
    monkeypatch.setattr("gpt_oss_vision.conversion.engine.stream.SECONDS_BETWEEN_SYNCS", 0.0)
    monkeypatch.setattr("gpt_oss_vision.conversion.formats.torch_dist_writer.BATCH_BYTES", 4096)


ATTEMPTS_PER_KILL = 10


def survives_kills(convert: Callable[[], object], out: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill `convert`, which makes `out`, `kills` times, calling it again each time, and then leave it alone once.

    Every other kill comes at any moment of the call, the others when something has been recorded, which of a quick
    conversion may be in the last hundredths of a second. Whenever it gets through, the bytes of the output are compared
    with those of a run that was left alone, and it begins anew.

    Returns:
        How many kills found something recorded, and how often a call got through after one that was killed.

    Raises:
        AssertionError: the kills come too late, again and again.
    """
    journal = out.with_name(out.name + ".partial") / "journal"
    begun = time.monotonic()
    child = fork(convert)
    _wait_for_record(journal, child)
    recorded = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ended, expected = time.monotonic(), files_of(out)
    shutil.rmtree(out)
    print(f"A run takes {ended - begun:.2f} s, {recorded - begun:.2f} to the first record; the seed is {seed}")
    moments, done, continued, completed, was_killed = random.Random(seed), 0, 0, 0, False
    for attempt in range(ATTEMPTS_PER_KILL * kills):
        child = fork(convert)
        if done < kills:
            if attempt % 2:
                _wait_for_record(journal, child)
            time.sleep(moments.uniform(0, ended - (recorded if attempt % 2 else begun)))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in ((0, -signal.SIGKILL) if done < kills else (0,))
        is_killed = code != 0
        continued += is_killed and _has_records(journal)
        if out.exists():
            assert files_of(out) == expected
            completed += was_killed and not is_killed
            if not journal.exists():  # it had finished; at most an empty folder is left to remove
                shutil.rmtree(out)
                shutil.rmtree(journal.parent, ignore_errors=True)
        was_killed = is_killed
        if done == kills:
            return continued, completed
        done += is_killed
    raise AssertionError(f"{ATTEMPTS_PER_KILL * kills} calls, and only {done} of {kills} kills came before the end")


def _has_records(journal: Path) -> bool:
    """Whether anything is done, beyond the plan in the first line."""
    try:
        return journal.read_bytes().count(b"\n") > 1
    except FileNotFoundError:
        return False


def _wait_for_record(journal: Path, child: int) -> None:
    """Wait until something is recorded, or the process that should do it has ended."""
    while not _has_records(journal) and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
