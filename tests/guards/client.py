"""What keeps the promises of the client: retries, numbers and order, bounds, cancellation, closing."""

from tests.guards.entry import Guard, guard

_AT_ANY_PLACE = "tests/faults/test_exactly_once.py::test_a_fault_at_any_place_of_a_step"
_ONCE = "tests/faults/test_exactly_once.py"
_BOUNDS = "tests/faults/test_bounds.py"
_RESUMING = "tests/faults/test_resuming.py"
_RETRY = "tests/transport/test_retry.py"
_FUTURES = "tests/transport/test_futures.py"
_LANE = "tests/transport/test_lane.py"
_POOL = "tests/transport/test_connection_pool.py"
_STORM = "tests/transport/test_http_cancellation.py"
_BYTES = "tests/transport/test_byte_budget.py"
_LOST = "tests/client/test_lost_answers.py"
_LIFE = "tests/client/test_life_cycle.py"
_FAILED = "tests/client/test_failed_steps.py"
_CANCELLED = "tests/client/test_cancellation.py"
_CHUNKS = "tests/client/test_chunks_of_a_call.py"
_SOAK = "tests/soak/test_soak.py::test_a_short_soak_holds"

_KINDS = "_RETRYABLE_FAILURES = (ConnectionFailed, TimeoutExceeded, InvalidResponse)"
_BREAKS = "if not (place.happened or place.is_broken or place.kind is Kind.READ):"

