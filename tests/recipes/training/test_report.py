"""``report.html``: its values are those of the run, it needs nothing else, and it never ends a run."""

import json
import re
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import forked
import pytest
import torch
from PIL import Image
from runs import lengths_read

import gpt_oss_vision
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.cli import main
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.data.tiny import write_processor

STEPS, ROWS = 6, 24
SMALL = {
    "train.train_iters": STEPS,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "logger.log_interval": 2,
    "validation.eval_interval": 3,
    "validation.eval_iters": 1,
    "checkpoint.save_interval": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _warm():
    gpt_oss_vision.register()
    from gpt_oss_vision.recipes import tiny  # noqa: F401 - so that forks need not import it
    from gpt_oss_vision.recipes.training import run  # noqa: F401


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the processor, and files of a few rows: for training, for validation, and of text alone."""
    folder = tmp_path_factory.mktemp("shared") / "digits"
    cpu.run_ranks(1, write_few, folder)
    return folder


def write_few(folder: Path) -> None:
    rows = write_digits(folder, 0).train_path.read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(rows[:ROWS]))
    hostile = (
        '{"messages": [{"role": "user", "content": "<script>1</script>"}, {"role": "assistant", "content": "<b>"}]}'
    )
    (folder / "valid.jsonl").write_text("\n".join([hostile, *rows[ROWS : ROWS + 5]]))
    text = '{"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "seven"}]}\n'
    (folder / "text.jsonl").write_text(text * ROWS)
    write_processor(folder / "processor")


@pytest.fixture(scope="module")
def arguments(digits: Path) -> Callable[..., tuple[str, ...]]:
    def line(out: Path, *settings: str, recipes: str = "gpt_oss_vision_tiny_sft") -> tuple[str, ...]:
        names = [setting.partition("=")[0] for setting in settings]
        files = {"data.folder": digits, "data.path": digits / "few.jsonl", "data.valid_path": digits / "valid.jsonl"}
        defaults = SMALL | {"out": out} | files
        kept = (f"{name}={value}" for name, value in defaults.items() if name not in names)
        return ("train", recipes, *kept, *settings)

    return line


class Page(HTMLParser):
    """The texts of a page, its elements, and the values of attributes that name other files."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))

    def after(self, text: str, count: int = 1) -> str:
        """The text behind another one."""
        return self.texts[self.texts.index(text) + count]


def values(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, arguments: Callable[..., tuple[str, ...]]) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert forked.run(*arguments(folder / "run"), output=folder / "output") == 0, (folder / "output").read_text()
    assert "report.html" not in (folder / "output").read_text()
    return folder / "run"


def test_the_numbers_at_the_top_are_those_of_the_run(out: Path):
    page, entries = Page(out / "report.html"), values(out)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    validation = [entry["validation_loss"] for entry in entries if "validation_loss" in entry]
    assert page.texts[0] == "gpt_oss_vision_tiny_sft_1cpu_fp32: finished"
    assert page.after("Steps") == str(STEPS)
    assert page.after("Tokens") == f"{STEPS * 8 * 32:,}"
    assert page.after("Training loss") == f"{losses[-1]:.4f}"
    assert page.after("Validation loss") == f"{validation[-1]:.4f}"


def test_the_figures_end_with_the_last_values(out: Path):
    from gpt_oss_vision.recipes.pages.charts import number

    page, last = (
        Page(out / "report.html"),
        next(entry for entry in reversed(values(out)) if "loss_after_image" in entry),
    )
    assert page.after("tokens after an image") == number(last["loss_after_image"])
    assert page.after("tokens without image before") == number(last["loss_without_image"])
    assert page.after("last, each rank") == number(last["model_TFLOP_per_second_per_GPU"])
    titles = ("Loss", "Learning rate", "Gradient norm", "Throughput", "Seconds per step", "Shares of visual tokens")
    assert {*titles} <= {*page.texts}
    assert page.tags.count("svg") >= len(titles)


def test_the_page_needs_no_other_file_and_runs_no_script(out: Path):
    page = Page(out / "report.html")
    assert page.references and all(value.startswith("data:image/") for value in page.references)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {*page.tags}
    assert "default-src 'none'" in page.source
    assert not re.search(r"url\(|@import|https?:", page.source)


def test_rows_of_the_validation_data_have_the_answers_of_the_model(out: Path, digits: Path):
    page = Page(out / "report.html")
    asked = page.tags.count("article")
    assert 4 <= asked <= 6 and 1 <= page.tags.count("img") <= asked
    assert page.after("<script>1</script>", 2) == "<b>"
    assert page.texts.count("model") == page.texts.count("data") == asked


def test_differences_to_the_recipe_command_and_versions(out: Path):
    page = Page(out / "report.html")
    assert (page.after("train.train_iters"), page.after("train.train_iters", 2)) == ("300", str(STEPS))
    assert f"train.train_iters={STEPS}" in next(text for text in page.texts if text.startswith("gpt-oss-vision train"))
    assert page.after("torch") == torch.__version__.partition("+")[0]
    assert page.after("gpt-oss-vision") == gpt_oss_vision.__version__


def test_memory_is_estimated_by_part_beside_the_peak_of_the_process(out: Path):
    page = Page(out / "report.html")
    parts = [float(page.after(name).removesuffix(" MiB")) for name in ("parameters", "gradients", "optimizer")]
    assert parts == pytest.approx([3.13, 3.13, 6.26], abs=0.06)
    (peak,) = (text for text in page.texts if text.startswith("Resident memory at most"))
    assert float(peak.rpartition(": ")[2].removesuffix(" MiB")) > 1


def test_the_experts_are_those_of_the_last_interval(out: Path, digits: Path):
    experts = json.loads((out / "experts.json").read_text())
    counts = torch.tensor(experts["tokens_per_expert"])
    lengths = lengths_read(digits / "few.jsonl", digits / "processor", STEPS * 8, seed=0)
    assert counts.shape == (4, 2, 8) and (counts.sum((1, 2)) == lengths[-2 * 8 :].sum() * 2).all()  # two experts each
    assert [row[0] for row in experts["history"]] == [2, 4, 6]
    assert "in the log interval that ended with step 6." in " ".join(Page(out / "report.html").texts)


def test_a_killed_run_has_both_starts_and_each_step_once(arguments: Callable[..., tuple[str, ...]], tmp_path: Path):
    from gpt_oss_vision.recipes.training.metrics import Metrics

    run, output = tmp_path / "run", tmp_path / "output"
    command = forked.Command(*arguments(run), output=output)
    command.wait_until(lambda: (run / "report.html").exists())
    command.send(signal.SIGKILL, group=True)
    command.exit_code()
    assert "running: step 2 of 6" in Page(run / "report.html").texts
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo\n')
    assert forked.run(*arguments(run), output=output) == 0
    page, metrics = Page(run / "report.html"), Metrics(run)
    metrics.update()
    assert "finished" in page.texts and page.source.count("gpt-oss-vision train ") == 2
    assert [step for step, _ in metrics.series("loss")] == [*range(1, STEPS + 1)]
    assert [row[0] for row in json.loads((run / "experts.json").read_text())["history"]] == [2, 4, 6]
    assert "1 lines of metrics.jsonl could not be read" in page.source


def test_a_run_that_is_asked_to_end_says_so(arguments: Callable[..., tuple[str, ...]], tmp_path: Path):
    run = tmp_path / "run"
    command = forked.Command(*arguments(run, "train.train_iters=400"), output=tmp_path / "output")
    command.wait_until(lambda: (run / "report.html").exists())
    command.send(signal.SIGTERM)
    assert command.exit_code() == 75
    assert "saved, to be continued" in Page(run / "report.html").texts


def test_without_images_and_validation(arguments: Callable[..., tuple[str, ...]], digits: Path, tmp_path: Path):
    run, text = tmp_path / "run", f"data.path={digits / 'text.jsonl'}"
    settings = (text, "data.valid_path=null", "validation.eval_iters=0", "train.train_iters=2")
    assert forked.run(*arguments(run, *settings), output=tmp_path / "output") == 0
    page = Page(run / "report.html")
    assert "Shares of text tokens" in page.texts
    assert not {"Shares of visual tokens", "Validation loss", "Images of a rank"} & {*page.texts}
    assert "nan" not in page.source.replace("check_for_nan_in_grad", "")


def test_each_stage_has_its_own(arguments: Callable[..., tuple[str, ...]], tmp_path: Path):
    recipes = "gpt_oss_vision_tiny_align,gpt_oss_vision_tiny_sft"
    line = arguments(tmp_path / "run", "train.train_iters=2", recipes=recipes)
    assert forked.run(*line, output=tmp_path / "output") == 0
    for stage in ("align", "sft"):
        page = Page(tmp_path / "run" / stage / "report.html")
        assert page.texts[0] == f"gpt_oss_vision_tiny_{stage}_1cpu_fp32: finished"


def test_ranks_have_a_peak_each_and_no_answers(arguments: Callable[..., tuple[str, ...]], tmp_path: Path):
    run = tmp_path / "run"
    line = arguments(run, "train.train_iters=2", "train.micro_batch_size=4", "model.tensor_model_parallel_size=2")
    assert cpu.run_ranks(2, main, line) == [0, 0]
    page = Page(run / "report.html")
    assert page.after("Peak of each rank", 3) == "0" and page.after("Peak of each rank", 5) == "1"
    assert page.tags.count("article") == 0
    assert "export the checkpoint (gpt-oss-vision convert export)" in page.source


def test_a_report_that_cannot_be_written_is_said_once_and_ends_nothing(
    arguments: Callable[..., tuple[str, ...]], tmp_path: Path
):
    (tmp_path / "run/report.html").mkdir(parents=True)
    assert forked.run(*arguments(tmp_path / "run", "train.train_iters=4"), output=tmp_path / "output") == 0
    assert (tmp_path / "output").read_text().count("report.html is not complete, and the run goes on: ") == 1


def test_secrets_are_not_shown():
    from gpt_oss_vision.recipes.training.secrets import without_secret
    from gpt_oss_vision.recipes.training.sessions import command

    line = command(["/usr/bin/gpt-oss-vision", "train", "x", "logger.comet_api_key=abc", "train.tokens=2B", "a=b c"])
    assert line == "gpt-oss-vision train x 'logger.comet_api_key=(not shown)' train.tokens=2B 'a=b c'"
    assert without_secret("logger.mlflow_tracking_uri", "http://me:pass@host/x") == "http://(not shown)@host/x"
    assert without_secret("logger.mlflow_tags", {"password": "x", "team": "y"}) == {
        "password": "(not shown)",
        "team": "y",
    }
    assert without_secret("tokenizer.vocab_size", 7) == 7


def test_pictures_are_made_small(tmp_path: Path):
    from gpt_oss_vision.recipes.data.pictures import Picture
    from gpt_oss_vision.recipes.training.answers import _data_url

    Image.effect_noise((4000, 3000), 60).save(tmp_path / "large.png")
    assert len(_data_url(Picture("large.png", path=str(tmp_path / "large.png")))) < 60_000
