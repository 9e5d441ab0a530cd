"""Drawing tokens: Gumbel-max whose noise is a pure function of (seed, trajectory, position, token id).

The perturbed logit of a token is logit / T - log E, E an exponential variable made by a counter hash; the largest one
wins. It needs no state, so a token is the same whatever the batch, the order or a restart.

E of the `BLOCK` tokens of a block is defined through their minimum (itself exponential, with rate BLOCK) and the excess
of the others over it (exponential again: no memory). That makes all E independent and gives, from one hash a block, a
bound on what any token of the block can reach; exact noise is only computed where the bound can still win.
`perturbed` is the same function written plainly, for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from megatron_rl.rollout.engines.base import Sampling

BLOCK = 64  # tokens that share a noise bound
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_TOKEN_STREAM = 0x5851F42D4C957F2D  # sets the noise of tokens apart from the noise of blocks


@dataclass(frozen=True)
class Draw:
    """What one row of logits is sampled for."""

    sampling: Sampling
    trajectory_id: int
    position: int  # of the token to be drawn, counted from the start of the prompt


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
    """logits: float32 [rows, vocabulary] -> token ids int32 [rows], log-probs float32 [rows].

    Log-probs are of the full distribution at the sampling temperature (at 1 when greedy), before any truncation; NaN for
    a row whose logits are not finite."""
    temperatures = [d.sampling.temperature or 1.0 for d in draws]
    if any(t != 1.0 for t in temperatures):
        logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    log_probs = functional.log_softmax(logits, dim=-1)
    candidates = _truncate(log_probs, [d.sampling for d in draws])
    greedy = torch.tensor([d.sampling.temperature == 0 for d in draws], device=logits.device)
    tokens = _gumbel_max(candidates, _keys(draws).to(logits.device), greedy)
    chosen = log_probs.gather(1, tokens[:, None])[:, 0]
    return tokens.cpu().numpy().astype(np.int32), chosen.cpu().numpy()


def perturbed(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """logits: float32 [vocabulary] at the sampling temperature -> float64 [vocabulary], the largest is drawn."""
    key = _keys([draw])
    num_blocks = -(-len(logits) // BLOCK)
    block_hash = _hash(key[:, None], torch.arange(num_blocks)[None])[0]
    tokens = torch.arange(num_blocks * BLOCK).view(num_blocks, BLOCK)
    noise = _noise(key.expand(num_blocks), block_hash, tokens)
    return logits.double() + noise.flatten()[: len(logits)]


def _gumbel_max(log_probs: torch.Tensor, keys: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: argmax over tokens of log_probs + noise (log_probs alone where greedy)."""
    rows, vocabulary = log_probs.shape
    if vocabulary % BLOCK:
        log_probs = functional.pad(log_probs, (0, BLOCK - vocabulary % BLOCK), value=-torch.inf)
    blocks = log_probs.view(rows, -1, BLOCK)
    best = blocks.amax(dim=-1)  # [rows, blocks]
    block_hash = _hash(keys[:, None], torch.arange(best.shape[1], device=keys.device)[None])
    bound = best.double() - _block_minimum(block_hash).log()
    bound = torch.where(greedy[:, None], best.double(), bound)

    first = bound.argmax(dim=1)
    row = torch.arange(rows, device=keys.device)
    reached = _scores(blocks, keys, block_hash, greedy, row, first).amax(dim=1)
    row, block = (bound >= reached[:, None]).nonzero(as_tuple=True)
    value, inside = _scores(blocks, keys, block_hash, greedy, row, block).max(dim=1)

    top = torch.full((rows,), -torch.inf, dtype=torch.float64, device=keys.device)
    top.scatter_reduce_(0, row, value, "amax")
    winner = torch.full((rows,), vocabulary - 1, dtype=torch.int64, device=keys.device)  # stays where logits are NaN
    token = block * BLOCK + inside
    is_top = value == top[row]
    return winner.scatter_reduce_(0, row[is_top], token[is_top], "amin")  # equal scores: the lower id


def _scores(
    blocks: torch.Tensor,
    keys: torch.Tensor,
    block_hash: torch.Tensor,
    greedy: torch.Tensor,
    row: torch.Tensor,
    block: torch.Tensor,
) -> torch.Tensor:
    """float64 [picked, BLOCK]: perturbed logits of the picked (row, block) pairs."""
    tokens = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    noise = _noise(keys[row], block_hash[row, block], tokens)
    return blocks[row, block].double() + noise.masked_fill_(greedy[row][:, None], 0.0)


def _noise(keys: torch.Tensor, block_hash: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float64 [picked, BLOCK]: Gumbel noise -log E. keys, block_hash: int64 [picked]; tokens: int64 [picked, BLOCK]."""
    excess = _exponential(_hash((keys ^ _signed(_TOKEN_STREAM))[:, None], tokens))
    excess.scatter_(1, (block_hash & (BLOCK - 1))[:, None], 0.0)  # low bits say which token holds the minimum
    return -(excess + _block_minimum(block_hash)[:, None]).log_()


def _block_minimum(block_hash: torch.Tensor) -> torch.Tensor:
    """float64: the least E of a block, exponential with rate BLOCK."""
    return _exponential(block_hash) / BLOCK


def _exponential(hashed: torch.Tensor) -> torch.Tensor:
    """float64: -log of a uniform variable made of the upper 53 bits."""
    uniform = ((hashed >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_()


def _keys(draws: Sequence[Draw]) -> torch.Tensor:
    """int64 [rows]: one hash of (seed, trajectory, position)."""
    return torch.tensor([_signed(_mix_int(_mix_int(_mix_int(d.sampling.seed) + d.trajectory_id) + d.position)) for d in draws])


def _hash(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """splitmix64 (Steele, Lea and Flood 2014) number `counters` of the streams that start at `keys`; int64 that wraps."""
    z = keys + (counters + 1) * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 with its sign


def _mix_int(value: int) -> int:
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _truncate(log_probs: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """log_probs with -inf where top-k, then top-p, then min-p leave a token out. [rows, vocabulary]"""
    truncated = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1 or s.min_p > 0]
    if not truncated:
        return log_probs
    log_probs = log_probs.clone()
    for i in truncated:
        log_probs[i] = _truncate_row(log_probs[i], samplings[i])
    return log_probs


def _truncate_row(log_probs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    ordered, token_ids = log_probs.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        shares = torch.where(keep, ordered, -torch.inf).softmax(dim=0)
        keep &= shares.cumsum(dim=0) - shares < sampling.top_p  # the token that crosses the line stays
    if sampling.min_p > 0:
        keep &= ordered >= ordered[0] + float(np.log(sampling.min_p))
    kept = torch.full_like(log_probs, -torch.inf)
    return kept.scatter_(0, token_ids[keep], ordered[keep])