RETRIES: list[Guard] = [
    guard(
        "A connection that fails is tried again",
        "transport/retry.py",
        _KINDS,
        "_RETRYABLE_FAILURES = (TimeoutExceeded, InvalidResponse)",
        f"{_AT_ANY_PLACE}[connection refused-F]",
        f"{_AT_ANY_PLACE}[connections that break at once-B]",
        f"{_AT_ANY_PLACE}[reset-B]",
        f"{_AT_ANY_PLACE}[half an answer-optim_step]",
        f"{_RESUMING}::test_a_restart_in_the_middle_of_a_step",
        f"{_ONCE}::test_connections_over_tls_that_break",
        f"{_ONCE}::test_a_name_that_cannot_be_resolved_now_and_then",
        f"{_BOUNDS}::test_nobody_listens",
        f"{_BOUNDS}::test_a_name_that_nobody_has",
        f"{_ONCE}::test_a_random_mix_of_faults",
    ),
    guard(
        "What stalls is given up and sent again",
        "transport/retry.py",
        _KINDS,
        "_RETRYABLE_FAILURES = (ConnectionFailed, InvalidResponse)",
        f"{_AT_ANY_PLACE}[stall-B]",
        f"{_AT_ANY_PLACE}[a drip without end-F]",
    ),
    guard(
        "An answer that makes no sense is asked for again",
        "transport/retry.py",
        _KINDS,
        "_RETRYABLE_FAILURES = (ConnectionFailed, TimeoutExceeded)",
        f"{_AT_ANY_PLACE}[garbage bytes-F]",
        f"{_AT_ANY_PLACE}[wrong content type-B]",
        f"{_AT_ANY_PLACE}[wrong protobuf-optim_step]",
        f"{_AT_ANY_PLACE}[broken gzip-B]",
    ),
    guard(
        "408, 425 and 429 are waited out",
        "transport/retry.py",
        "_RETRYABLE_CLIENT_ERRORS = frozenset({408, 425, 429})",
        "_RETRYABLE_CLIENT_ERRORS = frozenset[int]()",
        f"{_AT_ANY_PLACE}[status, before-B]",
        f"{_AT_ANY_PLACE}[status, after-optim_step]",
    ),
    guard(
        "500 and above are waited out",
        "transport/retry.py",
        "return status in _RETRYABLE_CLIENT_ERRORS or status >= 500",
        "return status in _RETRYABLE_CLIENT_ERRORS",
        f"{_AT_ANY_PLACE}[status, before-F]",
        f"{_AT_ANY_PLACE}[status, after-B]",
    ),
    guard(
        "A poll that fails is asked again",
        "transport/futures.py",
        "retryable = isinstance(error, TransportError) or (",
        "retryable = (",
        f"{_AT_ANY_PLACE}[reset-retrieve_future]",
        f"{_AT_ANY_PLACE}[wrong content type-retrieve_future]",
    ),
    guard(
        "A poll that is refused for a while is asked again",
        "transport/futures.py",
        "(error.status >= 500 or error.status in (400, 425, 429))",
        "error.status == 400",
        f"{_AT_ANY_PLACE}[status, before-retrieve_future]",
        f"{_ONCE}::test_every_form_of_retry_after[retrieve_future]",
    ),
    guard(
        "A repeat has the number and the bytes of the first",
        "client/connection.py",
        "            answer = await self.exchange(method, path, attempt=attempt, **options)\n",
        '            if attempt > 1 and "seq_id" in options.get("json", {}):\n'
        '                options["json"]["seq_id"] += 1\n'
        "            answer = await self.exchange(method, path, attempt=attempt, **options)\n",
        f"{_LOST}::test_a_lost_answer_is_replayed_with_the_same_number_and_applied_once[optim_step]",
        f"{_LOST}::test_other_numbered_calls_are_replayed_too",
    ),
    guard(
        "A future that an answer does not tell is asked for again",
        "client/connection.py",
        "json=body, check=has_request_id(path)), path)",
        "json=body), path)",
        f"{_LOST}::test_an_answer_without_a_future_is_asked_for_again",
    ),
    guard(
        "409 is never sent again, whatever the service says of it",
        "transport/retry.py",
        "if answer.is_success or answer.status == _CONFLICT:",
        "if answer.is_success:",
        f"{_LOST}::test_a_409_is_never_retried_even_when_told_to",
    ),
    guard(
        "A final answer is not asked for again",
        "transport/retry.py",
        "    return retry_statuses(answer.status)\n",
        "    return True\n",
        f"{_RESUMING}::test_final_answers_end_in_typed_errors_and_the_run_goes_on[B]",
    ),
    guard(
        "A result that is gone is a typed error, not a wait",
        "transport/futures.py",
        "_LOST_STATUSES = frozenset({404, 410})",
        "_LOST_STATUSES = frozenset({404})",
        f"{_RESUMING}::test_expired_futures_say_so",
    ),
    guard(
        "Bytes behind an answer are never taken for the next one",
        "transport/connection_pool.py",
        "if self._closed or not member.is_clean:",
        "if self._closed:",
        f"{_STORM}::test_bytes_behind_an_answer_are_never_taken_for_the_next_one",
        f"{_POOL}::test_a_member_that_is_not_clean_is_closed_and_replaced",
        f"{_AT_ANY_PLACE}[answered twice-optim_step]",
    ),
]

