"""How a service wants to be used: its response to `client/config`, read leniently."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings of a service that this client follows (protocol: "Client config flags").

    Attributes:
        pjwt_auth_enabled: exchange the key for a token before the first request.
        credential_default_source: "credential_cmd" asks for the key that `TINKER_CREDENTIAL_CMD` prints.
        fwdbwd_max_chunk_len: most datums of a chunk.
        fwdbwd_max_chunk_bytes_count: most bytes of a chunk, before compression.
        parallel_fwdbwd_chunks: post the chunks of one call at the same time.
        fwdbwd_dispatch_bytes_semaphore_size: most bytes of chunks that are being posted at once.
        proto_compress_fwdbwd: compress passes with zstd.
        proto_write_fwdbwd: whether passes are read as protobuf; None if the service does not say.
        sample_dispatch_bytes_semaphore_size: most estimated bytes of prompts that are being posted at once.
        sample_max_concurrent_requests: most samples in flight of one sampling client.
        sample_use_retrieve_futures: many samples can be waited for with one poll.
        sample_no_retries: a sample whose result was lost is not asked for again.
        billing_exception_max_pause_duration_sec: seconds that responses 402 may pause the client.
        custom_loss_server_side: takes uploaded losses.
    """

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    parallel_fwdbwd_chunks: bool = True
    fwdbwd_dispatch_bytes_semaphore_size: int = 50_000_000
    proto_compress_fwdbwd: bool = False
    proto_write_fwdbwd: bool | None = None
    sample_dispatch_bytes_semaphore_size: int = 10_485_760
    sample_max_concurrent_requests: int = 2000
    sample_use_retrieve_futures: bool = False
    sample_no_retries: bool = False
    billing_exception_max_pause_duration_sec: int = 3600
    custom_loss_server_side: bool = False

    @classmethod
    def read(cls, response: Mapping[str, Any]) -> Self:
        """The settings of a response. What is unknown or makes no sense is ignored."""
        given: dict[str, Any] = {}
        for field in fields(cls):
            value = _understood(response.get(field.name), field.default)
            if value is not None:
                given[field.name] = value
        return cls(**given)

    @classmethod
    def of_an_old_service(cls) -> Self:
        """For a service from before `client/config`: the defaults, and one request after the other."""
        return cls(parallel_fwdbwd_chunks=False)


def _understood(value: object, default: object) -> object:
    if isinstance(default, str):
        return value if isinstance(value, str) and value else None
    if isinstance(default, bool) or default is None:
        return value if isinstance(value, bool) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
