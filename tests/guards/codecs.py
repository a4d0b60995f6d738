"""What keeps all that reads bytes of others from breaking."""

from tests.guards.entry import Guard, guard

_API = "tests/fuzz/test_api.py"
_CODECS = "tests/fuzz/test_codecs.py"
_ORDER = "tests/fuzz/test_order.py::TestOrdering"
_TARGETS = "tests/fuzz/test_targets.py::test_a_short_run_of_the_fuzzer_finds_nothing"
_SECRECY = "tests/security/test_secrecy.py"
_ANY = "tests/transport/test_any_answer.py"

GUARDS: list[Guard] = [
    guard(
        "No request is the service's fault: moments beyond the calendar are refused",
        "local/requests.py",
        "_LONGEST_TTL = 36_525 * 86_400",
        "_LONGEST_TTL = 10**30",
        f"{_API}::test_no_request_is_the_services_fault",
        "tests/local/test_bad_bodies.py::test_a_time_to_live_beyond_the_calendar_is_refused",
    ),
    guard(
        "No protobuf is the service's fault",
        "local/routes_training.py",
        "    except DecodeError:\n",
        "    except KeyError:\n",
        f"{_API}::test_no_protobuf_is_the_services_fault",
    ),
    guard(
        "Any tensor in protobuf is read or a typed error of the service",
        "local/wire_format.py",
        "    if any(size < 0 for size in shape) or math.prod(shape) != len(data):\n",
        "    if data is None:\n",
        f"{_CODECS}::test_any_tensor_in_protobuf_is_read_or_a_typed_error_of_the_service",
    ),
    guard(
        "Any damaged protobuf datum is read or a typed error of the service",
        "local/wire_format.py",
        '        raise InvalidData(f"{where}: dtype {tensor.dtype} is not one of float32, int64, int32")\n',
        '        raise KeyError(f"{where}: dtype {tensor.dtype} is not one of float32, int64, int32")\n',
        f"{_CODECS}::test_any_protobuf_datum_is_read_or_a_typed_error_of_the_service",
    ),
    guard(
        "The OpenAPI document has every route",
        "local/openapi.py",
        '        for method in sorted((route.methods or set()) - {"HEAD"}):\n',
        '        for method in sorted((route.methods or set()) - {"HEAD", "PUT"}):\n',
        f"{_API}::test_the_document_has_every_route_and_no_other",
    ),
    guard(
        "The OpenAPI document says which fields a route needs",
        "local/openapi.py",
        '    "POST get_info": _Operation(requests.ModelBody),\n',
        '    "POST get_info": _Operation(requests.SearchBody),\n',
        f"{_API}::test_the_document_says_which_fields_a_route_needs",
    ),
    guard(
        "A request in protobuf arrives as it was sent",
        "transport/codec.py",
        '    dtype = wire.DTYPE_INT64 if tensor.dtype == "int64" else wire.DTYPE_FLOAT32\n    crow, col',
        "    dtype = wire.DTYPE_FLOAT32\n    crow, col",
        f"{_CODECS}::test_a_request_in_protobuf_arrives_as_it_was_sent",
    ),
    guard(
        "A request in JSON arrives as it was sent",
        "transport/codec.py",
        '            "shape": list(tensor.shape),\n            "sparse_crow_indices"',
        '            "shape": [],\n            "sparse_crow_indices"',
        f"{_CODECS}::test_a_request_in_json_arrives_as_it_was_sent",
    ),
    guard(
        "Any JSON datum is read or a typed error of the service",
        "local/wire_format.py",
        '    if array.size and array.dtype.kind not in ("iu" if dtype == "<i8" else "iuf"):\n',
        "    if array is None:\n",
        f"{_CODECS}::test_any_json_datum_is_read_or_a_typed_error_of_the_service",
    ),
    guard(
        "Sparse indices that do not fit are an error of the user",
        "local/wire_format.py",
        "    if not fits:\n",
        "    if fits is None:\n",
        f"{_CODECS}::test_any_sparse_tensor_is_read_or_a_typed_error_of_the_service",
    ),
    guard(
        "A pass arrives as the service computed it: a gap is no number",
        "local/wire_format.py",
        "return [value if math.isfinite(value) else None for value in array.reshape(-1).tolist()]",
        "return [value if math.isfinite(value) else 0.0 for value in array.reshape(-1).tolist()]",
        f"{_CODECS}::test_a_pass_arrives_as_the_service_computed_it",
    ),
    guard(
        "A sample arrives as the service drew it",
        "transport/sample_codec.py",
        'stop_reason="length" if sequence.stop_reason == wire.STOP_REASON_LENGTH else "stop",',
        'stop_reason="stop",',
        f"{_CODECS}::test_a_sample_arrives_as_the_service_drew_it_in_both_forms",
    ),
    guard(
        "Offsets of a result that do not fit its bytes are refused",
        "transport/codec.py",
        "        or (np.diff(offsets) < 0).any()\n        or (offsets % size).any()\n",
        "",
        "tests/transport/test_codec.py::test_a_corrupt_field_is_an_invalid_response",
    ),
    guard(
        "Any REST answer is read or an InvalidResponse",
        "types/answer.py",
        "        except ValidationError as error:\n",
        "        except KeyError as error:\n",
        f"{_CODECS}::test_any_rest_answer_is_read_or_an_invalid_response",
        f"{_ANY}::test_any_json_result",
    ),
    guard(
        "Any answer to a request is a value or one typed error",
        "transport/answer.py",
        "        with contextlib.suppress(ValueError, RecursionError):\n            return _parsed(self.body)\n",
        "        return _parsed(self.body)\n",
        f"{_ANY}::test_any_answer",
        _TARGETS,
    ),
    guard(
        "Any answer to a poll is a result or one typed error",
        "transport/futures.py",
        "        if not isinstance(fields, dict):\n            raise InvalidResponse(",
        "        if fields is None:\n            raise InvalidResponse(",
        f"{_ANY}::test_any_answer_to_a_poll",
    ),
    guard(
        "Half characters of a service are replaced: in answers",
        "transport/answer.py",
        "return with_whole_texts(value) if _MAY_HOLD_HALVES.search(body) else value",
        "return value",
        f"{_CODECS}::test_half_characters_of_a_service_can_be_written_everywhere",
        f"{_SECRECY}::test_half_characters_of_a_service_break_nothing_and_hide_no_key",
    ),
    guard(
        "Half characters of a service are replaced: an id with one is not sent",
        "client/connection.py",
        "    if not value.isprintable() or REPLACED in value:\n",
        "    if not value.isprintable():\n",
        "tests/client/test_any_answer_over_http.py::test_odd_answers",
    ),
    guard(
        "Half characters are replaced in the files of a run",
        "runs/folder.py",
        "    except PydanticSerializationError:  # half a character",
        "    except KeyError:  # half a character",
        f"{_CODECS}::test_half_characters_in_the_files_of_a_run_are_replaced",
    ),
    guard(
        "Half characters are replaced in log lines",
        "telemetry/logs.py",
        """return without_halves(" ".join([event, *(f"{key}={value}" for key, value in fields.items())]))""",
        """return " ".join([event, *(f"{key}={value}" for key, value in fields.items())])""",
        f"{_SECRECY}::test_a_term_named_with_half_a_character_breaks_no_log",
    ),
    guard(
        "The files of a run are read as they were written",
        "runs/folder.py",
        "        return [*steps, StepRecord.model_validate_json(rest)]\n",
        "        return steps[:-1]\n",
        f"{_CODECS}::test_the_files_of_a_run_are_read_as_they_were_written",
    ),
    guard(
        "Any files of a run are read, or a ConfigError",
        "runs/folder.py",
        "    except ValidationError as error:\n        first",
        "    except KeyError as error:\n        first",
        f"{_CODECS}::test_any_files_of_a_run_are_read_or_a_config_error",
        _TARGETS,
    ),
    guard(
        "Any record is replayed, or a PipelineError",
        "losses/replaying.py",
        "    except (KeyError, ValueError, RuntimeError) as error:\n",
        "    except KeyError as error:\n",
        f"{_CODECS}::test_any_record_is_replayed_or_a_pipeline_error",
    ),
    guard(
        "Any bytes in the place of a tar archive are a typed error",
        "client/archive.py",
        "_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)",
        "_DAMAGED = (zlib.error, lzma.LZMAError)",
        _TARGETS,
        "tests/client/test_rest_download.py::test_any_bytes_are_an_archive_or_a_typed_error",
    ),
    guard(
        "The order of requests, whatever becomes of them: early forwards cross no update",
        "transport/lane.py",
        "return len(open_places) == 1 and open_places[0].knows_logprobs",
        "return len(open_places) == 1",
        _ORDER,
    ),
]