WAITS: list[Guard] = [
    guard(
        "The deadline ends an attempt that stalls",
        "transport/retry.py",
        "asyncio.timeout_at(last_moment if math.isfinite(last_moment) else None)",
        "asyncio.timeout_at(None)",
        f"{_BOUNDS}::test_the_deadline_ends_an_attempt_that_stalls[stall]",
    ),
    guard(
        "No wait that ends after the deadline is begun",
        "transport/retry.py",
        "tenacity.stop_before_delay(policy.deadline)",
        "tenacity.stop_after_delay(policy.deadline)",
        f"{_RETRY}::test_no_wait_that_ends_after_the_deadline_is_begun",
        f"{_BOUNDS}::test_no_wait_that_the_service_asks_for_goes_beyond_the_deadline[B]",
    ),
    guard(
        "No pause between polls that ends after the deadline is begun",
        "transport/futures.py",
        "if now + pause - self._failing_since > self._retry.deadline or not attempts_left:",
        "if not attempts_left:",
        f"{_BOUNDS}::test_no_wait_that_the_service_asks_for_goes_beyond_the_deadline[retrieve_future]",
    ),
    guard(
        "Attempts are bounded",
        "transport/retry.py",
        "        stop |= tenacity.stop_after_attempt(policy.max_attempts)\n",
        "        pass\n",
        f"{_BOUNDS}::test_a_fault_that_lasts_ends_the_call[reset-B]",
    ),
    guard(
        "Polls that fail are bounded",
        "transport/futures.py",
        "self._retry.max_attempts is None or self._failures < self._retry.max_attempts",
        "True",
        f"{_BOUNDS}::test_a_fault_that_lasts_ends_the_call[reset-retrieve_future]",
    ),
    guard(
        "Waits are random from nothing on (full jitter)",
        "transport/retry.py",
        "tenacity.wait_random_exponential(",
        "tenacity.wait_exponential(",
        f"{_RETRY}::test_full_jitter_spreads_over_the_whole_range",
    ),
    guard(
        "Waits between polls that fail are random too",
        "transport/futures.py",
        "return random.uniform(0.0, longest)",
        "return longest",
        f"{_FUTURES}::test_pauses_are_random_below_an_exponential_bound",
    ),
    guard(
        "A poll that the service does not hold is paced",
        "transport/futures.py",
        "        await asyncio.sleep(self._pause)\n",
        "        await asyncio.sleep(0)\n",
        f"{_FUTURES}::test_polling_never_spins",
        f"{_FUTURES}::test_not_yet_is_asked_again_with_a_growing_pause",
    ),
    guard(
        "Retry-After of hours is not obeyed to the end",
        "transport/answer.py",
        "return None if seconds is None else min(seconds, LONGEST_RETRY_AFTER)",
        "return seconds",
        "tests/transport/test_answer.py::test_retry_after",
        f"{_ONCE}::test_every_form_of_retry_after[F]",
    ),
    guard(
        "retry-after-ms of hours is not obeyed to the end",
        "transport/answer.py",
        "return min(milliseconds / 1000, LONGEST_RETRY_AFTER)",
        "return milliseconds / 1000",
        "tests/transport/test_answer.py::test_retry_after",
    ),
    guard(
        "Retry-After that is no number of seconds is not obeyed",
        "transport/answer.py",
        "return number if math.isfinite(number) and number >= 0 else None",
        "return number",
        "tests/transport/test_answer.py::test_retry_after",
        "tests/transport/test_answer.py::test_no_retry_after_breaks_anything",
    ),
    guard(
        "A service cannot ask to be asked at network speed",
        "transport/retry.py",
        "asked_for is None or asked_for < _LEAST_ASKED_FOR",
        "asked_for is None",
        f"{_RETRY}::test_a_service_cannot_ask_to_be_asked_at_network_speed",
        f"{_FUTURES}::test_a_service_cannot_ask_to_be_polled_at_network_speed",
        f"{_BOUNDS}::test_a_service_cannot_ask_to_be_asked_at_network_speed",
    ),
    guard(
        "One poll lasts no longer than poll_timeout",
        "client/connection.py",
        "                timeout=self.config.poll_timeout,\n",
        "                timeout=600.0,\n",
        f"{_BOUNDS}::test_waiting_for_a_result_ends_when_the_caller_wants",
    ),
    guard(
        "A service that holds polls for long is not taken for a dead one",
        "transport/futures.py",
        "self._is_alive is not None and await self._is_alive():",
        "self._is_alive is None:",
        f"{_FUTURES}::test_a_poll_that_takes_long_is_no_trouble_where_the_service_answers_otherwise",
    ),
    guard(
        "A service that nobody reaches says why: its name",
        "transport/failures.py",
        "if isinstance(error, socket.gaierror):",
        "if error is None:",
        f"{_BOUNDS}::test_a_name_that_nobody_has",
    ),
    guard(
        "A certificate that is not trusted is refused",
        "transport/http_connection.py",
        "httpx.AsyncClient(verify=tls_context, limits=limits)",
        "httpx.AsyncClient(verify=False, limits=limits)",
        f"{_BOUNDS}::test_tls_that_cannot_be_trusted_or_spoken",
    ),
]

