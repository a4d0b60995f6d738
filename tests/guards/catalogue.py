"""Lines that keep the most valuable promises, and tests that fail without them.

`make guards` replaces each line in a copy, where its tests must fail.
"""

from dataclasses import dataclass

PACKAGE = "tinkex_py"


@dataclass(frozen=True)
class Guard:
    """A line that keeps a promise.

    Attributes:
        promise: the promise.
        file: path below the package.
        text: the source text, which occurs in the file exactly once.
        instead: the replacement that breaks the promise.
        tests: node ids that must fail then. An id without parameters stands for all of them.
    """

    promise: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]

    def without(self, content: str) -> str:
        """Returns the content of the file with the guard replaced.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        if (count := content.count(self.text)) != 1:
            raise ValueError(f"{self.file} contains this text {count} times instead of once: {self.text!r}")
        return content.replace(self.text, self.instead)


def guard(promise: str, file: str, text: str, instead: str, *tests: str) -> Guard:
    """Makes an entry from test ids below `tests/`."""
    return Guard(promise, file, text, instead, tuple(f"tests/{test}" for test in tests))


_FAILED_STEP = (
    "client/test_ordering.py::test_a_step_that_fails_before_its_gradient_breaks_what_is_behind_and_leaves_no_gap"
)

GUARDS = (
    # The order of requests
    guard(
        "Requests are sent in the order in which they were called",
        "client/ordering.py",
        "return all(other.happened or other.left or other.index >= turn.index for other in self._turns)",
        "return True",
        _FAILED_STEP,
    ),
    guard(
        "One submission is on the wire at a time",
        "client/ordering.py",
        "self._wire_is_taken = True\n",
        "self._wire_is_taken = False\n",
        "client/test_ordering.py::test_one_submission_is_on_the_wire_at_a_time",
    ),
    guard(
        "A request that was not sent leaves no gap in the numbers",
        "client/ordering.py",
        "            self._turns.remove(turn)\n",
        "            self._turns.remove(turn)\n            self.next_number += not turn.happened\n",
        _FAILED_STEP,
    ),
    guard(
        "No update runs on the gradients of a step that did not happen",
        "client/ordering.py",
        "if not (turn.happened or turn.broken is not None or turn.kind is Kind.READ):",
        "if turn.kind is None:",
        "client/test_failed_steps.py::test_a_failing_term_leaves_the_client_usable_and_holds_optim_step_back",
        "faults/test_storms.py::test_a_storm_of_cancelled_custom_steps",
    ),
    guard(
        "A gradient that the service failed holds the update back",
        "client/ordering.py",
        "            self.break_behind(turn)\n            error.handed_over",
        "            error.handed_over",
        "client/test_ordering.py::test_a_failure_on_the_service_breaks_what_is_not_handed_over_and_lists_what_was",
    ),
    guard(
        "A number that may be lost ends its client with a typed error",
        "client/ordering.py",
        "raise self._lose(numbers, error) from error",
        "raise",
        "client/test_ordering.py::test_no_final_answer_loses_the_lane_with_a_way_out",
        "faults/test_bounds.py::test_a_permanent_fault_ends_the_call[reset]",
    ),
    guard(
        "A number that a proxy refused ends in an error, not in a hang",
        "client/ordering.py",
        "if gap is not None and int(gap[1]) in self._refused:",
        "if gap is not None and int(gap[1]) in ():",
        "client/test_queue_state.py::test_a_number_that_a_proxy_refused_ends_the_client_and_not_in_a_hang",
    ),
    guard(
        "A submission continues when its caller is cancelled",
        "client/ordering.py",
        "return await asyncio.shield(task)",
        "return await task",
        "client/test_cancellation.py::test_a_cancelled_caller_leaves_at_once_though_its_gradient_is_under_way",
        "faults/test_every_suspension.py::test_cancelled_at_every_suspension[optim_step]",
    ),
    guard(
        "A request gives up its turn whenever it is cancelled",
        "client/ordering.py",
        "        finally:\n            self._leave(turn)\n",
        "        else:\n            self._leave(turn)\n",
        "client/test_cancellation.py::test_cancelled_at_every_suspension",
    ),
    guard(
        "A call that a term makes on its own client is refused instead of deadlocking",
        "client/ordering.py",
        "if host is not None and not forward_only:",
        "if host is None and self.lost is not None:",
        "client/test_inside_a_step.py::test_anything_else_is_refused_at_once",
    ),
    guard(
        "The terms of a step start after the gradient of the previous step is accepted",
        "client/ordering.py",
        "while not self._ordering.may_start_terms(self):",
        "while self._ordering.lost:",
        "client/test_ordering.py::test_terms_wait_for_the_acceptance_of_a_gradient_whose_caller_has_left",
    ),
    # State of the service
    guard(
        "A chunk whose result is lost is not reported as missing: its gradient might be added twice",
        "client/passes.py",
        "return ChunkResult(start, stop, Effect.UNKNOWN, error=error)",
        "return ChunkResult(start, stop, Effect.MISSING, error=error)",
        "client/test_chunks_of_a_call.py::test_a_chunk_whose_result_is_lost_is_not_told_as_missing",
    ),
    guard(
        "Bytes in flight are bounded, and waiting batches are not encoded",
        "client/passes.py",
        "async with self._session.pass_bytes.hold(chunk.size):",
        "if chunk.size:",
        "client/test_chunks_of_a_call.py::test_bytes_under_way_are_bounded",
        "faults/test_backpressure.py::test_a_hundred_large_batches[calls of many clients]",
    ),
    guard(
        "A refused or failed optim_step keeps the accumulated gradients",
        "client/accumulation.py",
        "self._calls[:0] = calls",
        "return",
        "client/test_failed_steps.py::test_what_the_service_refused_does_not_change_what_is_accumulated",
    ),
    # Retries and deadlines
    guard(
        "A request without a usable response is retried",
        "transport/api.py",
        "            return isinstance(error, TransportError)\n\n        return await",
        "            return False\n\n        return await",
        "faults/test_exactly_once.py::test_a_fault_at_every_place_of_a_step[reset]",
        "faults/test_exactly_once.py::test_a_fault_at_every_place_of_a_step[garbage bytes]",
    ),
    guard(
        "409 is never retried, whatever the service says",
        "transport/api.py",
        "if error.status == _CONFLICT:",
        "if error.status == -1:",
        "client/test_lost_answers.py::test_a_409_is_never_retried_even_when_told_to",
    ),
    guard(
        "The deadline ends a stalled attempt",
        "transport/api.py",
        "async with time_limit(attempts.seconds_left, too_late):",
        "async with time_limit(None, too_late):",
        "faults/test_bounds.py::test_the_deadline_ends_an_attempt_that_stalls",
    ),
    guard(
        "A service cannot request immediate retries",
        "limits.py",
        "asked_for >= _LEAST_ASKED_FOR",
        "asked_for >= 0",
        "transport/test_api.py::test_a_service_cannot_ask_to_be_asked_at_network_speed",
        "faults/test_bounds.py::test_a_service_cannot_request_immediate_retries",
    ),
    guard(
        "Polls that the service answers at once are paced",
        "transport/api.py",
        "await asyncio.sleep(self._pause)",
        "await asyncio.sleep(0)",
        "transport/test_futures.py::test_polling_never_spins",
    ),
    # Connections
    guard(
        "A cancelled exchange closes its connection",
        "transport/connections.py",
        "        except BaseException:\n            self._discard(connection)\n",
        "        except BaseException:\n            self._idle.append(connection)\n",
        "faults/test_storms.py::test_a_thousand_cancelled_requests",
    ),
    guard(
        "A connection is reused only after an exchange that ended cleanly",
        "transport/connections.py",
        "if connection.ended_cleanly and not self._closed:",
        "if not self._closed:",
        "transport/test_stream.py::test_leaving_early_closes_what_is_half_read",
        "transport/test_http_cancellation.py::test_random_trouble",
    ),
    guard(
        "Surplus bytes after a response are never taken for the next response",
        "transport/connections.py",
        "if stream is not None and not stream.has_read_since_write:",
        "if stream is None:",
        "transport/test_http_cancellation.py::test_bytes_behind_a_response_are_never_taken_for_the_next_one",
    ),
    guard(
        "Connections are bounded, whatever the number of clients",
        "transport/http.py",
        "asyncio.Semaphore(max_connections)",
        "asyncio.Semaphore(1000 * max_connections)",
        "transport/test_http_cancellation.py::test_two_hundred_exchanges_over_eight_connections",
    ),
    guard(
        "A client refuses a second event loop",
        "transport/http.py",
        "if self._loop is not loop:",
        "if self._loop is None:",
        "transport/test_http_cancellation.py::test_a_second_event_loop_is_refused",
        "faults/test_second_loop.py::test_a_second_loop_in_the_middle_of_a_step",
    ),
    guard(
        "The key is sent only to the origin of base_url",
        "transport/http.py",
        "key if at_home else NO_SECRET",
        "key",
        "transport/test_stream.py::test_another_place_gets_neither_key_nor_headers",
    ),
    guard(
        "No frame of an error holds a key",
        "transport/secrecy.py",
        "error.__traceback__ = error.__context__ = None",
        "error.__context__ = None",
        "security/test_frames.py::test_no_error_of_a_request_carries_a_secret[cancelled-run]",
        "security/test_frames.py::test_no_error_of_a_setting_carries_a_secret[a timeout]",
    ),
    guard(
        "Text of others does not steer the terminal",
        "commands/common/printing.py",
        "typer.echo(plain_text(text)",
        "typer.echo(str(text)",
        "security/test_hostile_text.py::test_what_a_model_says[words]",
    ),
    # Terms and threads
    guard(
        "A thread that outlives its term keeps its permit, so the bound on threads holds",
        "losses/worker_pool.py",
        "future.add_done_callback(lambda _, held=held: held.release())",
        "held.release()",
        "losses/test_threads.py::test_six_terms_that_outlive_their_timeouts",
    ),
    guard(
        "A term behind abandoned threads waits no longer than its timeout",
        "losses/worker_pool.py",
        "stalled = all(held.abandoned for held in self._in_the_way(permit))",
        "stalled = False",
        "losses/test_threads.py::test_row_119_a_queued_sync_term_times_out_and_names_the_holders",
    ),
    guard(
        "A term that writes into the shared logprobs fails the step",
        "losses/logprobs.py",
        "if not writers and self._unchanged():",
        "if not writers:",
        "losses/test_leaves.py::test_rule_1_the_writer_is_named",
    ),
    # The embedded service and untrusted input
    guard(
        "A repeated request with the same number is processed once",
        "local/core.py",
        "        if receipt is None:\n            return None\n",
        "        return None\n",
        "local/test_protocol.py::test_a_repeat_gets_the_first_answer_and_is_done_once",
        "faults/test_exactly_once.py::test_a_fault_at_every_place_of_a_step[passed on twice]",
    ),
    guard(
        "A save is atomic: the old checkpoint is removed after the new one is complete",
        "local/checkpoints.py",
        "        draft.mkdir(parents=True)\n",
        "        draft.mkdir(parents=True)\n        if old is not None:\n            self._remove_files(old)\n",
        "local/test_checkpoints.py::test_a_failed_write_leaves_the_old_checkpoint_whole",
        "security/test_atomic_checkpoints.py::test_killed_before_every_line_of_a_save",
    ),
    guard(
        "Pickles are never loaded",
        "local/engine.py",
        "return load(file.read_bytes())",
        'return torch.load(file.open("rb"), weights_only=False)',
        "security/test_foreign_code.py::test_a_pickle_in_the_place_of_a_checkpoint_is_refused",
    ),
    guard(
        "A key that a service echoes is redacted",
        "transport/api.py",
        "failed on the service: {response.secret.redacted_from(message)}",
        "failed on the service: {message}",
        "client/test_secrecy.py::test_failures_of_work_do_not_quote_the_key",
    ),
    # Means over an accumulation
    guard(
        "The gradients of the micro-batches of a step add up to that of one mean",
        "terms/reduction.py",
        "return weighted.sum() / (self.total or tokens or 1.0), metrics",
        "return weighted.sum() / (tokens or 1.0), metrics",
        "objectives/test_total.py::test_the_pipeline_of_a_step_has_the_totals_of_the_step",
    ),
    # Recipes of the official SDK
    guard(
        "A folder that cannot be written does not hide at the end of a recipe",
        "integrations/recipe_record.py",
        "                    self._error = error",
        "                    del error",
        "integrations/test_tinker.py::test_an_official_program_with_regularizers",
    ),
    # Objectives
    guard(
        "A multiplier moves on the mean over all calls of an optimizer step",
        "losses/output.py",
        "math.fsum(count * call.violation for count, call in zip(counts, calls, strict=True)) / total",
        "math.fsum(call.violation for call in calls) / len(calls)",
        "losses/test_constraints.py::test_four_and_twelve_datums_move_a_multiplier_like_sixteen",
    ),
    guard(
        "The linter notices that cutting a batch changes the gradient",
        "lint/batch_rules.py",
        "share is not None and abs(share - 1.0) < _EQUAL for share in shares",
        "share is not None for share in shares",
        "lint/test_lint.py::test_planted_mistakes_are_found_by_the_rule_meant_for_them",
    ),
    guard(
        "The linter knows a surrogate from a wrong gradient",
        "lint/gradient_rules.py",
        "if subject.surrogate is not None or not subject.at.norm:",
        "if not subject.at.norm:",
        "lint/test_lint.py::test_ready_made_terms_have_no_findings",
    ),
    guard(
        "The text of a pipeline imports nothing but ready-made terms",
        "portable.py",
        "        if own_term is None:\n",
        "        own_term = own_term or (lambda name, where: __import__(name.partition(':')[0]))\n        if False:\n",
        "test_portable.py::test_text_of_others_is_refused",
    ),
    guard(
        "The fingerprint of an objective depends on nothing but the objective",
        "portable.py",
        "for name, value in spec.items() if name not in _LIMITS}",
        "for name, value in spec.items()}",
        "test_portable.py::test_what_the_fingerprint_ignores",
    ),
)
