"""Many samples of the official SDK, as a part of `official_programs.py`."""

import pickle
from typing import Any

import tinker
from tinker import types
from tinker.resources.futures import AsyncFuturesResource

PROMPT = types.ModelInput.from_ints([256, *b"hello"])


def counted(name: str, counts: dict[str, int]) -> None:
    """Count the calls of a method of the SDK's own HTTP client."""
    original = getattr(AsyncFuturesResource, name)

    async def call(self: Any, *arguments: Any, **named: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return await original(self, *arguments, **named)

    setattr(AsyncFuturesResource, name, call)


def drawn(sampler: tinker.SamplingClient, count: int) -> list[list[int]]:
    """Samples that are all asked for before the first is waited for."""
    futures = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=4, stop=[])) for _ in range(count)]
    return [future.result().sequences[0].tokens for future in futures]


def main(address: str) -> dict[str, Any]:
    counts: dict[str, int] = {}
    seen: dict[str, Any] = {}
    service = tinker.ServiceClient(base_url=address, api_key="tml-local")
    sampler = service.create_sampling_client(base_model="tiny").result()
    seen["flag"] = service.holder.get_client_config().sample_use_retrieve_futures
    counted("retrieve_multi", counts)
    tokens = drawn(sampler, 200)
    seen["sequences"], seen["tokens"] = len(tokens), sum(map(len, tokens))
    seen["different"] = len({tuple(row) for row in tokens}) > 150
    seen["polls"] = counts["retrieve_multi"]
    clones = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    seen["clones"] = [len(drawn(clone, 20)) for clone in clones]
    refused = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=4, stop=[""])) for _ in range(3)]
    categories = []
    for future in refused:
        try:
            future.result()
        except tinker.RequestFailedError as error:
            categories.append(str(error.category))
    seen["failed"] = [categories[0], len(categories)]
    seen["again"] = len(drawn(sampler, 50))
    service.close("success")
    return seen