ORDER: list[Guard] = [
    guard(
        "Requests go out in the order in which they were called",
        "transport/lane.py",
        "return all(other.happened or other.index >= place.index for other in self._places)",
        "return True",
        f"{_LANE}::test_a_step_that_fails_before_its_gradient_breaks_what_is_behind_and_leaves_no_gap",
        "tests/fuzz/test_order.py::TestOrdering",
    ),
    guard(
        "One submission is on the wire at a time",
        "transport/lane.py",
        "        while self._wire_is_taken:\n            await self.change(place)\n            place.check()\n"
        "        self._wire_is_taken = True\n",
        "        self._wire_is_taken = True\n",
        f"{_LANE}::test_one_submission_is_on_the_wire_at_a_time",
        "tests/fuzz/test_order.py::TestOrdering",
    ),
    guard(
        "A request that was not sent leaves no gap in the numbers",
        "transport/lane.py",
        "        self._places.remove(place)\n",
        "        self._places.remove(place)\n        self.next_number += not place.happened\n",
        f"{_LANE}::test_a_step_that_fails_before_its_gradient_breaks_what_is_behind_and_leaves_no_gap",
        _SOAK,
        "tests/fuzz/test_order.py::TestOrdering",
    ),
    guard(
        "No update runs on the gradients of a step that did not happen",
        "transport/lane.py",
        _BREAKS,
        "if place.kind is None:",
        f"{_LANE}::test_a_request_cancelled_while_queued_breaks_what_is_behind",
        f"{_FAILED}::test_a_failing_term_leaves_the_client_usable_and_holds_optim_step_back",
        f"{_FAILED}::test_a_cancelled_step_holds_optim_step_back",
        "tests/fuzz/test_order.py::TestOrdering",
    ),
    guard(
        "A gradient that the service failed holds the update back",
        "transport/place.py",
        "        self._lane.break_behind(self)\n        last = max(self.numbers, default=0)\n",
        "        last = max(self.numbers, default=0)\n",
        f"{_LANE}::test_a_failure_on_the_service_breaks_what_is_not_handed_over_and_lists_what_was",
        "tests/fuzz/test_order.py::TestOrdering",
    ),
    guard(
        "A gradient that was refused holds the update back",
        "transport/place.py",
        "if self.happened and self.kind is not Kind.READ:",
        "if self.kind is None:",
        f"{_LANE}::test_a_final_refusal_of_a_gradient_breaks_and_spends_its_number",
        f"{_LOST}::test_a_refused_backward_breaks_the_update_behind_it_and_is_not_sent_again",
    ),
    guard(
        "A number that may be lost ends the client in a typed error that names the way out",
        "transport/lane.py",
        "            # Whatever it was: the number is taken, and nobody can say whether it arrived.\n"
        "            raise self._lose(numbers, error) from error\n",
        "            raise\n",
        f"{_LANE}::test_no_final_answer_loses_the_lane_with_a_way_out",
        f"{_BOUNDS}::test_a_fault_that_lasts_ends_the_call[reset-B]",
    ),
    guard(
        "An answer that leaves open whether a number arrived is no refusal",
        "transport/lane.py",
        "            if is_undecided(error):\n                raise self._lose(numbers, error) from error\n",
        "",
        f"{_BOUNDS}::test_a_fault_that_lasts_ends_the_call[status, before-B]",
    ),
    guard(
        "A number that somebody on the way refused ends in an error, not in a wait",
        "transport/lane.py",
        "        if number in self.refused:\n",
        "        if number in ():\n",
        "tests/client/test_queue_state.py::test_a_number_that_a_proxy_refused_ends_the_client_and_not_in_a_hang",
        may_hang=True,
    ),
    guard(
        "Chunks behind one that never arrived do not wait for ever",
        "client/submission.py",
        "asyncio.timeout(deadline if math.isfinite(deadline) else None)",
        "asyncio.timeout(None)",
        f"{_CHUNKS}::test_a_chunk_that_never_reached_the_service_does_not_keep_the_others_waiting_for_ever",
        may_hang=True,
    ),
    guard(
        "A lost result of one chunk is not told as missing, which would add its gradient twice",
        "client/submission.py",
        "        if lost:  # to send its datums again might add their gradient twice\n",
        "        if not lost:\n",
        f"{_CHUNKS}::test_a_chunk_whose_result_is_lost_is_not_told_as_missing",
    ),
    guard(
        "A term that asks its own client for what must wait is refused, and does not deadlock",
        "transport/lane.py",
        "            if mark.alive and mark.place in self._places:\n",
        "            if mark.alive and mark.place is None:\n",
        f"{_LANE}::test_anything_else_asked_for_by_a_term_is_refused_at_once",
        "tests/client/test_inside_a_step.py::test_anything_else_is_refused_at_once",
        may_hang=True,
    ),
]

