"""The picture of tokens against accuracy holds every result where it belongs; what cannot be compared is refused."""

import json
import xml.etree.ElementTree as ET

import pytest

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.long2short.plot import read_result, write_plot

SVG = "{http://www.w3.org/2000/svg}"


def write(path, tokens, mean, split="gsm_symbolic", n=200):
    found = {"split": split, "n": n, "mean": mean, "low": mean - 0.05, "high": mean + 0.05, "mean_tokens": tokens}
    path.write_text(json.dumps(found))
    return path


def test_each_set_is_a_panel_with_every_model_at_its_tokens_and_accuracy(tmp_path):
    models = {"long": (400, 0.9), "merge": (200, 0.7), "short <rl>": (300, 0.85)}
    files = [write(tmp_path / f"{name}.json", *xy) for name, xy in models.items()]
    files.append(write(tmp_path / "other.json", 100, 0.5, split="aime", n=30))
    results = [read_result(file) for file in files]
    write_plot(results, tmp_path / "plot.svg")
    panels = ET.parse(tmp_path / "plot.svg").getroot().findall(f"{SVG}svg")
    assert len(panels) == 2 and len(panels[1].findall(f"{SVG}g")) == 1
    found = {}
    for group in panels[0].findall(f"{SVG}g"):
        circle = group.find(f"{SVG}circle")
        found[group.find(f"{SVG}text").text] = (float(circle.get("cx")), -float(circle.get("cy")))
    assert set(found) == set(models)
    for axis in (0, 1):
        by_value = sorted(models, key=lambda name, axis=axis: models[name][axis])
        assert by_value == sorted(found, key=lambda name, axis=axis: found[name][axis])
        low, middle, high = (found[name][axis] for name in by_value)
        values = [models[name][axis] for name in by_value]
        share = (values[1] - values[0]) / (values[2] - values[0])
        assert (middle - low) / (high - low) == pytest.approx(share, abs=0.01), "to scale"
    write_plot(results, tmp_path / "plot.html")
    assert "short &lt;rl&gt;" in (tmp_path / "plot.html").read_text()


def test_what_is_no_evaluation_or_of_other_prompts_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"mean": 1}')
    with pytest.raises(DataError, match=r"a.json: lacks split, n, low, high, mean_tokens; give files that `megatron-rl eval"):
        read_result(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError, match="a.json: cannot read it as JSON"):
        read_result(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"greedy": {"mean": 1}, "sampled": {"mean": 1}}')
    with pytest.raises(DataError, match="a.json: holds a greedy and a sampled evaluation; give files of one"):
        read_result(tmp_path / "a.json")
    results = [read_result(write(tmp_path / f"{n}.json", 10, 0.5, n=n)) for n in (100, 200)]
    with pytest.raises(DataError, match=r"set gsm_symbolic: results of \[100, 200\] prompts; evaluate all models on the same"):
        write_plot(results, tmp_path / "x.svg")
    with pytest.raises(ConfigError, match=r"x.png: must end with .html or .svg"):
        write_plot(results, tmp_path / "x.png")
