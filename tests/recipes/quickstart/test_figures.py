"""The pictures say what the numbers say: counts, marks and labels are read back from the drawn figure."""

import hashlib
from collections.abc import Callable
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
    """Calls a drawing function and gives back the figure that it would have written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(function: Callable[..., None], *arguments: object, **options: object) -> Figure:
        function(*arguments, Path("unwritten.png"), **options)
        return figures[-1]

    return draw


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def digits(count: int, wrong: set[int]) -> tuple[list[Image.Image], list[str], list[str], list[str]]:
    """`count` images with questions, answers and truths; those in `wrong` are answered «ten»."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    truths = [WORDS[i % 10] for i in range(count)]
    answers = ["ten" if i in wrong else truth for i, truth in enumerate(truths)]
    return [Image.fromarray(image) for image in pixels], ["Which digit is this?"] * count, answers, truths


def shares(layers: int, experts: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(experts), size=(layers, 2))


def draw_all(folder: Path) -> list[Path]:
    paths = [folder / name for name in ("loss.png", "predictions.png", "experts.png")]
    loss_figure(range(1, 101), list(np.geomspace(6, 0.1, 100)), paths[0], held_out=([50, 100], [1.0, 0.2]))
    predictions_figure(*digits(30, {3}), paths[1])
    experts_figure(shares(4, 8), paths[2])
    return paths


def test_same_input_gives_the_same_bytes(tmp_path: Path):
    once = [hashlib.sha256(path.read_bytes()).digest() for path in draw_all(tmp_path)]
    assert once == [hashlib.sha256(path.read_bytes()).digest() for path in draw_all(tmp_path)]


def test_pictures_are_sharp_enough_to_print(tmp_path: Path):
    for path in draw_all(tmp_path):
        with Image.open(path) as image:
            assert min(image.info["dpi"]) > 150
            assert image.width >= 1400


def test_settings_of_the_caller_are_neither_used_nor_changed(tmp_path: Path):
    plain = [path.read_bytes() for path in draw_all(tmp_path)]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert [path.read_bytes() for path in draw_all(tmp_path)] == plain
        assert dict(matplotlib.rcParams) == before


def test_loss_names_its_units_and_marks_first_and_last(drawn):
    figure = drawn(loss_figure, [10, 20, 30], [6.26, 5.0, 4.125])
    assert {"6.26", "4.12", "optimizer step", "cross-entropy (nats per answer token)"} <= set(texts(figure))


def test_loss_is_smoothed_around_each_step(drawn):
    losses = 3 + np.random.default_rng(0).normal(size=100)
    raw, smooth = (line.get_ydata() for line in drawn(loss_figure, range(100), list(losses)).axes[0].lines[:2])
    assert list(raw) == list(losses)
    assert smooth[50] == pytest.approx(losses[48:53].mean())
    assert smooth[0] == pytest.approx(losses[:3].mean())


@pytest.mark.parametrize(("last", "scale"), [(0.1, "log"), (3.0, "linear"), (0.0, "linear")])
def test_loss_is_logarithmic_only_where_it_falls_far(drawn, last: float, scale: str):
    assert drawn(loss_figure, [1, 2], [6.0, last]).axes[0].get_yscale() == scale


def test_held_out_loss_is_drawn_where_given(drawn):
    assert "held out" in texts(drawn(loss_figure, [1, 2], [2.0, 1.0], held_out=([2], [1.5])))
    assert "held out" not in texts(drawn(loss_figure, [1, 2], [2.0, 1.0]))


def test_a_loss_that_is_no_number_is_named_by_its_step(tmp_path: Path):
    with pytest.raises(ValueError, match="loss at step 7 is nan"):
        loss_figure([6, 7], [1.0, float("nan")], tmp_path / "loss.png")


def test_predictions_count_all_and_show_all_where_they_fit(drawn):
    seen = texts(drawn(predictions_figure, *digits(20, {3, 4})))
    assert "18 of 20 answers are right (90.0%)" in seen
    assert sum(text.startswith("✓") for text in seen) == 18
    assert seen.count("✗ ten") == 2
    assert {"right: three", "right: four"} <= set(seen)


@pytest.mark.parametrize(
    ("wrong", "marked"), [(set(), 0), ({359}, 1), (set(range(0, 300, 10)), 8), (set(range(360)), 24)]
)
def test_predictions_show_wrong_ones_among_many_and_say_how_many(drawn, wrong: set[int], marked: int):
    seen = texts(drawn(predictions_figure, *digits(360, wrong)))
    assert sum(text.startswith("✗") for text in seen) == marked
    assert sum(text.startswith("✓") for text in seen) == 24 - marked
    assert f"24 of 360 shown, with {marked} of the {len(wrong)} wrong ones" in seen


def test_case_and_space_do_not_make_an_answer_wrong(drawn):
    images, questions, _, truths = digits(1, set())
    assert "1 of 1 answers are right (100.0%)" in texts(
        drawn(predictions_figure, images, questions, [" Zero\n"], truths)
    )


def test_any_text_of_a_model_can_be_drawn(tmp_path: Path):
    images, questions, _, truths = digits(5, set())
    answers = ["", "$\\frac{", "日本\x00\x1b[0m", "<|end|>" * 50, "a\nb\nc\nd"]
    predictions_figure(images, questions, answers, truths, tmp_path / "predictions.png")
    assert (tmp_path / "predictions.png").stat().st_size > 0


def test_sequences_of_different_lengths_are_refused_with_numbers(tmp_path: Path):
    images, questions, answers, truths = digits(3, set())
    with pytest.raises(ValueError, match=r"\[3, 3, 2, 3\]"):
        predictions_figure(images, questions, answers[:2], truths, tmp_path / "predictions.png")


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


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (2, 4), (7, 16), (24, 32), (36, 128)])
def test_every_size_of_model_gets_a_panel_per_layer(drawn, layers: int, experts: int):
    figure = drawn(experts_figure, shares(layers, experts))
    assert [f"layer {layer}" for layer in range(layers)] == [
        axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes if axes.axison
    ]


def test_shares_that_do_not_sum_to_one_are_named(tmp_path: Path):
    values = shares(3, 4)
    values[2, 1] = 0
    with pytest.raises(ValueError, match=r"text shares of layer 2 sum to 0\.0000"):
        experts_figure(values, tmp_path / "experts.png")


def test_shares_of_another_shape_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"got \[4, 8\]"):
        experts_figure(np.ones((4, 8)), tmp_path / "experts.png")