CANCELLATION: list[Guard] = [
    guard(
        "A submission that was handed over goes on when its caller is cancelled",
        "transport/place.py",
        "return await asyncio.shield(task)",
        "return await task",
        f"{_CANCELLED}::test_a_cancelled_caller_leaves_at_once_though_its_gradient_is_under_way",
        _SOAK,
    ),
    guard(
        "A step that is cancelled at any moment leaves the lane",
        "client/model_requests.py",
        "        finally:\n            place.leave()\n",
        "        else:\n            place.leave()\n",
        f"{_CANCELLED}::test_cancelled_at_every_suspension",
        f"{_CANCELLED}::test_cancelled_over_http_at_every_suspension",
        f"{_CANCELLED}::test_cancelled_after_any_number_of_turns_of_the_loop",
        may_hang=True,
    ),
    guard(
        "A cancelled exchange gives up its connection, and no half-used one is used again",
        "transport/connection_pool.py",
        "            except BaseException:\n                self._discard(member)\n                raise\n",
        "            except BaseException:\n                self._idle.append(member)\n                raise\n",
        f"{_POOL}::test_a_member_that_failed_is_closed_and_replaced",
    ),
    guard(
        "A cancelled exchange leaves its connection to be closed, not to be found by a collector",
        "transport/connection_pool.py",
        "            except BaseException:\n                self._discard(member)\n                raise\n",
        "            except Exception:\n                self._discard(member)\n                raise\n",
        f"{_POOL}::test_random_cancellations_lose_no_slot",
        f"{_STORM}::test_fifty_rounds_of_twenty_cancelled_requests",
    ),
    guard(
        "A slot of the pool is given back whatever happens",
        "transport/connection_pool.py",
        "        async with self._slots:\n            idle =",
        "        await self._slots.acquire()\n        if self._slots:\n            idle =",
        f"{_POOL}::test_random_cancellations_lose_no_slot",
        f"{_STORM}::test_fifty_rounds_of_twenty_cancelled_requests",
        may_hang=True,
    ),
    guard(
        "Bytes under way are bounded",
        "client/submission.py",
        "async with self.connection.pass_bytes.hold(chunk.size):",
        "if chunk.size:",
        f"{_CHUNKS}::test_bytes_under_way_are_bounded",
    ),
    guard(
        "Whoever waits for bytes is served in order",
        "transport/byte_budget.py",
        "if not self._waiting and self._fits(count):",
        "if self._fits(count):",
        f"{_BYTES}::test_first_come_first_served_and_large_ones_alone",
    ),
    guard(
        "A waiter for bytes that is cancelled lets those behind it pass",
        "transport/byte_budget.py",
        "                self._waiting.remove((count, turn))\n                self._admit()\n",
        "                self._waiting.remove((count, turn))\n",
        f"{_BYTES}::test_a_waiter_that_is_cancelled_lets_those_behind_it_pass",
    ),
    guard(
        "Bytes that come together with a cancellation are given back",
        "transport/byte_budget.py",
        "                self._give_back(count)\n            else:",
        "                pass\n            else:",
        f"{_BYTES}::test_a_turn_that_comes_together_with_a_cancellation_is_given_back",
    ),
]

