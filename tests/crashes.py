"""Kill a conversion at its n-th record, or at its n-th change to files, for growing n until it finishes."""

import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from kills import fork, killed_at_change

from checkpoints import files_of
from gpt_oss_vision.conversion.engine.journal import Journal


def many_small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a tiny conversion many tasks, each recorded on its own, so that a kill can fall between any two."""
    monkeypatch.setattr("gpt_oss_vision.conversion.engine.stream.SECONDS_BETWEEN_SYNCS", 0.0)
    monkeypatch.setattr("gpt_oss_vision.conversion.formats.torch_dist_writer.BATCH_BYTES", 4096)


def killed_at(convert: Callable[[], object], number: int, *, is_written: bool) -> bool:
    """Run `convert` in a fork that is killed at its n-th record, right before or after that is in the journal.

    Returns:
        Whether it was killed before it finished.
    """

    def mortal() -> None:
        left, append = count(number, -1), Journal._append

        def dying(journal: Journal, entry: dict[str, object]) -> None:
            is_last = next(left) == 0  # the first entry of a new journal is the plan, number 0
            if is_written or not is_last:
                append(journal, entry)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal._append = dying
        convert()

    code = os.waitstatus_to_exitcode(os.waitpid(fork(mortal), 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def survives_kills(convert: Callable[[], object], out: Path) -> int:
    """Call `convert`, which makes `out`, again and again, killing the n-th call at its n-th record, until it is done.

    Odd calls are killed before that record is written, even ones after it. Asserts that every call continues the one
    before, and that the output has the bytes of an uninterrupted call.

    Returns:
        How many calls were killed.
    """
    journal, records = out.with_name(out.name + ".partial") / "journal", 0
    assert not killed_at(convert, 10**9, is_written=True)
    expected = files_of(out)
    shutil.rmtree(out)
    for number in count():
        is_written = number % 2 == 0
        if not killed_at(convert, number, is_written=is_written):
            break
        records += number + is_written
        assert journal.read_bytes().count(b"\n") == records
    assert files_of(out) == expected
    assert not journal.parent.exists()
    return number


def survives_kills_at_changes(convert: Callable[[], object], out: Path) -> int:
    """Call `convert`, which makes `out`, again and again, killing the n-th call at its n-th change to files.

    Asserts that `out` is absent or complete after every call, and has the bytes of an uninterrupted call at the end.

    Returns:
        How many calls were killed.
    """
    convert()
    expected = files_of(out)
    shutil.rmtree(out)
    others = {*out.parent.iterdir()}
    for number in count():
        if not killed_at_change(convert, number):
            break
        assert not out.exists() or files_of(out) == expected
        if out.exists() and not (out.with_name(out.name + ".partial") / "journal").exists():
            break  # only the lock and its folder were still to be removed
    assert files_of(out) == expected
    assert {*out.parent.iterdir()} - {out.with_name(out.name + ".partial")} == {*others, out}
    return number
