"""The table of readers: everything that reads bytes of others, with input that would cost a careless reader most.

To add a row: a name, a function that makes input of about n parts, and one that reads it. A reader suppresses the typed
errors of its edge; any other exception is a defect.
"""

import contextlib
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tests.fuzz.targets import json_response, pass_result, sample_result
from tinkex_py.client.archive import extract
from tinkex_py.errors import ConfigError, InvalidData, InvalidResponse, PipelineError
from tinkex_py.local import bodies, schemas, wire_format
from tinkex_py.local.core import Refused
from tinkex_py.losses.recording import JSON_NAME, TENSORS_NAME, read_record
from tinkex_py.runs import read_run, read_steps
from tinkex_py.runs.folder import RUN_FILE, STEPS_FILE
from tinkex_py.runs.yaml_file import read_yaml
from tinkex_py.transport import wire

MIB = 1024**2


@dataclass(frozen=True)
class Reader:
    """One row.

    Args:
        name: whose bytes, and what they are.
        make: returns input of about n parts.
        read: reads it.
        least: smallest n; above it the recursion limit bounds what the parser of YAML does, to less than a second.
    """

    name: str
    make: Callable[[int], bytes]
    read: Callable[[bytes], object]
    least: int = 256


# The service: JSON, zstd, protobuf, uploaded losses, checkpoint files


def service_json(body: bytes) -> None:
    with contextlib.suppress(Refused):
        bodies.parse_json(body)


def service_fields(model: type[Any]) -> Callable[[bytes], None]:
    def read(body: bytes) -> None:
        with contextlib.suppress(Refused, ValidationError):
            model.model_validate(bodies.parse_json(body))

    return read


def room() -> wire_format.DenseRoom:
    return wire_format.DenseRoom(columns=50_000, bytes=64 * MIB)


def service_json_pass(body: bytes) -> None:
    with contextlib.suppress(Refused, ValidationError, InvalidData):
        value = schemas.PassInput.model_validate(bodies.parse_json(body))
        wire_format.datums_from_json(value.data, room())


def service_pass(body: bytes) -> None:
    with contextlib.suppress(Refused, InvalidData):
        wire_format.datums_from_protobuf(bodies.parse_pass(body).data, room())


def service_zstd(body: bytes) -> None:
    with contextlib.suppress(Refused):
        bodies.decompressed(body, 256 * MIB)


def service_loss(body: bytes) -> None:
    from tinkex_py.local.custom_losses import read_graph

    with contextlib.suppress(Refused, InvalidData):
        read_graph(bodies.parse_json(body))


def checkpoint_file(body: bytes) -> None:
    from tinkex_py.local.engine import read_tensors

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(InvalidData):
        file = Path(folder) / "tensors"
        file.write_bytes(body)
        read_tensors(file, "a checkpoint")


def zstd_zeros(n: int) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(bytes(n * 1024))


def json_pass(n: int) -> bytes:
    target = {"data": [1], "dtype": "int64", "shape": [1]}
    datum = {"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {"target_tokens": target}}
    return json.dumps({"data": [datum] * n, "loss_fn": "cross_entropy"}).encode()


def pass_of_datums(n: int) -> bytes:
    numbers = wire.Tensor(dense=bytes(8), dtype=wire.DTYPE_INT64, shape=[1])
    chunk = wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=bytes(4)))
    datum = wire.Datum(model_input=[chunk], loss_fn_inputs={"target_tokens": numbers})
    return wire.ForwardBackwardRequest(data=[datum] * n).SerializeToString()


def pass_of_sparse_rows(n: int) -> bytes:
    crows = np.zeros(n + 1, "<i8")
    crows[1:] = 1
    sparse = wire.SparseCsr(values=bytes(8), crow_indices=crows.tobytes(), col_indices=bytes(8))
    tensor = wire.Tensor(sparse_csr=sparse, dtype=wire.DTYPE_INT64, shape=[n, 50])
    return wire.ForwardBackwardRequest(data=[wire.Datum(loss_fn_inputs={"target_tokens": tensor})]).SerializeToString()


def loss_of_nodes(n: int) -> bytes:
    nodes: list[dict[str, Any]] = [{"op": "placeholder", "name": "logprobs", "target": "logprobs"}]
    for index in range(n):
        before = nodes[-1]["name"]
        nodes.append({"op": "call_method", "name": f"x{index}", "target": "exp", "args": [{"ref": before}]})
    output = {"tuple": [{"ref": nodes[-1]["name"]}, {"dict": {}}]}
    nodes.append({"op": "output", "name": "output", "target": "output", "args": [output]})
    inputs = [{"name": "logprobs", "rank": 1}]
    return json.dumps({"name": "x", "inputs": inputs, "graph": {"format": 1, "nodes": nodes}}).encode()


