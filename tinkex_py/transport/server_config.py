"""The settings that a service returns for its clients (`client/config`), parsed leniently."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings of a service that this client follows (protocol: "Client config flags").

    Attributes:
        pjwt_auth_enabled: exchange the key for a token before the first request.
        credential_default_source: "credential_cmd" requires the key that `TINKER_CREDENTIAL_CMD` prints.
        fwdbwd_max_chunk_len: maximum datums of a chunk.
        fwdbwd_max_chunk_bytes_count: maximum bytes of a chunk, before compression.
        parallel_fwdbwd_chunks: send the chunks of one call concurrently.
        fwdbwd_dispatch_bytes_semaphore_size: maximum bytes of chunks in submission.
        proto_compress_fwdbwd: compress passes with zstd.
        proto_write_fwdbwd: whether the service accepts passes as protobuf; None if it does not say.
        sample_dispatch_bytes_semaphore_size: maximum estimated bytes of prompts in submission.
        sample_max_concurrent_requests: maximum samples in flight of one sampling client.
        sample_use_retrieve_futures: one poll can wait for many samples.
        sample_no_retries: do not request a sample again if its result was lost.
        billing_exception_max_pause_duration_sec: seconds that responses 402 may pause the client, at most the default.
        custom_loss_server_side: the service accepts uploaded losses.
        gradient_products: the service computes dot products of gradients in the space of the weights.
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
    gradient_products: bool = False

    @classmethod
    def read(cls, response: Mapping[str, Any]) -> Self:
        """Parses a response; unknown and invalid settings are ignored."""
        given: dict[str, Any] = {}
        for field in fields(cls):
            value = _valid(response.get(field.name), field.default)
            if value is not None:
                given[field.name] = value
        config = cls(**given)
        pause = min(config.billing_exception_max_pause_duration_sec, cls.billing_exception_max_pause_duration_sec)
        return replace(config, billing_exception_max_pause_duration_sec=pause)

    @classmethod
    def of_an_old_service(cls) -> Self:
        """Returns the settings for a service without `client/config`: the defaults, but chunks in sequence."""
        return cls(parallel_fwdbwd_chunks=False)


def _valid(value: object, default: object) -> object:
    """Returns the value if it has the type of the default; else None."""
    if isinstance(default, str):
        return value if isinstance(value, str) and value else None
    if isinstance(default, bool) or default is None:
        return value if isinstance(value, bool) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
