"""The embedded engine against transformers: tokens and log-probs of every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_scenarios import MODELS, collect, open_engine, prompt, request, run
from transformers import AutoModelForCausalLM

from megatron_rl.types import Ending


def reference_log_probs(folder, context, response, temperature):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_log_probs_equal_transformers(name, model_folder):
    folder = model_folder(name)
    prompts = {i: prompt(i, length) for i, length in enumerate((1, 3, 4, 17, 33))}

    async def scenario():
        engine = open_engine(folder, prefill_tokens=10)
        found = await collect(engine, [request(i, p, 40, temperature=0) for i, p in prompts.items()])
        await engine.close()
        return found

    found = run(scenario())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for i, context in prompts.items():
        expected = model.generate(torch.tensor([context]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, len(context) :]
        assert found[i].token_ids.tolist() == expected.tolist()
        assert found[i].ending == Ending.LENGTH
        np.testing.assert_allclose(found[i].log_probs, reference_log_probs(folder, context, expected.tolist(), 1.0), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_of_sampled_tokens_equal_transformers_at_the_temperature(name, model_folder):
    folder = model_folder(name)
    context = prompt(7, 19)

    async def scenario():
        engine = open_engine(folder)
        found = await collect(engine, [request(5, context, 60, temperature=1.7, top_p=0.9, seed=3)])
        await engine.close()
        return found[5]

    found = run(scenario())
    expected = reference_log_probs(folder, context, found.token_ids.tolist(), 1.7)
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)
