"""A run continues at another layout, and after a kill at any point, with the losses of an uninterrupted run."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import pytest

from gpt_oss_vision.bridge.mcore import cpu, upstream
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.base import CheckpointConfig
from gpt_oss_vision.recipes.data.digits import DigitsSplit, write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.checkpoints import check_start, resume, start_of
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.train import train
from layouts import Layout

STEPS = 4
BATCH = 8
ROWS = 20  # so that the third step has rows of two epochs


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of the training loop on a few digits, which writes every step's loss into a file."""

    start: Path
    digits: DigitsSplit
    rows: Path
    folder: Path
    layout: Layout = field(default_factory=Layout)
    steps: int = STEPS
    save_interval: int = 2
    load: Path | None = None
    dropout: float = 0.0
    most_recent_k: int = -1
    exit_signal_handler: bool = False
    fully_reshardable: bool = True
    precision: str | None = None

    @property
    def saved(self) -> Path:
        return self.folder / "saved"

    def losses(self, *callbacks: Callback) -> list[tuple[int, float]]:
        """Run the job; return `read()`."""
        cpu.run_ranks(self.layout.world_size, self.run, *callbacks)
        return self.read()

    def read(self) -> list[tuple[int, float]]:
        """Steps, counted from 0, and their losses, in the order in which they were ever computed in this folder."""
        lines = (line.split() for line in (self.folder / "losses").read_text().splitlines())
        return [(int(step), float.fromhex(loss)) for step, loss in lines]

    def run(self, *callbacks: Callback) -> None:
        config = training_config(self.start, self.digits, Settings(steps=self.steps, batch_size=BATCH))
        self.layout.apply(config.model)
        config.model.hidden_dropout = self.dropout
        config.train.micro_batch_size = 2
        config.dataset.path = str(self.rows)
        config.logger.tensorboard_dir = None
        config.checkpoint.save, config.checkpoint.save_interval = str(self.saved), self.save_interval
        config.checkpoint.load = str(self.load) if self.load else None
        config.checkpoint.dist_ckpt_optim_fully_reshardable = self.fully_reshardable
        config.train.exit_signal_handler = self.exit_signal_handler
        config.checkpoint.most_recent_k = self.most_recent_k
        config.mixed_precision = self.precision
        train(config, callbacks=[Ledger(self.folder / "losses"), *callbacks])


@dataclass
class Ledger(Callback):
    """Writes each step and its exact loss at once, since the process may be killed before the end of the run."""

    path: Path

    def on_train_step_end(self, context: CallbackContext) -> None:
        if context.loss_dict and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            with self.path.open("a") as file:
                file.write(f"{context.state.train_state.step} {float(context.loss_dict['lm loss']).hex()}\n")


@pytest.fixture(scope="module")
def job(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """A function that makes jobs, each with a folder of its own."""
    digits = write_digits(start / "digits", Settings().seed)
    few = digits.train_path.with_name("few.jsonl")
    with digits.train_path.open() as rows:
        few.write_text("".join(islice(rows, ROWS)))

    def make(**fields) -> Job:
        folder = tmp_path_factory.mktemp("job")
        return Job(start=start, digits=digits, rows=few, folder=folder, **fields)

    return make


# --- at another layout -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(job) -> Callable[[Layout], tuple[Path, list[tuple[int, float]]]]:
    """A function that runs once per layout; returns the checkpoint after two steps, and the losses of all steps."""
    made = {}

    def run(layout: Layout) -> tuple[Path, list[tuple[int, float]]]:
        if str(layout) not in made:
            whole = job(layout=layout)
            made[str(layout)] = whole.saved / "iter_0000002", whole.losses()
        return made[str(layout)]

    return run


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(tp=2, pp=2, ep=2), Layout()),
        (Layout(), Layout(ep=2, etp=2)),
        (Layout(cp=2, dp=2), Layout(pp=2, vpp=2)),
        (Layout(pp=2, vpp=2), Layout(tp=2, pp=2, ep=2)),
    ],
    ids=str,
)
def test_a_run_goes_on_at_another_layout_with_the_same_losses(before: Layout, after: Layout, job, unbroken):
    checkpoint, expected = unbroken(before)
    found = job(layout=after, load=checkpoint, save_interval=STEPS).losses()
    assert [step for step, _ in found] == [2, 3]
    # The second loss comes from weights that were updated with the loaded moments of Adam.
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected[2:]], rel=1e-6)


@pytest.mark.parametrize("precision", [None, "bf16_mixed"])
def test_a_run_goes_on_in_the_default_format_of_optimizer_states(precision: str | None, job):
    settings = {"layout": Layout(dp=2), "precision": precision, "fully_reshardable": False}
    whole = job(**settings)
    expected = whole.losses()
    found = job(**settings, load=whole.saved / "iter_0000002", save_interval=STEPS).losses()
    assert found == expected[2:]


