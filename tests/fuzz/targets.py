"""The fuzz targets: everything that reads untrusted bytes. A target accepts any bytes; an exception is a defect."""

import asyncio
import contextlib
import gzip
import io
import json
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from tinkex_py.client.archive import extract
from tinkex_py.errors import ConfigError, InvalidData, InvalidResponse, PipelineError, TinkexError, UnsupportedFeature
from tinkex_py.local import schemas, wire_format
from tinkex_py.local.bodies import decompressed, parse_json
from tinkex_py.local.core import Refused
from tinkex_py.losses.recording import JSON_NAME, TENSORS_NAME, read_record
from tinkex_py.runs import read_run, read_steps
from tinkex_py.runs.folder import RUN_FILE, STEPS_FILE
from tinkex_py.transport import wire
from tinkex_py.transport.bodies import BodyTooLarge, DecodingError, body_of
from tinkex_py.transport.decoding import (
    Result,
    decode_forward_backward,
    decode_sample,
    read_forward_backward,
    read_sample,
)
from tinkex_py.transport.failures import status_error
from tinkex_py.transport.messages import Response

Target = Callable[[bytes], None]
LIMIT = 1 << 20


def room() -> wire_format.DenseRoom:
    return wire_format.DenseRoom(columns=300, bytes=LIMIT)


def pass_request(body: bytes) -> None:
    """Reads a forward or backward pass in protobuf, as the service does."""
    with contextlib.suppress(DecodeError, InvalidData, UnsupportedFeature):
        wire_format.datums_from_protobuf(wire.ForwardBackwardRequest.FromString(body).data, room())


def json_request(body: bytes) -> None:
    """Reads JSON as the service does: its structure, then as every kind of request."""
    with contextlib.suppress(Refused):
        value = parse_json(body)
        for model in (schemas.PassInput, schemas.SampleBody, schemas.SearchBody, schemas.SaveWeightsBody):
            with contextlib.suppress(ValidationError, InvalidData, UnsupportedFeature):
                read: Any = model.model_validate(value)
                if isinstance(read, schemas.PassInput):
                    wire_format.datums_from_json(read.data, room())
                if isinstance(read, schemas.SampleBody):
                    wire_format.input_from_json("prompt", read.prompt)
                    wire_format.ids_from_json("targets", read.target_prompt_logprobs, room())


def zstd_body(body: bytes) -> None:
    """Decompresses a body, as the service does."""
    with contextlib.suppress(Refused):
        assert len(decompressed(body, LIMIT)) <= LIMIT


def pass_result(body: bytes) -> None:
    """Reads the result of a pass in protobuf, as the client does."""
    with contextlib.suppress(InvalidResponse):
        for row in decode_forward_backward(body).loss_fn_outputs:
            for tensor in row.values():
                tensor.to_numpy()


def sample_result(body: bytes) -> None:
    """Reads the result of a sample in protobuf, as the client does."""
    with contextlib.suppress(InvalidResponse):
        decode_sample(body)


def compressed_response(body: bytes) -> None:
    """Decompresses a response, as the client does."""

    async def decompress() -> None:
        for encoding in ("gzip", "deflate", "zstd", "zstd, gzip"):
            with contextlib.suppress(BodyTooLarge, DecodingError):
                assert len(await body_of(deque([body]), encoding, LIMIT)) <= LIMIT

    asyncio.run(decompress())


def json_response(body: bytes) -> None:
    """Reads a successful or failed response in JSON, as the client does."""
    for status in (200, 400, 429):
        response = Response(status, {"content-type": "application/json"}, body)
        with contextlib.suppress(TinkexError):
            if not response.is_success:
                raise status_error(response)
            value = response.json()
            if isinstance(value, dict):
                for read in (read_forward_backward, read_sample):
                    with contextlib.suppress(InvalidResponse):
                        read(Result(b"", value))


