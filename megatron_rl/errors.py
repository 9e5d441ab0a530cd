"""The one exception family of megatron_rl.

Every message names the setting or file, what was found, the rule and the remedy. What is raised as
`MegatronRLError` is the user's or the outside world's doing; our own bugs fail as plain asserts.
"""

from __future__ import annotations

from collections.abc import Sequence


class MegatronRLError(Exception):
    """Base of all errors a user can cause or repair."""


class ConfigError(MegatronRLError, ValueError):
    """A setting is unknown, malformed, or contradicts another."""


class DataError(MegatronRLError, ValueError):
    """A prompt file, model folder or tokenizer cannot be used as it is."""


class EngineError(MegatronRLError, RuntimeError):
    """An engine failed, or missed a deadline."""


class EngineGoneError(EngineError):
    """An engine's process died, fell silent or cannot be reached; another one in its place could go on."""


class EngineLostError(EngineError):
    """An engine's process is gone, and only all ranks together can bring it back: its weights have to be exported again."""


class RewardError(MegatronRLError, RuntimeError):
    """A reward function cannot be loaded or keeps failing."""


class BufferFileError(MegatronRLError, RuntimeError):
    """The replay buffer's file is damaged, of another run, of a newer schema, or breaks conservation."""


class KVFileError(MegatronRLError, RuntimeError):
    """A file of spilled KV is damaged, cut short or another's; its tokens are computed again."""


class TrainingError(MegatronRLError, RuntimeError):
    """A loss or gradient is not finite; no step was taken."""

    def __init__(self, message: str, *, trajectory_ids: Sequence[int]) -> None:
        super().__init__(message)
        self.trajectory_ids = tuple(trajectory_ids)  # of the micro-batches at fault


class CheckpointError(MegatronRLError, RuntimeError):
    """A checkpoint cannot be written or read."""


class KernelError(MegatronRLError, ValueError):
    """The compiled kernels cannot be loaded, or were given an argument they cannot work on."""