def file_of_tensors(n: int) -> bytes:
    names = {
        f"t{index}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]} for index in range(n)
    }
    header = json.dumps(names).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * n)


# The client: results, responses, archives


def archive(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(InvalidResponse):
        place = Path(folder)
        (place / "archive").write_bytes(body)
        extract(place / "archive", place / "files", lambda: None)


def result_of_datums(n: int) -> bytes:
    offsets = np.arange(0, 4 * n + 4, 4, dtype="<i8").tobytes()
    packed = wire.BatchedTensor(data=bytes(4 * n), offsets=offsets, dtype=wire.DTYPE_FLOAT32, trailing_shape=[])
    record = wire.ArrayRecord(num_datums=n, fields={"logprobs": packed})
    return wire.ForwardBackwardOutput(loss_fn_outputs=[record]).SerializeToString()


def result_of_records(n: int) -> bytes:
    packed = wire.BatchedTensor(data=bytes(4), offsets=bytes(16), dtype=wire.DTYPE_FLOAT32, trailing_shape=[])
    record = wire.ArrayRecord(num_datums=1, fields={"logprobs": packed})
    return wire.ForwardBackwardOutput(loss_fn_outputs=[record] * n).SerializeToString()


def result_of_samples(n: int) -> bytes:
    sequence = wire.SampledSequence(tokens=bytes(4), logprobs=bytes(4))
    return wire.SampleResponse(sequences=[sequence] * n).SerializeToString()


def result_of_topk(n: int) -> bytes:
    top = wire.TopkLogprobs(token_ids=bytes(4 * n), logprobs=bytes(4 * n), k=1, length=n)
    sequence = wire.SampledSequence(tokens=bytes(4 * n), logprobs=bytes(4 * n), topk_sampled_logprobs=top)
    return wire.SampleResponse(sequences=[sequence]).SerializeToString()


def json_result(n: int) -> bytes:
    outputs = [{"logprobs": {"data": [0.5], "dtype": "float32", "shape": [1]}}] * n
    return json.dumps({"loss_fn_outputs": outputs, "metrics": {"loss:sum": 1.0}}).encode()


def archive_of_files(n: int, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for index in range(n):
            tar.addfile(tarfile.TarInfo(f"file{index}"), io.BytesIO())
    return buffer.getvalue()


def archive_of_one_file(n: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("file")
        entry.size = n * 1024
        tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return buffer.getvalue()


def header(name: str, kind: bytes, content: bytes) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, len(content)
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def archive_of_digits(n: int) -> bytes:
    """A pax header whose length does not end."""
    return header("p", b"x", b"1" * n) + header("a", b"0", b"abc") + bytes(1024)


def archive_of_long_names(n: int) -> bytes:
    """Every member only names the next one."""
    return header("././@LongLink", b"L", b"abc\0") * n + header("a", b"0", b"abc") + bytes(1024)


def archive_of_pax_records(n: int) -> bytes:
    return header("p", b"x", b"8 a=1234\n"[:8] * n) + header("a", b"0", b"abc") + bytes(1024)


# Files: runs, recorded steps, settings


def in_folder(*names: str) -> Callable[[Callable[[Path], object]], Callable[[bytes], None]]:
    def reader(read: Callable[[Path], object]) -> Callable[[bytes], None]:
        def read_bytes(body: bytes) -> None:
            with tempfile.TemporaryDirectory() as folder:
                for name in names:
                    (Path(folder) / name).write_bytes(body)
                with contextlib.suppress(ConfigError, PipelineError):
                    read(Path(folder))

        return read_bytes

    return reader


def steps(n: int) -> bytes:
    from tests.runs.support import step_record

    return b"".join(step_record(step).model_dump_json().encode() + b"\n" for step in range(n))


SERVICE = [
    Reader(
        "service, JSON: escaped quotes in an open text", lambda n: b"[" + b"[]," * 70 + b'"' + b'\\"x' * n, service_json
    ),
    Reader("service, JSON: backslashes", lambda n: b"[" + b"[]," * 70 + b'"' + b"\\" * n, service_json),
    Reader("service, JSON: open lists", lambda n: b"[" * n, service_json),
    Reader("service, JSON: lists", lambda n: b"[" + b"[]," * n + b"0]", service_json),
    Reader("service, JSON: texts", lambda n: b"[" + b'"a",' * n + b'""]', service_json),
    Reader("service, JSON: numbers", lambda n: b"[" + b"1.5e3," * n + b"0]", service_json),
    Reader("service, JSON: one number", lambda n: b"[" + b"9" * n + b"]", service_json),
    Reader("service, JSON: long numbers", lambda n: b"[" + b",".join([b"9" * 4000] * n) + b"]", service_json),
    Reader("service, JSON: equal keys", lambda n: b"{" + b",".join([b'"a":1'] * n) + b"}", service_json),
    Reader(
        "service, JSON: wrong items of a field",
        lambda n: b'{"tags":[' + b"1," * n + b"1]}",
        service_fields(schemas.SessionBody),
    ),
    Reader(
        "service, JSON: metadata",
        lambda n: b'{"user_metadata":{"a":[' + b"1.5," * n + b"1]}}",
        service_fields(schemas.SessionBody),
    ),
    Reader("service, JSON: wrong datums", lambda n: b'{"loss_fn":"","data":[' + b"1," * n + b"1]}", service_json_pass),
    Reader("service, JSON: datums", json_pass, service_json_pass),
    Reader("service, zstd: zeros", zstd_zeros, service_zstd),
    Reader("service, protobuf: empty datums", lambda n: b"\x1a\x00" * n, service_pass),
    Reader("service, protobuf: datums", pass_of_datums, service_pass),
    Reader("service, protobuf: rows of a sparse tensor", pass_of_sparse_rows, service_pass),
    Reader("service, uploaded loss: nodes", loss_of_nodes, service_loss),
    Reader("service, checkpoint file: tensors", file_of_tensors, checkpoint_file),
]
CLIENT = [
    Reader("client, protobuf: datums of one record", result_of_datums, pass_result),
    Reader("client, protobuf: records", result_of_records, pass_result),
    Reader("client, protobuf: sequences", result_of_samples, sample_result),
    Reader("client, protobuf: a top-k table", result_of_topk, sample_result),
    Reader("client, JSON: a pass", json_result, json_response),
    Reader("client, JSON: lone surrogates", lambda n: b'{"a":["' + b"\\ud83d" * n + b'"]}', json_response),
    Reader("client, JSON: escaped quotes in an open text", lambda n: b'{"detail":"' + b'\\"x' * n, json_response),
    Reader("client, JSON: open lists", lambda n: b"[" * n, json_response),
    Reader("client, JSON: a long detail", lambda n: b'{"detail":"' + b"a b" * n + b'"}', json_response),
    Reader("client, archive: files", archive_of_files, archive),
    Reader("client, archive: one file", archive_of_one_file, archive),
    Reader("client, archive: one file, gzip", lambda n: gzip.compress(archive_of_one_file(n), 1), archive),
    Reader("client, archive: long names", archive_of_long_names, archive),
    Reader("client, archive: digits of a pax header", archive_of_digits, archive),
    Reader("client, archive: records of a pax header", archive_of_pax_records, archive),
]
FILES = [
    Reader("run folder: steps", steps, in_folder(STEPS_FILE)(read_steps)),
    Reader("run folder: damaged steps", lambda n: b'{"step":1}\n' * n, in_folder(STEPS_FILE)(read_steps)),
    Reader("run folder: open lists", lambda n: b"[" * n, in_folder(RUN_FILE)(read_run)),
    Reader("run folder: a long name", lambda n: b'{"name":"' + b'\\"x' * n + b'"}', in_folder(RUN_FILE)(read_run)),
    Reader("recorded step: open lists", lambda n: b"[" * n, in_folder(JSON_NAME, TENSORS_NAME)(read_record)),
    Reader(
        "settings, YAML: lists",
        lambda n: b"a: [" + b"1, " * n + b"1]",
        in_folder("a.yaml")(lambda at: read_yaml(at / "a.yaml")),
    ),
    Reader(
        "settings, YAML: keys",
        lambda n: b"".join(b"k%d: 1\n" % i for i in range(n)),
        in_folder("a.yaml")(lambda at: read_yaml(at / "a.yaml")),
    ),
    Reader(
        "settings, YAML: digits",
        lambda n: b"a: " + b"1" * n + b"x",
        in_folder("a.yaml")(lambda at: read_yaml(at / "a.yaml")),
    ),
    Reader(
        "settings, YAML: open lists",
        lambda n: b"[" * n,
        in_folder("a.yaml")(lambda at: read_yaml(at / "a.yaml")),
        least=2048,
    ),
]
READERS = [*SERVICE, *CLIENT, *FILES]
