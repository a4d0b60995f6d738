"""A service whose disk is full for a while: prints, as JSON, what each call returned.

The disk is full because no file may become longer than it is (RLIMIT_FSIZE), which Python reports as an OSError.
"""

import asyncio
import json
import resource
import sys
from pathlib import Path
from typing import Any

import httpx

from tinkex_py.local import LocalOptions, LocalService


class Calls:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.session_id = ""
        self.models = 0

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._http.post(f"/api/v1/{path}", json=body)
        return {"status": response.status_code, **response.json()}

    async def done(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        submitted = await self.post(path, body)
        while "request_id" in submitted:
            result = await self.post("retrieve_future", {"request_id": submitted["request_id"]})
            if result["status"] != 408:
                return result
        return submitted

    async def session(self) -> dict[str, Any]:
        made = await self.post("create_session", {})
        self.session_id = made.get("session_id", self.session_id)
        return made

    async def model(self) -> dict[str, Any]:
        self.models += 1
        lora = {"rank": 64, "seed": 1}
        body = {"session_id": self.session_id, "model_seq_id": self.models, "base_model": "tiny", "lora_config": lora}
        return await self.done("create_model", body)


def allow_files_of(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def names_in(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.rglob(pattern))


async def main(folder: Path) -> dict[str, Any]:
    service = LocalService(LocalOptions(state_dir=folder, max_models=4))
    await service.start()
    found: dict[str, Any] = {}
    transport = httpx.ASGITransport(app=service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://local") as http:
        calls = Calls(http)
        await calls.session()
        model_id = (await calls.model())["model_id"]
        step = {"model_id": model_id, "adam_params": {}}
        found["save before"] = await calls.done("save_weights", {"model_id": model_id, "seq_id": 1, "path": "kept"})
        allow_files_of(1024)
        found["save"] = await calls.done("save_weights", {"model_id": model_id, "seq_id": 2, "path": "kept"})
        found["sampler"] = await calls.done(
            "save_weights_for_sampler", {"model_id": model_id, "seq_id": 3, "sampling_session_seq_id": 1}
        )
        found["session"] = await calls.session()
        found["models"] = [await calls.model() for _ in range(5)]
        found["step"] = await calls.done("optim_step", {**step, "seq_id": 4})
        allow_files_of(-1)
        found["drafts"] = names_in(folder, ".*")
        found["sessions"] = len(service.core.sessions)  # type: ignore[union-attr]
        found["session after"] = await calls.session()
        found["models after"] = [await calls.model() for _ in range(3)]
        found["save after"] = await calls.done("save_weights", {"model_id": model_id, "seq_id": 5, "path": "kept"})
        found["files"] = names_in(folder, "*.safetensors")
    await service.stop()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))  # noqa: T201
