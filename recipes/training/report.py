"""``report.html`` of a run, written at every checkpoint and at the end: one file that needs nothing else."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.utils.common_utils import is_last_rank

from ...atomic import atomic_file
from ...bridge.mcore.memory import GIB, MemoryEstimate
from ...bridge.mcore.router_statistics import MODALITIES, entropy, overlap
from ...terminal import say
from ..pages import charts
from ..pages.charts import Line, line_chart, with_mean
from ..pages.environment import environment
from .answers import NEW_TOKENS, Answer, answers
from .experts import read_expert_counts
from .metrics import OF_SOURCE, Metrics
from .peak import PeakMemory
from .plan import estimate
from .secrets import without_secret
from .sessions import add_session, read_sessions
from .settings import differences, text_of

REPORT = "report.html"
FINISHED, RUNNING, SAVED = "finished", "running", "saved, to be continued"

NO_ANSWERS = (
    f"These are written when a run on one process ends, of at most {NEW_TOKENS} tokens each. For a run on several, "
    "export the checkpoint (gpt-oss-vision convert export) and ask it (gpt-oss-vision generate)."
)


@dataclass(kw_only=True)
class Run:
    """What the report shows beside the files in the folder.

    Attributes:
        title: of the recipe.
        state: `FINISHED`, `RUNNING` or `SAVED`.
        step: the last one that was done.
        steps: all that are to be done.
        tokens: positions that were trained on, padding included.
        settings: of the run (`settings_of`).
        recipe: of the recipe without the user's settings.
        memory: estimate for the rank that needs most.
        peaks: bytes by rank, None where they cannot be measured.
        is_gpu: whether the peaks are those of a GPU.
        answers: to rows of the validation data.
        no_answers: why there are none.
    """

    title: str
    state: str
    step: int
    steps: int
    tokens: int
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]
    memory: MemoryEstimate
    peaks: Sequence[int | None]
    is_gpu: bool
    answers: Sequence[Answer] = ()
    no_answers: str = NO_ANSWERS


@dataclass
class Report(Callback):
    """Writes the report of a stage, from the rank that writes the metrics. Called after `TrainingLog`.

    A report that cannot be written does not end the run; it is said once.

    Args:
        folder: of the stage.
        title: name of its recipe.
        settings: of the stage.
        recipe: settings of the recipe without the user's.
    """

    folder: Path
    title: str
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]
    peak: PeakMemory = field(default_factory=PeakMemory)
    answers: Sequence[Answer] = ()
    no_answers: str = NO_ANSWERS
    has_failed: bool = False
    _context: CallbackContext | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.folder)

    def on_train_start(self, context: CallbackContext) -> None:
        """Add this process to the starts of the run."""
        self._context = context
        if is_last_rank():
            self._guarded(self._add_session, context.state.train_state.step)

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Write the report of a run that goes on."""
        self.write(RUNNING)

    def on_train_end(self, context: CallbackContext) -> None:
        """Let the model answer, while it is there."""
        config = context.state.cfg
        assert config is not None
        path = getattr(config.dataset, "valid_path", None)
        if torch.distributed.get_world_size() == 1 and path is not None:
            self._guarded(self._answer, context.model[0], config.dataset, Path(path))

    def write(self, state: str) -> None:
        """Write the report. Called on every rank: the ranks tell their peaks."""
        peaks: list[int | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(peaks, self.peak.bytes())
        if is_last_rank() and self._context is not None:
            self._guarded(self._write, state, peaks)

    def _guarded(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - the run is worth more than its report
            if not self.has_failed:
                say(f"{self.folder / REPORT} is not complete, and the run goes on: {type(error).__name__}: {error}")
            self.has_failed = True

    def _add_session(self, step: int) -> None:
        add_session(self.folder, step, torch.distributed.get_world_size())

    def _answer(self, model: torch.nn.Module, dataset: Any, path: Path) -> None:
        self.no_answers = "The model could not be asked; the log of the run says why."
        self.answers = answers(model, dataset.processor(), path, dataset.seq_length)
        self.no_answers = f"Of the rows of {path} that were looked at, none is a chat that can be used."

    def _write(self, state: str, peaks: Sequence[int | None]) -> None:
        assert self._context is not None and self._context.state.cfg is not None
        config, progress = self._context.state.cfg, self._context.state.train_state
        run = Run(
            title=self.title,
            state=state,
            step=progress.step,
            steps=config.train.train_iters,
            tokens=progress.consumed_train_samples * config.model.seq_length,
            settings=self.settings,
            recipe=self.recipe,
            memory=estimate(config, len(peaks)),
            peaks=peaks,
            is_gpu=self.peak.is_of_gpu,
            answers=self.answers,
            no_answers=self.no_answers,
        )
        self.metrics.update()
        write_report(self.folder, run, self.metrics)


def write_report(folder: Path, run: Run, metrics: Metrics) -> None:
    """Write ``report.html`` from a run and the files in its folder.

    Args:
        folder: of the run, with ``experts.json`` and ``sessions.jsonl`` where these have been written.
        run: what is in no file.
        metrics: up to date.
    """
    sessions = read_sessions(folder)
    hidden, recipe = _shown(run.settings), _shown(run.recipe)
    page = _template().render(
        run=run,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        summary=list(_summary(run, metrics, sessions)),
        figures=[(title, figure) for title, figure in _figures(metrics, len(run.peaks)) if figure is not None],
        experts=_experts(read_expert_counts(folder)),
        memory=_memory(run),
        sessions=sessions,
        settings=text_of(hidden, recipe),
        differences=[(key, _value(recipe, key), _value(hidden, key)) for key in differences(hidden, recipe)],
        unreadable=metrics.unreadable,
    )
    with atomic_file(folder / REPORT) as file:
        file.write(page)


def _template() -> jinja2.Template:
    templates = environment(Path(__file__).parent, "train")
    templates.filters |= {"number": charts.number, "gib": _gib, "when": _when}
    return templates.get_template("report.html.jinja")


def _summary(run: Run, metrics: Metrics, sessions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Name, value and unit or explanation of the numbers at the top."""
    loss = metrics.series("loss")
    seconds, ranks = metrics.seconds(), len(run.peaks)
    yield "Steps", f"{run.step:,}", f"of {run.steps:,}"
    yield "Tokens", f"{run.tokens:,}", "padding included"
    if loss:
        yield "Training loss", f"{loss[-1][1]:.4f}", f"nats per token, at step {loss[-1][0]:,}"
    for name, losses in (("Validation loss", metrics.validation), ("Test loss", metrics.test)):
        if losses and (last := losses[max(losses)]) is not None:
            yield name, f"{last:.4f}", f"nats per token, at step {max(losses):,}"
    if seconds:
        yield "Time of training", _duration(seconds), "without evaluation and pauses"
        yield (
            "GPU-hours" if run.is_gpu else "CPU-hours",
            charts.number(seconds * ranks / 3600),
            f"on {ranks} ranks" if ranks > 1 else "on one rank",
        )
    if sessions:
        day, time = _when(sessions[0]["started"]).split()
        yield "Started", time, f"{day}, {len(sessions)} starts" if len(sessions) > 1 else day


def _figures(metrics: Metrics, ranks: int) -> Iterator[tuple[str, Markup | None]]:
    loss, step = metrics.series("loss"), "step"
    shown = with_mean("training", loss)
    shown.append(Line("validation", sorted(metrics.validation.items()), 1, "dots"))
    yield "Loss", line_chart(shown, step, "loss in nats per token")
    kinds = [("after_image", "tokens after an image", 1), ("without_image", "tokens without image before", 0)]
    lines = [Line(title, metrics.series(f"loss_{name}"), color) for name, title, color in kinds]
    yield "Loss with and without image", line_chart(lines, step, "loss in nats per token")
    if sources := metrics.sources():
        lines = [Line(name, metrics.series(f"{OF_SOURCE}{name}"), color % 4) for color, name in enumerate(sources)]
        yield "Loss of each source", line_chart(lines, step, "loss in nats per token")
    for title, name, unit in (
        ("Learning rate", "learning_rate", "learning rate"),
        ("Gradient norm", "grad_norm", "norm before clipping"),
        ("Seconds per step", "seconds_per_step", "seconds"),
    ):
        points = metrics.series(name)
        lines = [Line("last", points)] if name == "learning_rate" else with_mean("last", points)
        yield title, line_chart(lines, step, unit, from_zero=name != "grad_norm")
    speed = [(at, value * ranks) for at, value in metrics.series("tokens_per_second_per_GPU")]
    yield "Throughput", line_chart(with_mean("last, all ranks", speed), step, "tokens per second", from_zero=True)
    work = metrics.series("model_TFLOP_per_second_per_GPU")
    yield "Operations", line_chart(with_mean("last, each rank", work), step, "TFLOP/s per rank", from_zero=True)
    names = [("images_per_rank_most", "most", 1), ("images_per_rank", "mean", 0), ("images_per_rank_least", "least", 2)]
    lines = [Line(title, metrics.series(name), color) for name, title, color in names]
    if any(value for line in lines for _, value in line.points):
        yield (
            "Images of a rank",
            line_chart(lines if ranks > 1 else lines[1:2], step, "images per step", from_zero=True),
        )


def _experts(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Figures and table of the routing; None where no interval was logged."""
    if not found:
        return None
    counts = torch.tensor(found["tokens_per_expert"], dtype=torch.float64)
    shares = counts / counts.sum(-1, keepdim=True)
    equal = 1 / counts.shape[-1]
    maps = []
    for index, name in enumerate(MODALITIES):
        if counts[:, index].sum() > 0:
            values = [[None if value != value else value for value in row] for row in shares[:, index].tolist()]
            title = f"share of {name} tokens by layer and expert"
            maps.append((f"{name} tokens", index, charts.heat_map(values, equal, index, "expert", "layer", title)))
    measures = [(entropy(counts[:, index]) / -math.log(equal)).tolist() for index in range(len(MODALITIES))]
    measures.append(overlap(counts).tolist())
    names = [*(f"entropy, {name} tokens" for name in MODALITIES), "overlap"]
    over_layers = [Line(name, list(enumerate(measures[color])), color) for color, name in enumerate(names)]
    history = [[(row[0], row[color + 1]) for row in found["history"]] for color in range(len(names))]
    over_steps = [Line(name, history[color], color) for color, name in enumerate(names)]
    return {
        "step": found["step"],
        "most": shares.nan_to_num().max().item(),
        "equal": equal,
        "maps": maps,
        "over_layers": line_chart(over_layers, "layer", "entropy and overlap", from_zero=True),
        "over_steps": line_chart(over_steps, "step", "mean over all layers", from_zero=True),
        "rows": list(zip(*measures, strict=True)),
    }


def _memory(run: Run) -> dict[str, Any]:
    parts = {name: getattr(run.memory, name) for name in ("parameters", "gradients", "optimizer", "activations")}
    peaks = {rank: peak for rank, peak in enumerate(run.peaks) if peak is not None}
    most = max(peaks.values(), default=0)
    return {
        "parts": parts,
        "total": run.memory.total,
        "peaks": peaks,
        "most": most,
        "scale": max(run.memory.total, most),
        "ratio": run.memory.total / most if most else None,
    }


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without secrets, and without environment variables."""
    return {key: without_secret(key, value) for key, value in settings.items() if key.partition(".")[0] != "env_vars"}


def _value(settings: Mapping[str, Any], key: str) -> str:
    return str(settings[key]) if key in settings else "default"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _when(moment: str) -> str:
    return datetime.datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