def checkpoint_archive(body: bytes) -> None:
    """Extracts a downloaded checkpoint, as the client does."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "archive").write_bytes(body)
        with contextlib.suppress(InvalidResponse):
            extract(place / "archive", place / "files", lambda: None)
        assert {entry.name for entry in place.iterdir()} <= {"archive", "files"}


def checkpoint_file(body: bytes) -> None:
    """Reads the tensors of a checkpoint, as the service does."""
    from tinkex_py.local.engine import read_tensors

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors"
        file.write_bytes(body)
        with contextlib.suppress(InvalidData):
            read_tensors(file, "a checkpoint")


def files_of_a_run(body: bytes) -> None:
    """Reads the files of a run and of a recorded step."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in (RUN_FILE, STEPS_FILE, JSON_NAME, TENSORS_NAME):
            (place / name).write_bytes(body)
        with contextlib.suppress(ConfigError):
            read_run(place)
        with contextlib.suppress(ConfigError):
            read_steps(place)
        with contextlib.suppress(PipelineError):
            read_record(place)


TARGETS: Mapping[str, Target] = {
    target.__name__: target
    for target in (
        pass_request,
        json_request,
        zstd_body,
        pass_result,
        sample_result,
        compressed_response,
        json_response,
        checkpoint_archive,
        checkpoint_file,
        files_of_a_run,
    )
}


def seeds() -> dict[str, list[bytes]]:
    """Returns valid input for every target."""
    import torch
    import zstandard
    from safetensors.torch import save

    numbers = np.array([1, 2, 3], "<i8").tobytes()
    tensor = wire.Tensor(dense=numbers, dtype=wire.DTYPE_INT64, shape=[3])
    sparse = wire.SparseCsr(values=numbers[:8], crow_indices=numbers[:0] + bytes(16), col_indices=b"")
    chunk = wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=np.array([1, 2, 3], "<i4").tobytes()))
    inputs = {
        "target_tokens": tensor,
        "weights": wire.Tensor(sparse_csr=sparse, dtype=wire.DTYPE_FLOAT32, shape=[1, 2]),
    }
    request = wire.ForwardBackwardRequest(
        model_id="m", seq_id=1, data=[wire.Datum(model_input=[chunk], loss_fn_inputs=inputs)]
    )
    packed = wire.BatchedTensor(
        data=bytes(12), offsets=np.array([0, 12], "<i8").tobytes(), dtype=wire.DTYPE_FLOAT32, trailing_shape=[3]
    )
    output = wire.ForwardBackwardOutput(
        loss_fn_outputs=[wire.ArrayRecord(num_datums=1, fields={"logprobs": packed})], metrics={"loss:sum": 1.0}
    )
    top = wire.TopkLogprobs(token_ids=bytes(8), logprobs=bytes(8), k=2, length=1)
    sample = wire.SampleResponse(
        sequences=[wire.SampledSequence(tokens=bytes(4), logprobs=bytes(4), topk_sampled_logprobs=top)],
        prompt_logprobs=bytes(8),
        target_prompt_logprobs=tensor,
    )
    pass_json = {
        "data": [
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                "loss_fn_inputs": {"target_tokens": {"data": [1, 2], "dtype": "int64", "shape": [2]}},
            }
        ],
        "loss_fn": "cross_entropy",
        "prompt": {"chunks": [{"tokens": [1]}]},
        "target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]},
    }
    response_json = {
        "loss_fn_outputs": [{"logprobs": {"data": [0.5], "dtype": "float32", "shape": [1]}}],
        "sequences": [{"tokens": [1], "logprobs": [-0.5], "stop_reason": "stop"}],
        "metrics": {"loss:sum": 1.0},
    }
    run_json = {"name": "x", "started_at": 1.0, "updated_at": 2.0}
    tensors = save({"logprobs": torch.zeros(2)})
    return {
        "pass_request": [request.SerializeToString()],
        "json_request": [json.dumps(pass_json).encode(), b"[" * 70],
        "zstd_body": [zstandard.ZstdCompressor().compress(bytes(5000)), zstandard.ZstdCompressor().compress(b"{}")],
        "pass_result": [output.SerializeToString()],
        "sample_result": [sample.SerializeToString()],
        "compressed_response": [gzip.compress(b"{}"), zstandard.ZstdCompressor().compress(bytes(5000))],
        "json_response": [json.dumps(response_json).encode(), b'{"detail": [{"loc": ["a"], "msg": "b"}], "code": "c"}'],
        "checkpoint_archive": [_tar("w"), _tar("w:gz")],
        "checkpoint_file": [tensors],
        "files_of_a_run": [json.dumps(run_json).encode() + b"\n", tensors],
    }


def _tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        entry = tarfile.TarInfo("deep/file")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"data"))
    return buffer.getvalue()
