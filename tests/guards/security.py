"""What keeps others out: of the service, of its memory and its folders, and of keys and prompts."""

from tests.guards.entry import Guard, guard

_ACCESS = "tests/security/test_access.py"
_BODIES = "tests/security/test_bodies.py"
_PATHS = "tests/security/test_paths.py"
_CODE = "tests/security/test_foreign_code.py"
_SECRECY = "tests/security/test_secrecy.py"
_AUDIT = "tests/security/test_audit.py"
_CLIENT = "tests/client/test_secrecy.py"

ACCESS: list[Guard] = [
    guard(
        "The service listens on this machine only",
        "local/server.py",
        'options: LocalOptions, host: str = "127.0.0.1", port',
        'options: LocalOptions, host: str = "0.0.0.0", port',
        f"{_ACCESS}::test_the_default_is_loopback_and_nothing_else",
    ),
    guard(
        "It refuses to listen elsewhere without a key",
        "local/server.py",
        "    if options.api_key is None and not is_loopback(host):\n",
        "    if options.api_key is None and host is None:\n",
        f"{_ACCESS}::test_anywhere_else_needs_a_key",
    ),
    guard(
        "A service with a key asks for it",
        "local/app.py",
        "return Contained(app if api_key is None else RequireKey(app, api_key, OPEN_PATHS))",
        "return Contained(app)",
        f"{_ACCESS}::test_with_a_key_it_may_listen_anywhere_and_asks_for_it",
        f"{_ACCESS}::test_keys_are_compared_in_constant_time",
    ),
    guard(
        "No route but healthz and signed downloads is open",
        "local/app.py",
        'OPEN_PATHS = ("/api/v1/healthz", DOWNLOADS)',
        'OPEN_PATHS = ("/api/v1/healthz", "/api/v1/sessions", DOWNLOADS)',
        f"{_ACCESS}::test_no_route_answers_a_wrong_key",
    ),
    guard(
        "Keys are compared in constant time",
        "local/guards.py",
        'hmac.compare_digest(_header(scope, b"x-api-key"), self._key)',
        '_header(scope, b"x-api-key") == self._key',
        f"{_ACCESS}::test_keys_are_compared_in_constant_time",
    ),
    guard(
        "A download address opens one file",
        "local/archives.py",
        "        if not hmac.compare_digest(self._signature(path, expires).encode(), signature.encode()):\n",
        "        if not signature:\n",
        f"{_ACCESS}::test_download_addresses_open_one_file_for_a_while",
    ),
    guard(
        "A download address opens it for a while",
        "local/archives.py",
        "        if int(expires) < time.time():\n",
        "        if int(expires) < 0:\n",
        f"{_ACCESS}::test_download_addresses_open_one_file_for_a_while",
    ),
    guard(
        "Web pages cannot use a service without a key: by their own name for it",
        "local/guards.py",
        'if not is_loopback(_hostname(f"//{host}")) or (origin and not is_loopback(_hostname(origin))):',
        "if origin and not is_loopback(_hostname(origin)):",
        f"{_ACCESS}::test_without_a_key_web_pages_cannot_use_it",
    ),
    guard(
        "Web pages cannot use a service without a key: from another origin",
        "local/guards.py",
        'if not is_loopback(_hostname(f"//{host}")) or (origin and not is_loopback(_hostname(origin))):',
        'if not is_loopback(_hostname(f"//{host}")):',
        f"{_ACCESS}::test_without_a_key_web_pages_cannot_use_it",
    ),
]