def run_as_megatron_core_has_it(job: Job, method: str, original: Callable) -> None:
    setattr(upstream.DistributedOptimizer, method, original)
    job.run()


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("method", "original"),
    [
        ("state_dict", upstream._state_dict),
        ("load_state_dict", upstream._load_state_dict),
        ("_set_main_param_and_optimizer_states", upstream._set_states),
    ],
)
def test_megatron_core_still_cannot_go_on_with_the_adam_of_torch(method: str, original: Callable, job, unbroken):
    """When this fails, the replacement of the method in `upstream.apply` can be removed."""
    checkpoint, expected = unbroken(Layout())
    broken = job(load=checkpoint, save_interval=STEPS)
    try:
        cpu.run_ranks(1, run_as_megatron_core_has_it, broken, method, original)
    except (AssertionError, KeyError):
        return
    assert [loss for _, loss in broken.read()] != pytest.approx([loss for _, loss in expected[2:]], rel=1e-3)


# --- killed ------------------------------------------------------------------------------------------------------


@dataclass
class Death(Callback):
    """Kills one rank and its worker processes with SIGKILL, after it has written a line to a file."""

    note: Path
    rank: int = 0

    def on_train_start(self, context: CallbackContext) -> None:
        if int(os.environ["RANK"]) == self.rank:
            self.prepare(context.state.cfg.checkpoint.save)

    def prepare(self, folder: str) -> None:
        raise NotImplementedError

    def die(self) -> None:
        with self.note.open("a") as file:
            file.write(f"{self}\n")
        os.killpg(0, signal.SIGKILL)


@dataclass
class DeathAtStep(Death):
    """Kills the rank at the start of its step `number`; the checkpoints of earlier steps are complete."""

    number: int = 1

    def prepare(self, folder: str) -> None:
        self.begun = count(1)

    def on_train_step_start(self, context: CallbackContext) -> None:
        if int(os.environ["RANK"]) == self.rank and next(self.begun) == self.number:
            self.die()


@dataclass
class DeathAfterStep(DeathAtStep):
    """Kills the rank after its step `number`, before the step is saved."""

    def on_train_step_start(self, context: CallbackContext) -> None:
        pass

    def on_train_step_end(self, context: CallbackContext) -> None:
        super().on_train_step_start(context)


@dataclass
class DeathAtFile(Death):
    """Kills the rank before it opens file `number` for writing in the folder of the checkpoints."""

    number: int = 1

    def prepare(self, folder: str) -> None:
        opened = count(1)

        def watch(event: str, arguments: tuple) -> None:
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and str(arguments[0]).startswith(folder) and next(opened) == self.number:
                self.die()

        sys.addaudithook(watch)


@dataclass
class DeathAtRemoval(Death):
    """Kills the rank before it removes an old checkpoint."""

    def prepare(self, folder: str) -> None:
        def watch(event: str, arguments: tuple) -> None:
            if event == "shutil.rmtree" and "iter_" in str(arguments[0]):
                self.die()

        sys.addaudithook(watch)


def test_a_run_killed_while_it_removes_an_old_checkpoint_goes_on_from_the_new_one(job):
    killed = job(steps=3, save_interval=1, most_recent_k=1)
    killed = replace(killed, load=killed.saved)
    with pytest.raises(RuntimeError):
        killed.losses(DeathAtRemoval(note=killed.folder / "note"))
    assert [step for step, _ in killed.losses()] == [0, 1, 2]


FILES = 7  # that rank 0 writes for one checkpoint


@pytest.mark.slow
def test_a_run_killed_again_and_again_has_the_losses_of_an_unbroken_one(job):
    fields = {"layout": Layout(tp=2, ep=2), "steps": 6, "save_interval": 1, "dropout": 0.1}
    expected = job(**fields).losses()
    killed = job(**fields)
    killed = replace(killed, load=killed.saved)
    note = killed.folder / "deaths"
    # First before any checkpoint is complete, then in the second one, and then at every file of a later one.
    deaths = [DeathAtFile(note, number=number) for number in (FILES - 1, FILES + 1, *range(1, FILES + 1))]
    # The other rank: at its first file, between two checkpoints, and after a step that is in no checkpoint.
    deaths += [
        kind(note, rank=1, number=number) for kind, number in ((DeathAtFile, 1), (DeathAtStep, 2), (DeathAfterStep, 2))
    ]
    for death in deaths:
        with pytest.raises(RuntimeError, match="exit code -9"):
            killed.losses(death)
    assert note.read_text().splitlines() == [str(death) for death in deaths]
    assert (killed.saved / "iter_0000003").is_dir()
    # Every loss is equal to the last bit, also of the steps that were computed more than once.
    assert set(killed.losses()) == set(expected)


@dataclass
class Terminate(Callback):
    """Sends SIGTERM to this rank and all its child processes, as SLURM does, in step `step`."""

    step: int

    def on_train_step_start(self, context: CallbackContext) -> None:
        if context.state.train_state.step == self.step:
            os.killpg(0, signal.SIGTERM)


