"""The files of a Megatron checkpoint that only Megatron-Bridge can write: its configuration and train state.

Importing Megatron-Bridge takes 10 to 20 seconds of interpreter, which the threads of a conversion need too. So it
happens in a process of its own, forked before they start, while they move bytes.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from ...errors import UserError
from ..engine.journal import Journal
from .hf_source import Source
from .run_config import NAME as RUN_CONFIG

TASK = "Megatron's files"
ITERATION = "iter_0000000"
FILES = (
    *(f"{ITERATION}/{name}" for name in (RUN_CONFIG, "metadata.json", "train_state.pt")),
    "latest_train_state.pt",
    "latest_checkpointed_iteration.txt",
)
"""What `write_files` writes."""

KILLED = "The process that writes Megatron's files was killed, probably for lack of memory; the same call continues"
PR_SET_PDEATHSIG = 1


class Describing:
    """Writes Megatron's files into a journal's output in another process, unless an earlier run has done it."""

    def __init__(self, source: Source, dtype: torch.dtype, journal: Journal):
        context = multiprocessing.get_context("fork")
        if TASK in journal.results and not all((journal.output / file).is_file() for file in FILES):
            journal.forget([TASK])
        self._journal, self._is_done = journal, TASK in journal.results
        self._answer, self._sender = context.Pipe(duplex=False)
        arguments = os.getpid(), source, dtype, journal, self._sender
        self._process = context.Process(target=_answer, args=arguments, daemon=True)

    def __enter__(self) -> "Describing":
        if not self._is_done:
            with warnings.catch_warnings():
                # Python warns of forks beside threads: torch's pool is not used in the fork, and ours comes later.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
            self._sender.close()  # of two; when the other process dies, its own is gone too
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the files, or end the process where what goes on beside it has failed.

        Raises:
            ValueError, OSError, ImportError: what stopped the other process, where the user can mend it.
            ChildProcessError: it was killed.
            RuntimeError: what else stopped it.
        """
        if self._is_done:
            return
        if kind is not None:
            self._process.kill()
            self._process.join()
            return
        try:
            error = self._answer.recv()
        except EOFError:
            error = ChildProcessError(KILLED)
        self._process.join()
        if error is not None:
            raise error
        self._journal.record({TASK: None}, FILES)


def _answer(parent: int, source: Source, dtype: torch.dtype, journal: Journal, sender: Connection) -> None:
    """What the other process does: write the files, then send None, or the error that kept it from that."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    journal.release()  # the next call must not wait for us when our parent is killed
    for stream in (1, 2):  # what libraries say when they are imported is nothing to the user
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    try:
        write_files(source, dtype, journal.output, journal.out)
        sender.send(None)
    except Exception as error:  # noqa: BLE001 - raised again by `Describing`
        sender.send(_without_modules(error))


def _without_modules(error: Exception) -> Exception:
    """An error of the same kind that can be read without importing what raised it."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    for kind in (UserError, OSError, ImportError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def write_files(source: Source, dtype: torch.dtype, output: Path, out: Path) -> None:
    """Write what `AutoBridge.import_ckpt` writes beside the tensors.

    Args:
        source: the checkpoint that is imported.
        dtype: of the weights.
        output: the folder to write into.
        out: the folder's name when it is complete, which the configuration remembers.
    """
    from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable

    # isort: split
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
    from megatron.bridge.training.state import TrainState
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.optimizer import OptimizerConfig

    from ...bridge.mcore.provider import provider_from_config

    source.config.dtype = dtype
    provider = provider_from_config(source.config, perform_initialization=False, hf_model_id=str(source.folder))
    provider.finalize()
    unused: dict[str, Any] = dict.fromkeys(("train", "ddp", "scheduler", "dataset", "dist"))
    config = ConfigContainer(
        **unused,
        model=provider,
        optimizer=cast(Any, OptimizerConfig(use_distributed_optimizer=False)),
        logger=LoggerConfig(),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source.folder)),
        checkpoint=CheckpointConfig(
            async_save=False, save=str(out), save_optim=False, save_rng=False, dist_ckpt_optim_fully_reshardable=True
        ),
    )
    folder = output / ITERATION
    folder.mkdir(exist_ok=True)
    config.to_yaml(str(folder / RUN_CONFIG))
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    # Megatron-Bridge sets this number when it saves, in another precision than its own object has.
    state = TrainState().state_dict() | {"floating_point_operations_so_far": torch.tensor(0.0)}
    torch.save(state, folder / "train_state.pt")
    shutil.copyfile(folder / "train_state.pt", output / "latest_train_state.pt")
    (output / "latest_checkpointed_iteration.txt").write_text("0")
