"""A known evaluation as the table and as the page that show it."""

import io
import re
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from megatron_rl.answering import Response
from megatron_rl.evaluate import summary
from megatron_rl.report.evaluation import evaluation_page, evaluation_table
from megatron_rl.types import Ending


@pytest.fixture(scope="module")
def result():
    """Twelve prompts, two responses each: both right, the second right, none; 2, 4, ... 12 tokens."""
    rights = [True, True, False, True, False, False]
    responses = [Response(str(i), 2 * (i + 1), is_right, Ending.STOP) for i, is_right in enumerate(rights)]
    rows = [responses[0:2], responses[2:4], responses[4:6]] * 4
    found = summary(rows, seed=0, prefix=None, model="a <model> & more", split="held_out", greedy=False, temperature=0.7)
    return {**vars(found), "scores": [vars(score) for score in found.scores]}


def test_the_table_holds_every_score_with_its_interval_and_the_tokens(result):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(evaluation_table(result))
    heading, *lines = [re.split(r"\s{2,}", line.strip()) for line in console.export_text().splitlines()]
    assert heading == ["held_out, temperature 0.7", "mean", "95 % interval"]
    assert [line[:2] for line in lines] == [["pass@1", "0.500"], ["pass@2", "0.667"], ["maj@2", "0.333"], ["tokens", "7.0"]]
    intervals = [f"{s['low']:.3f} to {s['high']:.3f}" for s in result["scores"]]
    assert [line[2] for line in lines[:3]] == intervals and len(set(intervals)) > 1


def test_the_page_parses_loads_nothing_and_holds_the_same_numbers(result):
    page = evaluation_page(result)
    assert not re.search(r"https?:|//[a-z]|\ssrc=|\shref=|url\(|@import|<link|<script|<iframe", page)
    root = ET.fromstring(page.replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))
    assert root.findtext(".//h1") == "a <model> & more"
    facts = root.findtext(".//p[@class='sub']")
    assert facts == "held_out: 12 prompts, 2 responses each, temperature 0.7, 7.0 tokens a response"
    rows = [row.findall("td") for row in root.iter("tr")][1:]
    assert [(name.text, mean.text) for name, mean, _, _ in rows] == [("pass@1", "0.500"), ("pass@2", "0.667"), ("maj@2", "0.333")]
    for (_, _, picture, interval), score in zip(rows, result["scores"], strict=True):
        assert interval.text == f"{score['low']:.3f} to {score['high']:.3f}"
        line, circle = picture.findall(".//line")[-1], picture.find(".//circle")
        drawn = [float(x) for x in (line.get("x1"), circle.get("cx"), line.get("x2"))]
        assert drawn == pytest.approx([4 + 152 * score[key] for key in ("low", "mean", "high")], abs=0.06), "to scale"
