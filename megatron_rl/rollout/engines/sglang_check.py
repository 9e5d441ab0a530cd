"""Whether a publish reached every tensor of a server: checksums around one publish into weights made random before.

    begin:  checksums of what the server holds; then its weights are overwritten with noise
    finish: every checksum must have changed again; where the model folder's own weights were published to a server that had
            just read that folder, every checksum must be the first one

The server names fused tensors (`qkv_proj`) as it keeps them, so nothing here knows a model family. That the values are right
for later versions too is what `weights.mismatch_bound` watches.
"""

from __future__ import annotations

from typing import Any

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.sglang_http import SGLangClient

_FRESH = "default"  # the weight version of a server that has loaded its folder and nothing since


class WeightCheck:
    def __init__(self, client: SGLangClient) -> None:
        self._client = client
        self._before: dict[str, str] = {}
        self._noise: dict[str, str] = {}
        self._is_fresh = False

    async def begin(self) -> None:
        info = await self._client.get("/model_info")
        server = await self._client.get("/server_info")
        self._is_fresh = info.get("weight_version") == _FRESH and server.get("load_format") in (None, "auto", "safetensors")
        self._before = await self._checksums()
        await self._client.post("/weights_checker", {"action": "reset_tensors"})
        self._noise = await self._checksums()

    async def finish(self, *, is_model_folder: bool) -> None:
        """Raises EngineError naming tensors that the publish left out, or brought with other values than the folder's."""
        after = await self._checksums()
        missed = [name for name, checksum in after.items() if checksum == self._noise.get(name) != self._before.get(name)]
        if missed:
            raise EngineError(f"{self._where}: the publish did not reach {_some(missed)}; {self._remedy}")
        if self._is_fresh and is_model_folder:
            wrong = [name for name, checksum in after.items() if checksum != self._before.get(name)]
            if wrong:
                raise EngineError(
                    f"{self._where}: after publishing the model folder's weights {_some(wrong)} differ from what the server "
                    f"had read from its own folder; {self._remedy}"
                )

    async def _checksums(self) -> dict[str, str]:
        """By rank and name."""
        answer = await self._client.post("/weights_checker", {"action": "checksum"})
        ranks: list[dict[str, Any]] = answer["ranks"]
        return {f"{name} (rank {i})": checksum for i, rank in enumerate(ranks) for name, checksum in rank["checksums"].items()}

    @property
    def _where(self) -> str:
        return f"engine {self._client.name} at {self._client.url}"

    @property
    def _remedy(self) -> str:
        return "does it serve model.folder in model.dtype? rollout.sglang.verify_weights=false skips this check"


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
