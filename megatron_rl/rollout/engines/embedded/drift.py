"""How far kept KV moves log-probs: the same tokens scored under the loaded weights, on kept KV and on KV computed anew.

A measurement beside generation: it works on scratch pages and leaves every trajectory as it was. Its price is one prefill
of the trajectory. Which trajectories are measured: `rollout.kv_store.drift_samples`.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_rl.rollout.engines.embedded.kv_cache import KVCache, Prefill, Span
from megatron_rl.rollout.engines.embedded.model import CausalModel
from megatron_rl.rollout.engines.embedded.scheduler import Running, Scheduler


def differences(model: CausalModel, cache: KVCache, scheduler: Scheduler, trajectory: Running, prefill_tokens: int) -> np.ndarray:
    """|log-prob on kept KV - log-prob on fresh KV| of a retained trajectory's last one to two pages of tokens, at temperature 1.

    float64 [tokens]; empty where it has too few tokens, or the cache too few free pages."""
    size, num_tokens = scheduler.page_size, trajectory.num_computed
    start = max(num_tokens - 1, 0) // size * size - size  # scored tokens attend to whole kept pages, and to each other
    num_pages = scheduler.count_for(num_tokens)
    if start < size or scheduler.pages.num_free < num_pages:
        return np.zeros(0)
    scratch = scheduler.pages.take(num_pages, scheduler.version).tolist()
    tokens = torch.from_numpy(trajectory.tokens[:num_tokens].astype(np.int64)).to(cache.device)
    num_kept = start // size
    kept = _log_probs(model, cache, tokens, trajectory.pages[:num_kept] + scratch[num_kept:], start, start, prefill_tokens)
    fresh = _log_probs(model, cache, tokens, scratch, 0, start, prefill_tokens)
    scheduler.pages.drop(scratch)
    return (kept - fresh).abs().double().cpu().numpy()


def _log_probs(
    model: CausalModel, cache: KVCache, tokens: torch.Tensor, pages: list[int], first: int, start: int, prefill_tokens: int
) -> torch.Tensor:
    """float32 [tokens - start - 1]: of each token after `start`. KV of the tokens before `first` stands in `pages` already."""
    hidden = []
    while first < len(tokens):
        end = min(first + prefill_tokens, len(tokens))
        end = start if first < start < end else end  # what is scored is computed in the same pieces in both cases
        rows = model.forward(tokens[first:end], Prefill(cache, [Span(pages, first, end)]))
        if first >= start:
            hidden.append(rows)
        first = end
    log_probs = model.logits(torch.cat(hidden)[:-1]).log_softmax(-1)
    return log_probs.gather(1, tokens[start + 1 :, None])[:, 0]