BODIES: list[Guard] = [
    guard(
        "A body has a size",
        "local/bodies.py",
        "    if size > limit:\n        raise Refused(413,",
        "    if size > 2 * limit * size:\n        raise Refused(413,",
        f"{_BODIES}::test_a_body_beyond_the_limit_is_413_whatever_its_length_says",
        f"{_BODIES}::test_reading_stops_at_the_limit",
    ),
    guard(
        "What comes is counted, whatever a body says of itself",
        "local/bodies.py",
        "        _check_size(received, limit)\n        pieces.append(piece)\n",
        "        pieces.append(piece)\n",
        f"{_BODIES}::test_a_body_beyond_the_limit_is_413_whatever_its_length_says",
        f"{_BODIES}::test_reading_stops_at_the_limit",
    ),
    guard(
        "A length that is no number is no crash",
        "local/bodies.py",
        "    if told.isdecimal():\n        _check_size(int(told[:20]), limit)\n",
        "    if told:\n        _check_size(int(told), limit)\n",
        f"{_BODIES}::test_a_length_that_is_no_number_is_no_crash",
    ),
    guard(
        "A zstd bomb is not unpacked",
        "local/bodies.py",
        "            _check_size(size, limit)\n            pieces.append(piece)\n",
        "            pieces.append(piece)\n",
        f"{_BODIES}::test_a_zstd_bomb_is_413_and_is_not_unpacked",
    ),
    guard(
        "It is unpacked in small steps",
        "local/bodies.py",
        "_ZSTD_STEP = 1024",
        "_ZSTD_STEP = 1 << 30",
        f"{_BODIES}::test_a_zstd_bomb_is_413_and_is_not_unpacked",
    ),
    guard(
        "A zstd body that is not whole is refused",
        "local/bodies.py",
        "    if not unpacker.eof or unpacker.unused_data or taken < len(body):\n",
        "    if size < 0:\n",
        f"{_BODIES}::test_zstd_that_is_not_whole_is_400",
    ),
    guard(
        "A zstd stream that makes no sense is the user's mistake",
        "local/bodies.py",
        "    except zstandard.ZstdError:\n",
        "    except KeyError:\n",
        f"{_BODIES}::test_a_zstd_window_of_any_size_is_not_allocated",
    ),
    guard(
        "JSON has a depth",
        "local/bodies.py",
        "            if depth > MAX_JSON_DEPTH:\n",
        "            if depth < 0:\n",
        f"{_BODIES}::test_json_has_a_depth",
    ),
    guard(
        "Brackets in texts are no depth",
        "local/bodies.py",
        """_STRUCTURE = re.compile(r'"(?:[^"\\\\]++|\\\\.)*+"|[\\[{]|[\\]}]', re.DOTALL)""",
        """_STRUCTURE = re.compile(r'[\\[{]|[\\]}]', re.DOTALL)""",
        f"{_BODIES}::test_brackets_in_texts_and_beside_each_other_are_not_depth",
    ),
    guard(
        "JSON has a number of parts",
        "local/bodies.py",
        """    if containers + text.count('"') // 2 > MAX_JSON_PARTS:\n""",
        "    if containers < 0:\n",
        f"{_BODIES}::test_json_has_a_number_of_parts",
    ),
    guard(
        "What is no UTF-8 is refused, and not quoted",
        "local/bodies.py",
        """return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number is too long\"""",
        "return str(error)",
        f"{_BODIES}::test_what_is_no_utf_8_or_no_number_is_400_and_not_quoted",
    ),
    guard(
        "The decoder's word does not quote the body",
        "local/bodies.py",
        """return f"{error.msg} (character {error.pos})\"""",
        "return error.doc",
        f"{_BODIES}::test_the_decoders_word_does_not_quote_the_body",
    ),
]