LIFE: list[Guard] = [
    guard(
        "A client used on a second event loop says so",
        "transport/http.py",
        "        if asyncio.get_running_loop() is not self._loop:\n",
        "        if self._loop is None:\n",
        f"{_STORM}::test_a_second_event_loop_is_refused",
    ),
    guard(
        "A training client used on a second event loop says so",
        "transport/lane.py",
        "        if asyncio.get_running_loop() is not self._loop:\n",
        "        if self._loop is None:\n",
        f"{_LIFE}::test_a_second_event_loop_is_refused",
    ),
    guard(
        "The heartbeat goes on after a failure, and tells it",
        "client/session.py",
        "        except (TransportError, APIStatusError, ConfigError) as error:\n            failures += 1\n",
        "        except ConfigError as error:\n            failures += 1\n",
        f"{_LIFE}::test_the_heartbeat_survives_failures_and_tells_them",
    ),
    guard(
        "A heartbeat that is heard again ends the count of failures",
        "client/session.py",
        "            failures, last_success = 0, loop.time()\n        else:",
        "            last_success = loop.time()\n        else:",
        f"{_LIFE}::test_a_heartbeat_that_is_heard_again_ends_the_count_of_failures",
    ),
    guard(
        "The heartbeat ends and says so when the service has ended the session",
        "client/session.py",
        "        if answer.status == SESSION_OVER:\n",
        "        if answer.status == -1:\n",
        f"{_LIFE}::test_the_heartbeat_ends_and_says_so_when_the_session_is_over",
        may_hang=True,
    ),
    guard(
        "The heartbeat of a client that is gone ends",
        "client/session.py",
        "        if owner() is None:\n            return\n",
        "",
        f"{_LIFE}::test_a_client_left_open_warns_and_its_heartbeat_ends",
        may_hang=True,
    ),
    guard(
        "Closing does not wait for a farewell that hangs",
        "client/session.py",
        "            async with asyncio.timeout(self._longest_goodbye):\n",
        "            async with asyncio.timeout(None):\n",
        f"{_LIFE}::test_closing_does_not_wait_for_a_heartbeat_or_a_finish_that_hang",
        may_hang=True,
    ),
    guard(
        "Closing waits for a submission in flight",
        "transport/lane.py",
        "        _, pending = await asyncio.wait(tasks, timeout=timeout)\n",
        "        pending = tasks\n",
        f"{_LOST}::test_closing_lets_a_submission_in_flight_end",
    ),
    guard(
        "Closing waits for it no longer than close_timeout",
        "transport/lane.py",
        "        _, pending = await asyncio.wait(tasks, timeout=timeout)\n",
        "        _, pending = await asyncio.wait(tasks)\n",
        f"{_LOST}::test_closing_waits_for_a_submission_in_flight_up_to_close_timeout",
        may_hang=True,
    ),
    guard(
        "Closing ends exchanges under way, also those that wait for a connection",
        "transport/http.py",
        "                scope.reschedule(self._loop.time())\n",
        "                pass\n",
        f"{_STORM}::test_closing_stops_what_runs_and_what_waits",
        may_hang=True,
    ),
]

GUARDS: list[Guard] = [*RETRIES, *WAITS, *ORDER, *CANCELLATION, *LIFE]
