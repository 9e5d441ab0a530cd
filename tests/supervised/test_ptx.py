"""Which conversations stand beside an iteration's samples, and what is refused."""

import json

import pytest

from megatron_rl import config as configuration
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.supervised.ptx import PTX
from tests.resume.recipe import write_recipe


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")
    recipe = write_recipe(folder, iterations=1)
    model = ModelConfig.from_folder(folder / "model")

    def ptx(tokens: int, texts: list[str]) -> PTX:
        data = folder / "given.jsonl"
        data.write_text("".join(json.dumps({"prompt": "q", "response": text}) + "\n" for text in texts))
        settings = ["run.folder=run", "algorithm.ptx.weight=0.5", f"algorithm.ptx.path={data}", f"algorithm.ptx.tokens={tokens}"]
        return PTX(configuration.load(recipe, settings), ChatTokenizer.from_folder(folder / "model"), model)

    return ptx


def test_draws_hold_the_tokens_asked_for_weigh_as_said_and_repeat(make):
    ptx = make(10, ["abc"] * 20)  # four loss-bearing tokens each, the end included
    first = ptx.draw(3, 0)
    assert [len(s.response_ids) for s in first] == [4, 4, 4] and all(s.is_supervised and s.trajectory_id < 0 for s in first)
    assert sum(s.weight * s.loss_mask.sum() for s in first) == pytest.approx(0.5)
    ids = [s.trajectory_id for s in first]
    assert [s.trajectory_id for s in make(10, ["abc"] * 20).draw(3, 0)] == ids
    assert [s.trajectory_id for s in ptx.draw(3, 1)] != ids != [s.trajectory_id for s in ptx.draw(4, 0)]
    assert len(make(1000, ["abc"] * 20).draw(0, 0)) == 20


def test_iterations_are_not_trained_again_beside_other_conversations(make, tmp_path):
    make(10, ["abc", "de"]).bind(tmp_path, replays=False)
    make(10, ["abc", "de"]).bind(tmp_path, replays=True)
    for tokens, texts in ((10, ["abc", "df"]), (10, ["abc"]), (11, ["abc", "de"])):
        with pytest.raises(DataError, match=f"algorithm.ptx.path=.*given.jsonl, tokens={tokens}: gives other conversations"):
            make(tokens, texts).bind(tmp_path, replays=True)
    make(10, ["f"]).bind(tmp_path, replays=False)
    make(10, ["f"]).bind(tmp_path, replays=True)


def test_a_conversation_longer_than_the_context_and_a_weight_without_data_are_refused(make, tmp_path):
    with pytest.raises(DataError, match=r"line 2, column 1: 60\d tokens, more than the model's context of 512"):
        make(10, ["abc", "x" * 600])
    settings = ["run.folder=run", "algorithm.ptx.weight=0.5", "algorithm.ptx.path=null"]
    with pytest.raises(ConfigError, match="algorithm.ptx.weight=0.5: needs algorithm.ptx.path"):
        configuration.load(write_recipe(tmp_path, iterations=1), settings)
