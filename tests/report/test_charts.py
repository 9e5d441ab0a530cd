import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.report.charts import Line, dumbbells, interval, line_chart, moving_average, number, stacked_bars

values = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=40)


def numbers_of(path):
    return [float(n) for n in re.findall(r"-?\d+\.\d+", path)]


def test_a_moving_average_is_the_mean_of_the_present_values_in_its_window():
    assert moving_average([1.0, None, 3.0, 5.0, None, None], 2) == [1.0, 1.0, 3.0, 4.0, 5.0, None]


def test_a_missing_value_leaves_a_gap():
    svg = ET.fromstring(line_chart([0, 1, 2, 3], [Line("a", [1.0, None, 2.0, 3.0])]))
    (path,) = svg.findall("path")
    assert re.sub(r"[\d. -]", "", path.get("d")) == "MML"


@given(values)
def test_every_point_lies_within_the_plotting_area_in_the_order_of_its_values(series):
    markup = line_chart(range(len(series)), [Line("a", series)])
    present = [v for v in series if v is not None]
    if not present:
        assert "no data" in markup
        return
    points = re.findall(r"[ML](\S+) (\S+?)(?=[MLh]|$)", ET.fromstring(markup).find("path").get("d"))
    assert len(points) == len(present)
    heights = [float(y) for _, y in points]
    assert all(9.9 <= y <= 196.1 for y in heights)
    for (a, ya), (b, yb) in zip(zip(present, heights, strict=True), list(zip(present, heights, strict=True))[1:], strict=False):
        assert (b - a) * (yb - ya) <= 0.11 * abs(b - a), "a larger value is never lower, up to the rounding of the drawing"


def test_stacked_bars_stand_on_each_other_in_proportion():
    svg = ET.fromstring(stacked_bars([5], {"rollout": [3.0], "train": [1.0]}, "s"))
    low, high = svg.find("g").findall("rect")
    assert float(low.get("height")) == pytest.approx(3 * float(high.get("height")), abs=0.3)
    assert float(high.get("y")) + float(high.get("height")) == pytest.approx(float(low.get("y")), abs=0.11)


def test_many_iterations_are_averaged_into_few_bars():
    svg = ET.fromstring(stacked_bars(range(1000), {"a": [1.0] * 1000}, "s"))
    assert len(svg.findall("g")) == 100
    assert svg.find("g").get("data-t").startswith("iteration 0–9 (mean)\na: 1 s")


def test_charts_escape_names():
    for markup in (
        line_chart([0], [Line("<b>&", [1.0])]),
        stacked_bars([0], {"<b>&": [1.0]}, "s"),
        dumbbells([("<b>&", 0.1, 0.9, "")], "x", "y"),
        interval(0.5, 0.4, 0.6),
    ):
        assert "<b>" not in markup
        ET.fromstring(markup)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.12345, "0.123"), (9999, "9,999"), (16_400, "16.4k"), (2_500_000, "2.5M"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