PATHS: list[Guard] = [
    guard(
        "Names of checkpoints stay in their folder",
        "local/checkpoints.py",
        "    if _NAME.fullmatch(name) is None:\n",
        "    if name is None:\n",
        f"{_PATHS}::test_names_of_runs_and_checkpoints_stay_in_their_folder",
        f"{_PATHS}::test_any_name_is_refused_or_stays_in_its_folder",
    ),
    guard(
        "Names of runs stay in their folder",
        "local/checkpoints.py",
        "    if _RUN.fullmatch(run_id) is None:\n",
        "    if run_id is None:\n",
        f"{_PATHS}::test_names_of_runs_and_checkpoints_stay_in_their_folder",
    ),
    guard(
        "Parts of addresses stay one segment of a URL on the client",
        "types/checkpoint_path.py",
        'not text or text in (".", "..") or "/" in text or not text.isprintable():\n',
        "not text:\n",
        f"{_PATHS}::test_addresses_of_checkpoints_on_the_client_have_plain_parts",
    ),
    guard(
        "Base models cannot be named by a place on the disk",
        "local/engine.py",
        "        if name != self.model.name:\n",
        '        if name != self.model.name and not name.startswith("/"):\n',
        f"{_PATHS}::test_paths_of_models_are_never_files[/etc/passwd]",
    ),
    guard(
        "Weights cannot be named by a place on the disk",
        "local/checkpoints.py",
        "        match = _PATH.fullmatch(path)\n        if match is None:\n",
        '        match = _PATH.fullmatch(path)\n        if path.startswith("/"):\n'
        "            return self.records.checkpoints()[0][0]\n        if match is None:\n",
        f"{_PATHS}::test_paths_of_models_are_never_files[/etc/passwd]",
    ),
    guard(
        "URLs do not lead out of a checkpoint",
        "local/routes_downloads.py",
        "    return next((file for file in store.files(info) if file.name == name), None)\n",
        '    file = store.file(info, "") / name\n    return file if file.is_file() else None\n',
        f"{_PATHS}::test_urls_cannot_lead_out_of_a_checkpoint",
    ),
    guard(
        "Links to files in the state folder are not followed",
        "local/checkpoints.py",
        "return [file for file in found if file.is_file() and not file.is_symlink()]",
        "return [file for file in found if file.is_file()]",
        f"{_PATHS}::test_links_that_lie_in_the_state_folder_are_not_followed",
    ),
    guard(
        "Links to folders and edited records in the state folder are not followed",
        "local/checkpoints.py",
        "        if not file.resolve().is_relative_to(self._root.resolve()):\n",
        "        if info is None:\n",
        f"{_PATHS}::test_links_that_lie_in_the_state_folder_are_not_followed",
    ),
    guard(
        "Members of archives stay in their folder",
        "client/archive.py",
        'return path.is_absolute() or ".." in path.parts or "\\\\" in name or has_drive',
        "return False",
        f"{_PATHS}::test_members_of_archives_stay_in_the_folder",
        f"{_PATHS}::test_any_member_is_refused_or_stays_in_the_folder",
    ),
    guard(
        "Look-alikes of dots and slashes lead out of no folder either",
        "client/archive.py",
        "_leads_out(name) or _leads_out(alike) or not name.isprintable()",
        "_leads_out(name) or not name.isprintable()",
        f"{_PATHS}::test_members_of_archives_stay_in_the_folder",
    ),
    guard(
        "A link in an archive is not written through",
        "client/archive.py",
        "    if not (member.isreg() or member.isdir()):\n",
        "    if member is None:\n",
        f"{_PATHS}::test_a_link_is_not_written_through",
    ),
    guard(
        "A zip is not opened",
        "client/archive.py",
        "        with tarfile.open(archive, ",
        "        import zipfile\n\n        if zipfile.is_zipfile(archive):\n"
        "            with zipfile.ZipFile(archive) as zipped:\n"
        "                return zipped.extractall(folder)\n        with tarfile.open(archive, ",
        f"{_PATHS}::test_a_zip_is_not_opened",
    ),
]

CODE: list[Guard] = [
    guard(
        "Nothing in the package opens pickles",
        "local/engine.py",
        "        return load(file.read_bytes())\n",
        '        return torch.load(file.open("rb"), weights_only=False)\n',
        f"{_CODE}::test_the_package_opens_no_pickles_and_runs_no_text",
        f"{_CODE}::test_a_pickle_in_the_place_of_a_checkpoint_is_refused",
    ),
    guard(
        "A pickle in the place of a checkpoint is a typed error",
        "local/engine.py",
        "    except SafetensorError as error:\n        raise InvalidData(",
        "    except KeyError as error:\n        raise InvalidData(",
        f"{_CODE}::test_a_pickle_in_the_place_of_a_checkpoint_is_refused",
    ),
    guard(
        "A pickle in the place of the state file is refused",
        "local/database.py",
        "        except sqlite3.DatabaseError as error:\n",
        "        except KeyError as error:\n",
        f"{_CODE}::test_a_pickle_in_the_place_of_the_state_file_is_refused",
    ),
    guard(
        "A pickle in the place of a recorded step is refused",
        "losses/recording.py",
        "    except (OSError, ValueError, library.SafetensorError) as error:\n",
        "    except OSError as error:\n",
        f"{_CODE}::test_a_pickle_in_the_place_of_a_recorded_step_is_refused",
    ),
    guard(
        "Weights of a model folder are safetensors, no pickles",
        "local/models.py",
        "dtype=torch.float32, use_safetensors=True, **_FROM_HERE",
        "dtype=torch.float32, **_FROM_HERE",
        f"{_CODE}::test_honest_pickled_weights_are_refused_too",
    ),
    guard(
        "A model folder that cannot be loaded is a typed error",
        "local/models.py",
        '    except (OSError, ValueError, import_module("safetensors").SafetensorError) as error:\n',
        "    except KeyError as error:\n",
        f"{_CODE}::test_a_model_folder_with_pickled_weights_is_refused",
    ),
    guard(
        "Code beside a model is not run",
        "local/models.py",
        '{"local_files_only": True, "trust_remote_code": False}',
        '{"local_files_only": True, "trust_remote_code": True}',
        f"{_CODE}::test_code_beside_a_model_is_not_run",
    ),
    guard(
        "A tokenizer that a service names brings no code",
        "client/service.py",
        "from_pretrained(name, trust_remote_code=False)",
        "from_pretrained(name, trust_remote_code=True)",
        f"{_CODE}::test_a_tokenizer_that_a_service_names_brings_no_code",
    ),
]