def test_a_run_that_is_terminated_saves_its_step_and_goes_on(job, unbroken):
    _, expected = unbroken(Layout())
    stopped = job(exit_signal_handler=True)
    stopped = replace(stopped, load=stopped.saved)
    stopped.losses(Terminate(step=2))
    assert (stopped.saved / "iter_0000003").is_dir()
    assert [step for step, _ in stopped.read()] == [0, 1, 2]
    assert stopped.losses() == expected


@dataclass
class Children(Callback):
    """Writes the process ids of this rank's children to a file, then kills the rank alone."""

    file: Path

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.file.write_text(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_child_processes_of_a_killed_rank_end(job):
    killed = job()
    with pytest.raises(RuntimeError, match="exit code -9"):
        killed.losses(Children(killed.folder / "children"))
    children = (killed.folder / "children").read_text().split()
    assert children
    end = time.monotonic() + 60  # killed, a busy process ends a moment later
    while any(is_running(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(process: str) -> bool:
    """Whether a process has not ended: a zombie has."""
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_optimizer_states_of_the_other_back_end_are_refused(job, unbroken):
    checkpoint, _ = unbroken(Layout())
    other = job().folder / "iter_0000002"
    shutil.copytree(checkpoint, other)
    text = (other / "run_config.yaml").read_text()
    (other / "run_config.yaml").write_text(
        text.replace("transformer_impl: local", "transformer_impl: transformer_engine")
    )
    with pytest.raises(ValueError, match="saved with transformer_impl='transformer_engine'; this run has 'local'"):
        job(load=other, fully_reshardable=False).losses()
    assert job(load=other).losses()


@dataclass(frozen=True, kw_only=True)
class LateJob(Job):
    """Continues in the folder where it saves. Its rank 1 sees another folder in its place."""

    seen_by_rank_1: Path

    def run(self, *callbacks: Callback) -> None:
        folder = self.seen_by_rank_1 if os.environ["RANK"] == "1" else self.folder
        replace(self, folder=folder, load=folder / "saved").run_here(*callbacks)

    def run_here(self, *callbacks: Callback) -> None:
        super().run(*callbacks)


@pytest.mark.parametrize("seen", ["iter_0000002", "none"])
def test_ranks_that_find_different_checkpoints_are_refused(seen: str, job, unbroken, tmp_path: Path):
    checkpoint, _ = unbroken(Layout(dp=2))
    if seen != "none":
        shutil.copytree(checkpoint, tmp_path / "saved" / seen)
    fields = {name: getattr(job(), name) for name in ("start", "digits", "rows")}
    fields |= {"layout": Layout(dp=2), "folder": checkpoint.parents[1]}
    with pytest.raises(ValueError, match=r"different checkpoints \(.*iter_0000004.*\); start the run again") as caught:
        LateJob(**fields, seen_by_rank_1=tmp_path).losses()
    assert seen in str(caught.value)


@pytest.mark.parametrize("field", ["pretrained_checkpoint", "load"])
def test_a_start_that_is_not_there_is_refused(field: str, tmp_path: Path):
    (tmp_path / "out" / "megatron").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"checkpoint.{field}=.*out is no Megatron checkpoint"):
        check_start(CheckpointConfig(**{field: str(tmp_path / "out")}))


def test_a_run_may_begin_in_the_folder_from_which_it_will_continue(tmp_path: Path):
    check_start(CheckpointConfig(load=str(tmp_path / "saved"), save=str(tmp_path / "saved")))


def test_a_folder_is_continued_from_the_newest_complete_checkpoint(tmp_path: Path, capsys):
    for name in ("iter_0000009", "iter_0000010", "iter_0000011", "iter_0000010_best", "iter_best", "iter_12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_config.yaml").touch()
    for name in ("saving_11", "saving_notes"):
        (tmp_path / name).touch()
    checkpoint = CheckpointConfig(load=str(tmp_path))
    resume(checkpoint)
    assert checkpoint.load == str(tmp_path / "iter_0000010")
    assert capsys.readouterr().out == f"Continuing after step 10, from {checkpoint.load}\n"


def test_a_folder_without_a_complete_checkpoint_is_started_anew(tmp_path: Path, capsys):
    (tmp_path / "saving_1").touch()
    checkpoint = CheckpointConfig(load=str(tmp_path))
    resume(checkpoint)
    assert checkpoint.load is None
    assert capsys.readouterr().out == f"No checkpoint in {tmp_path} is complete; starting at step 0.\n"


def test_a_folder_without_our_files_is_left_to_megatron_bridge(tmp_path: Path):
    checkpoint = CheckpointConfig(load=str(tmp_path))
    resume(checkpoint)
    assert checkpoint.load == str(tmp_path)


def test_a_step_whose_checkpoint_is_not_complete_is_refused(tmp_path: Path):
    checkpoint = CheckpointConfig(save=str(tmp_path), ckpt_step=2)
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002/run_config.yaml").touch()
    assert start_of(checkpoint) == (2, tmp_path / "iter_0000002")
    (tmp_path / "saving_2").touch()
    with pytest.raises(UserError, match=r"checkpoint.ckpt_step=2: .* has no complete checkpoint of that step"):
        start_of(checkpoint)
