"""The figures show the data: counts, marks and labels are read back from the drawn figure."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gpt_oss_vision.recipes.quickstart.figures import experts_figure, loss_figure, predictions_figure

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Figure]:
    """A function that calls a drawing function and returns the figure instead of writing it."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(function: Callable[..., None], *arguments: object, **options: object) -> Figure:
        function(*arguments, Path("unwritten.png"), **options)
        return figures[-1]

    return draw


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def digits(count: int, wrong: set[int]) -> tuple[list[Image.Image], list[str], list[str], list[str]]:
    """`count` images with questions, answers and truths; those in `wrong` are answered "ten"."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    truths = [WORDS[i % 10] for i in range(count)]
    answers = ["ten" if i in wrong else truth for i, truth in enumerate(truths)]
    return [Image.fromarray(image) for image in pixels], ["Which digit is this?"] * count, answers, truths


def shares(layers: int, experts: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(experts), size=(layers, 2))


def draw_all(folder: Path) -> list[Path]:
    paths = [folder / name for name in ("loss.png", "predictions.png", "experts.png")]
    loss_figure(list(np.geomspace(6, 0.1, 100)), paths[0])
    predictions_figure(*digits(7, {3}), paths[1])
    experts_figure(shares(4, 8), paths[2])
    return paths


def test_same_input_gives_the_same_sharp_pictures_whatever_the_settings_of_the_caller(tmp_path: Path):
    once = [path.read_bytes() for path in draw_all(tmp_path)]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert [path.read_bytes() for path in draw_all(tmp_path)] == once
        assert dict(matplotlib.rcParams) == before
    for content in once:
        with Image.open(BytesIO(content)) as image:
            assert min(image.info["dpi"]) > 150
            assert image.width >= 1400


def test_loss_names_its_units_and_marks_first_and_last(drawn):
    figure = drawn(loss_figure, [6.26, 5.0, 4.125])
    assert {"6.26", "4.12", "optimizer step", "cross-entropy (nats per answer token)"} <= set(texts(figure))


def test_loss_is_smoothed_around_each_step(drawn):
    losses = 3 + np.random.default_rng(0).normal(size=100)
    raw, smooth = (line.get_ydata() for line in drawn(loss_figure, list(losses)).axes[0].lines[:2])
    assert list(raw) == list(losses)
    assert smooth[50] == pytest.approx(losses[48:53].mean())
    assert smooth[0] == pytest.approx(losses[:3].mean())


@pytest.mark.parametrize(("last", "scale"), [(0.1, "log"), (3.0, "linear"), (0.0, "linear")])
def test_loss_is_logarithmic_only_where_it_falls_far(drawn, last: float, scale: str):
    assert drawn(loss_figure, [6.0, last]).axes[0].get_yscale() == scale


def test_predictions_count_all_and_show_all_where_they_fit(drawn):
    seen = texts(drawn(predictions_figure, *digits(20, {3, 4})))
    assert "18 of 20 answers are right (90.0%)" in seen
    assert sum(text.startswith("✓") for text in seen) == 18
    assert {"✗ ten, not three", "✗ ten, not four"} <= set(seen)


@pytest.mark.parametrize("wrong", [set(), {359}, set(range(0, 300, 10)), set(range(360))], ids=len)
def test_predictions_show_wrong_ones_first_among_many(drawn, wrong: set[int]):
    seen = texts(drawn(predictions_figure, *digits(360, wrong)))
    marked = min(len(wrong), 24)
    assert sum(text.startswith("✗") for text in seen) == marked
    assert sum(text.startswith("✓") for text in seen) == 24 - marked
    assert "24 shown, wrong ones first" in seen


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_any_text_of_a_model_can_be_drawn(tmp_path: Path):
    images, questions, _, truths = digits(5, set())
    answers = ["", "$\\frac{", "日本\x00\x1b[0m", "<|end|>" * 50, "a\nb\nc\nd"]
    predictions_figure(images, questions, answers, truths, tmp_path / "predictions.png")
    assert (tmp_path / "predictions.png").stat().st_size > 0


def test_overlap_is_one_for_like_and_zero_for_unlike_routing(drawn):
    uniform, left, right = np.full(4, 0.25), np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5])
    seen = texts(drawn(experts_figure, np.array([[uniform, uniform], [left, right], [left, uniform]])))
    assert {"layer 0 · overlap 1.00", "layer 1 · overlap 0.00", "layer 2 · overlap 0.50"} <= set(seen)
    assert "uniform share 1/4" in seen


def test_visual_shares_go_up_and_text_shares_down(drawn):
    values = shares(1, 8)
    heights = [bar.get_height() for bar in drawn(experts_figure, values).axes[0].patches]
    assert heights[:8] == pytest.approx(values[0, 0])
    assert heights[8:] == pytest.approx(-values[0, 1])


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (4, 8), (7, 16)])
def test_every_size_of_model_gets_a_panel_per_layer(drawn, layers: int, experts: int):
    figure = drawn(experts_figure, shares(layers, experts))
    assert [f"layer {layer}" for layer in range(layers)] == [
        axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes if axes.axison
    ]