SECRECY: list[Guard] = [
    guard(
        "Keys and prompts show nowhere: an event's repr leaves out its exception",
        "telemetry/events.py",
        "exception: BaseException | None = field(default=None, repr=False)",
        "exception: BaseException | None = field(default=None)",
        f"{_SECRECY}::test_a_runs_folder",
    ),
    guard(
        "Keys and prompts show nowhere: errors do not quote the tokens",
        "types/model_input.py",
        "got {wrong[0]}",
        "got {array}",
        f"{_SECRECY}::test_all_calls_over_http",
    ),
    guard(
        "Keys and prompts show nowhere: the key is in no repr",
        "transport/answer.py",
        """        return "Secret('**********')\"""",
        "        return self._text",
        f"{_CLIENT}::test_no_object_shows_the_key",
    ),
    guard(
        "A crash of the service is logged without what it was about",
        "local/failures.py",
        'logger.error("%s failed: %s\\n%s", what, type(error).__name__, places)',
        'logger.error("%s failed: %s\\n%s", what, error, places)',
        f"{_SECRECY}::test_a_crash_of_the_service_is_logged_without_what_it_was_about",
    ),
    guard(
        "No error leaves the app, whose server would log its text",
        "local/guards.py",
        "        except Exception as error:  # noqa: BLE001  (whatever it was, it ends here)\n",
        "        except KeyError as error:\n",
        f"{_SECRECY}::test_a_crash_of_the_service_is_logged_without_what_it_was_about",
    ),
    guard(
        "Errors about files of prompts hold them in no hidden cause: lines",
        "runs/pairs.py",
        "        with contextlib.suppress(ValidationError):\n            pairs",
        "        with contextlib.nullcontext():\n            pairs",
        f"{_SECRECY}::test_a_file_of_prompts_that_cannot_be_read",
    ),
    guard(
        "Errors about files of prompts hold them in no hidden cause: bytes",
        "runs/pairs.py",
        "        with contextlib.suppress(UnicodeDecodeError):\n",
        "        with contextlib.nullcontext():\n",
        f"{_SECRECY}::test_a_file_of_prompts_that_cannot_be_read",
    ),
    guard(
        "Errors about files of a run hold their content in no hidden cause",
        "runs/folder.py",
        "        first = error.errors(include_url=False, include_input=False)[0]\n",
        "        raise ConfigError(where) from error\n",
        f"{_SECRECY}::test_files_of_a_run_that_cannot_be_read",
    ),
    guard(
        "The key shows nowhere when a service echoes it in an error",
        "transport/answer.py",
        "        return _redacted(_parsed(answer.body), answer.secret)\n",
        "        return _parsed(answer.body)\n",
        f"{_CLIENT}::test_no_error_log_or_event_has_the_key",
    ),
    guard(
        "The key shows nowhere when a service echoes it in a result that failed",
        "transport/futures.py",
        "failed on the service: {answer.secret.redacted_from(message)}",
        "failed on the service: {message}",
        f"{_CLIENT}::test_failures_of_work_do_not_quote_the_key",
    ),
]

GUARDS: list[Guard] = [*ACCESS, *BODIES, *PATHS, *CODE, *SECRECY]
