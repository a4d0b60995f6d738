"""What keeps the promises of the embedded service itself."""

from tests.guards.entry import Guard, guard

_SAVES = "tests/security/test_atomic_checkpoints.py"
_FAILS = "tests/security/test_one_request_fails.py"
_LIMITS = "tests/security/test_limits.py"
_PROTOCOL = "tests/local/test_protocol.py"
_SERVER = "tests/local/test_server.py"

GUARDS: list[Guard] = [
    guard(
        "A save is whole or not there: it enters the state file when it is whole",
        "local/checkpoints.py",
        "            fill(draft)\n            size",
        '            self.records.put_checkpoint(info.model_copy(update={"folder": folder.name}))\n'
        "            fill(draft)\n            size",
        f"{_SAVES}::test_killed_before_every_line_of_a_save",
    ),
    guard(
        "What a save that was killed left half-done is removed",
        "local/checkpoints.py",
        "            if _FOLDER.fullmatch(folder.name) and folder.name not in known:\n",
        "            if folder.name is None:\n",
        f"{_SAVES}::test_killed_before_every_line_of_a_save",
        f"{_SAVES}::test_killed_at_random_moments",
        "tests/local/test_checkpoints.py::test_a_half_written_folder_is_not_a_checkpoint_and_is_removed_at_the_next_start",
    ),
    guard(
        "The old checkpoint goes only when the new one can be found",
        "local/checkpoints.py",
        "        draft.mkdir(parents=True)\n",
        "        draft.mkdir(parents=True)\n        if old is not None:\n            self._remove_files(old)\n",
        f"{_SAVES}::test_killed_before_every_line_of_a_save",
        f"{_SAVES}::test_killed_at_random_moments",
        "tests/local/test_checkpoints.py::test_a_failed_write_leaves_the_old_checkpoint_whole",
    ),
    guard(
        "Runs survive a restart of the service, and what is lost is said",
        "local/core.py",
        "self._gone = set(loaded.run_ids)",
        "self._gone = set[str]()",
        "tests/local/test_state.py::test_a_client_learns_of_a_restart_and_goes_on_from_its_checkpoint",
        f"{_PROTOCOL}::test_a_restart_tells_clients_what_is_gone",
    ),
    guard(
        "Sessions survive a restart of the service",
        "local/service.py",
        "list(store.records.sessions())",
        "[]",
        "tests/local/test_state.py::test_a_client_learns_of_a_restart_and_goes_on_from_its_checkpoint",
    ),
    guard(
        "Futures from before a restart find no result of another",
        "local/results.py",
        "self._mark = uuid.uuid4().hex[:8]",
        'self._mark = "same"',
        "tests/local/test_state.py::test_futures_of_an_earlier_run_find_no_result_of_this_one",
    ),
    guard(
        "A crash in a pass fails that pass only: its gradients are added when it has succeeded",
        "local/engine.py",
        "                summed[key] = gradient if held is None else held.add_(gradient)\n",
        "                summed[key] = gradient if held is None else held.add_(gradient)\n"
        "                model.adapter.add_gradients({key: gradient})\n",
        "tests/local/test_engine.py::test_a_failed_pass_leaves_no_gradient_behind",
    ),
    guard(
        "The engine goes on after a crash of any kind",
        "local/worker.py",
        "            return work()\n",
        "            try:\n                return work()\n            except BaseException:\n"
        "                self.closing.set()\n                raise\n",
        f"{_FAILS}::test_a_crash_in_a_pass_fails_that_pass_only",
    ),
    guard(
        "A crash in a batch of samples fails the one that crashes",
        "local/sample_queue.py",
        "if len(items) == 1 or isinstance(error, InvalidData | EngineClosing):",
        "if items:",
        f"{_FAILS}::test_a_crash_in_a_shared_batch_fails_the_one_that_crashes",
    ),
    guard(
        "Requests that shared a batch are drawn alone after a crash",
        "local/sample_queue.py",
        "                item.alone = True\n",
        "                item.alone = False\n",
        f"{_FAILS}::test_a_crash_in_a_shared_batch_fails_the_one_that_crashes",
        may_hang=True,
    ),
    guard(
        "Nobody waits for ever for an answer that failed before it began",
        "local/sample_queue.py",
        "        except BaseException as error:\n            self._fail_one_by_one(group, error)\n            raise\n",
        "        except BaseException:\n            raise\n",
        f"{_FAILS}::test_weights_that_cannot_be_found_fail_their_samples_and_no_others",
        may_hang=True,
    ),
    guard(
        "A checkpoint is loaded whole, or the model stays as it was",
        "local/engine.py",
        "        optimizer = AdapterOptimizer(adapter)\n        if with_optimizer:\n",
        "        adapter.set_weights(weights)\n"
        "        optimizer = AdapterOptimizer(adapter)\n        if with_optimizer:\n",
        f"{_FAILS}::test_a_model_is_loaded_whole_or_stays_as_it_was",
    ),
    guard(
        "Two clients never see each other's adapters",
        "local/engine.py",
        "        self._bank.activate(model.adapter)\n        model.touched = True\n        if request.forward_only:\n",
        "        model.touched = True\n        if request.forward_only:\n",
        f"{_FAILS}::test_two_clients_never_see_each_others_adapters",
        "tests/local/test_engine.py::test_two_interleaved_models_get_the_gradients_they_would_get_alone",
    ),
    guard(
        "A failed step of one client leaves the other alone",
        "client/model_requests.py",
        "self.lane = Lane()",
        "self.lane = next(iter(connection.lanes), None) or Lane()",
        f"{_FAILS}::test_a_failed_step_of_one_client_leaves_the_other_alone",
    ),
    guard(
        "A request that comes again under its number is done once",
        "local/core.py",
        'known = self._repeated(lane.receipts.get(number), digest, f"seq_id {number} of model {model_id!r}")',
        "known = None",
        f"{_PROTOCOL}::test_a_repeat_gets_the_first_answer_and_is_done_once",
        "tests/faults/test_exactly_once.py::test_a_fault_at_any_place_of_a_step[passed on twice-B]",
    ),
    guard(
        "A number belongs to one request of one kind",
        "local/core.py",
        "        if receipt.digest != digest:\n",
        "        if receipt.digest is None:\n",
        f"{_PROTOCOL}::test_a_repeat_gets_the_first_answer_and_is_done_once",
        "tests/local/test_requests_of_all_kinds.py::test_a_number_belongs_to_one_request_of_any_kind",
    ),
    guard(
        "Work that waits for the engine is bounded",
        "local/backlog.py",
        "        if self.requests >= self._max_requests:\n",
        "        if self.requests < 0:\n",
        f"{_LIMITS}::test_a_full_queue_answers_429_and_the_number_stays_free",
    ),
    guard(
        "Whoever comes too late is told when to come back",
        "local/app.py",
        'headers = {"Retry-After": "1"} if error.status in (429, 503) else None',
        "headers = None",
        f"{_LIMITS}::test_a_full_queue_answers_429_and_the_number_stays_free",
    ),
    guard(
        "What waits for an earlier number never keeps that number out",
        "local/core.py",
        "self._check_room(self._queued if number <= lane.next_number else self._held, size)",
        "self._check_room(self._held, size)",
        f"{_LIMITS}::test_what_waits_for_an_earlier_number_is_bounded_and_never_keeps_that_number_out",
    ),
    guard(
        "Bytes that wait are bounded",
        "local/backlog.py",
        "        if self.bytes and self.bytes + size > self._max_bytes:\n",
        "        if self.bytes < 0:\n",
        f"{_LIMITS}::test_bytes_that_wait_are_bounded_and_one_large_request_is_not_shut_out",
    ),
    guard(
        "One request larger than the bound is not shut out",
        "local/backlog.py",
        "        if self.bytes and self.bytes + size > self._max_bytes:\n",
        "        if self.bytes + size > self._max_bytes:\n",
        f"{_LIMITS}::test_bytes_that_wait_are_bounded_and_one_large_request_is_not_shut_out",
    ),
    guard(
        "Training models are bounded",
        "local/core.py",
        "        if model_id not in self.lanes and len(self.lanes) >= most:\n",
        "        if len(self.lanes) < 0:\n",
        f"{_LIMITS}::test_models_are_bounded",
    ),
    guard(
        "Samples that wait are bounded",
        "local/sample_queue.py",
        "return sum(not item.future.cancelled() for item in self._waiting) >= self._max_waiting",
        "return False",
        "tests/local/test_sample_queue.py::test_a_full_queue_answers_429_and_keeps_the_number_free",
    ),
    guard(
        "This package's client comes back after 429",
        "transport/retry.py",
        "_RETRYABLE_CLIENT_ERRORS = frozenset({408, 425, 429})",
        "_RETRYABLE_CLIENT_ERRORS = frozenset({408, 425})",
        f"{_LIMITS}::test_our_client_comes_back",
    ),
    guard(
        "Limits that are none are refused",
        "local/options.py",
        "            if least is not None and value < least:\n",
        "            if least is None and value is None:\n",
        f"{_LIMITS}::test_limits_that_are_none_are_refused",
    ),
    guard(
        "A kept graph that no backward pass uses is freed",
        "local/graphs.py",
        "        return tensor.detach()\n",
        "        return tensor\n",
        "tests/local/test_engine.py::test_a_kept_graph_that_no_backward_pass_uses_is_freed",
    ),
    guard(
        "No two answers are the same to the byte",
        "local/guards.py",
        "{next(self._count)}",
        "1",
        f"{_SERVER}::test_every_answer_has_a_request_id_of_its_own",
    ),
]
