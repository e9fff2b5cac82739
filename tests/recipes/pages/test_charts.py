"""Charts of pages: round ticks, all peaks, and bars in proportion."""

import re

import pytest

from gpt_oss_vision.recipes.pages.charts import HEIGHT, TOP, Axis, Line, bar_chart, line_chart


def test_ticks_are_round_and_within_the_scale():
    assert Axis(0, 1).ticks(6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Axis(0.04, 7, is_log=True).ticks(6) == pytest.approx([0.1, 0.3, 1, 3])
    for axis in (Axis(-3, 1e9), Axis(1e-9, 2e-9), Axis(5, 5.0001), Axis(1e-12, 1e12, is_log=True)):
        ticks = axis.ticks(6)
        assert 1 <= len(ticks) <= 7 and all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in ticks)


def test_a_line_of_many_points_keeps_its_peaks():
    chart = line_chart([Line("loss", [(step, 9.0 if step == 7777 else 1.0) for step in range(20000)])], "step", "loss")
    heights = [float(place.split(",")[1]) for place in re.search(r'points="([^"]+)"', chart)[1].split()]
    assert len(heights) < 500 and min(heights) < TOP + 0.1 * HEIGHT < max(heights)


def test_bars_are_in_proportion_and_say_their_number():
    chart = bar_chart([("1–2", 10), ("<b>", 40), ("5–8", 0)], "tokens", "rows")
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights == pytest.approx([heights[1] / 4, heights[1], 0], abs=0.1) and heights[1] > 0
    assert "<title>1–2: 10</title>" in chart and "<title>&lt;b&gt;: 40</title>" in chart and "<b>" not in chart


def test_of_many_bars_some_are_named():
    chart = bar_chart([(f"{number}", number) for number in range(100)], "images", "rows")
    assert chart.count("<rect") == 100 and 5 <= chart.count('text-anchor="middle"') - 2 <= 12
