"""Training without a CUDA device where Transformer Engine is installed: by the order of imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import fine_tune, write_checkpoint
from gpt_oss_vision.recipes.quickstart.settings import Settings

AFTER_PEFT = """
import sys
import warnings
warnings.simplefilter("ignore")
import peft
engine = sys.modules["transformer_engine.pytorch"]

from pathlib import Path
from te.test_training_on_cpu import losses
from gpt_oss_vision.bridge.mcore.backend import HAVE_TE

assert not HAVE_TE
assert sys.modules["transformer_engine.pytorch"] is engine
first, *_, last = losses(Path(sys.argv[1]))
assert last < first
"""


SETTINGS = Settings(steps=3, batch_size=16)


def losses(out: Path) -> list[float]:
    digits = write_digits(out / "digits", SETTINGS.seed)
    return cpu.run_ranks(1, fine_tune, out, digits, SETTINGS, Console(quiet=True))[0]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the two checkpoints that the quickstart trains from."""
    write_checkpoint(tmp_path / "hf_start", SETTINGS)
    import_checkpoint(tmp_path / "hf_start", tmp_path / "megatron_start")
    return tmp_path


def test_after_peft_has_imported_transformer_engine_training_works(out: Path):
    subprocess.run([sys.executable, "-c", AFTER_PEFT, out], cwd=Path(__file__).parents[1], check=True)


def test_where_megatron_was_imported_with_transformer_engine_training_is_refused(out: Path):
    with pytest.raises(UserError, match=r"from `transformer_engine`, .*: call gpt_oss_vision\.register\(\) before"):
        losses(out)
