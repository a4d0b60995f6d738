"""What a service client finds out about its service, and its tokenizers."""

import pytest

from tests.support.scripted_server import ScriptedServer, answer
from tinkex_py import AsyncServiceClient, ConfigError, InvalidData, TinkexConfig, UnsupportedFeature


@pytest.mark.asyncio
@pytest.mark.parametrize("taken", [True, False])
async def test_the_embedded_service(taken):
    async with AsyncServiceClient.local(model="tiny", custom_losses=taken) as service:
        features = await service.get_features()
        assert (features.wire, features.uploaded_losses) == ("protobuf", taken)
        tokenizer = await service.get_tokenizer("tiny")
        assert tokenizer.decode(tokenizer.encode("Ahoy")) == "Ahoy"
        with pytest.raises(ConfigError, match="'other' is not served here"):
            await service.get_tokenizer("other")
        with pytest.raises(InvalidData, match="name must be a non-empty string"):
            await service.get_tokenizer("")


@pytest.mark.asyncio
async def test_the_embedded_services_tokenizer_needs_no_session():
    service = AsyncServiceClient.local(model="tiny")
    try:
        assert (await service.get_tokenizer("tiny")).encode("a") == [97]
    finally:
        await service.aclose()


@pytest.mark.asyncio
async def test_features_of_a_json_service():
    async with ScriptedServer() as server:
        server.script("/api/v1/client/config", answer(json={"proto_write_fwdbwd": False}))
        server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
        async with AsyncServiceClient(TinkexConfig(base_url=server.url, api_key="tml-key")) as service:
            assert (await service.get_features()).wire == "json"
            with pytest.raises(UnsupportedFeature, match="no tokenizer"):
                await service.get_tokenizer("./there/is/nothing")
