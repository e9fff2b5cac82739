"""What goes wrong with an import: it is told in a sentence, harms nothing and can be continued."""

import time
from pathlib import Path

import pytest
import torch
from crashes import many_small_units, survives_kills

import gpt_oss_vision
from checkpoints import OBLONG, save_tiny
from gpt_oss_vision.conversion.importing import import_checkpoint

KILLS = 60


@pytest.fixture(scope="module", autouse=True)
def registered():
    gpt_oss_vision.register()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "hf", **OBLONG, dtype=torch.bfloat16, packed=True)


def test_killed_at_any_moment_it_is_continued_to_the_same_bytes(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    many_small_units(monkeypatch)
    seed = time.time_ns() % 10**6
    out = tmp_path / "out"
    continued, completed = survives_kills(lambda: import_checkpoint(hf, out), out, KILLS, seed)
    assert continued >= KILLS // 4
    assert completed >= 1
