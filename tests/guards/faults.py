"""What keeps the client's promises among many clients, storms of cancellations, and answers that are mixed up."""

from tests.guards.entry import Guard, guard

_MANY = "tests/faults/test_many_clients.py::test_two_hundred_training_clients_on_one_loop"
_STORM = "tests/faults/test_storms.py::test_a_thousand_cancelled_requests"
_CUSTOM_STORM = "tests/faults/test_storms.py::test_a_storm_of_cancelled_custom_steps"
_BATCHES = "tests/faults/test_backpressure.py::test_a_hundred_large_batches"
_BEATS = "tests/faults/test_heartbeats.py::test_lost_heartbeats_are_told_and_so_is_the_next_that_is_heard"
_LOOP = "tests/faults/test_second_loop.py::test_a_second_loop_in_the_middle_of_a_step"
_COPY = "tests/faults/test_answers_mixed_up.py::test_a_copy_that_comes_when_the_next_request_is_there"
_SWAPPED = "tests/faults/test_answers_mixed_up.py::test_two_requests_answered_in_swapped_order"
_CANCELLED = "tests/faults/test_every_suspension.py::test_cancelled_at_every_suspension"
_OPENING = "tests/faults/test_every_suspension.py::test_opening_that_is_cancelled_at_every_suspension"
_DOUBT = "tests/transport/test_doubtful_answers.py"

CROWDS: list[Guard] = [
    guard(
        "However many clients there are, connections are few",
        "transport/connection_pool.py",
        "asyncio.Semaphore(max_connections)",
        "asyncio.Semaphore(1000 * max_connections)",
        _MANY,
    ),
    guard(
        "In a storm of cancellations no broken connection is used again",
        "transport/connection_pool.py",
        "            except BaseException:\n                self._discard(member)\n                raise\n",
        "            except asyncio.CancelledError:\n                self._idle.append(member)\n"
        "                raise\n",
        _STORM,
    ),
    guard(
        "In a storm of cancelled steps, what is behind one is not sent",
        "transport/lane.py",
        "if not (place.happened or place.is_broken or place.kind is Kind.READ):",
        "if place.kind is None and place.happened:",
        _CUSTOM_STORM,
    ),
    guard(
        "Custom steps that wait are not laid out yet",
        "client/model_requests.py",
        "        await (place.early_turn() if early else place.turn())\n        return await encode_custom_chunks(",
        "        return await encode_custom_chunks(",
        f"{_BATCHES}[custom steps of one client]",
    ),
    guard(
        "Batches that wait are not written yet, whoever's they are",
        "client/submission.py",
        "async with self.connection.pass_bytes.hold(chunk.size):",
        "async with self.connection.sample_bytes.hold(0):",
        f"{_BATCHES}[calls of many clients]",
    ),
]

BEATS: list[Guard] = [
    guard(
        "A heartbeat that is heard again is told",
        "client/session.py",
        "            if failures:\n",
        "            if failures < 0:\n",
        _BEATS,
    ),
    guard(
        "No hostile answer ends the heartbeat",
        "client/session.py",
        "            tell_failure(type(error), error)\n            continue\n",
        "            tell_failure(type(error), error)\n            return\n",
        f"{_BEATS}[hostile answers]",
        may_hang=True,
    ),
    guard(
        "No refusal ends the heartbeat",
        "client/session.py",
        "            tell_failure(status_error_class(answer.status))\n",
        "            tell_failure(status_error_class(answer.status))\n            return\n",
        f"{_BEATS}[final answers]",
        may_hang=True,
    ),
    guard(
        "An answer to a heartbeat that the service did not write is none",
        "client/session.py",
        "            if answer.is_success and answer.body.strip():\n",
        "            if answer.status == -1:\n",
        f"{_BEATS}[hostile answers]",
    ),
]

LOOPS: list[Guard] = [
    guard(
        "A second loop is refused in the middle of a step",
        "transport/http.py",
        "        if asyncio.get_running_loop() is not self._loop:\n",
        "        if asyncio.get_running_loop() is None:\n",
        _LOOP,
        may_hang=True,
    ),
    guard(
        "A second loop is refused by a training client in the middle of a step",
        "transport/lane.py",
        "        if asyncio.get_running_loop() is not self._loop:\n",
        "        if asyncio.get_running_loop() is None:\n",
        _LOOP,
        may_hang=True,
    ),
]

ANSWERS: list[Guard] = [
    guard(
        "An answer that may be a copy of an earlier one is not believed",
        "transport/http_connection.py",
        "        known = heard in self._heard\n",
        "        known = False\n",
        f"{_COPY}[any]",
        f"{_DOUBT}::test_a_final_answer_is_asked_for_again_over_a_fresh_connection",
        f"{_DOUBT}::test_a_copy_that_comes_after_other_answers_is_known",
    ),
    guard(
        "A copy is known after other answers too",
        "transport/http_connection.py",
        "_REMEMBERED_ANSWERS = 8",
        "_REMEMBERED_ANSWERS = 1",
        f"{_DOUBT}::test_a_copy_that_comes_after_other_answers_is_known",
    ),
    guard(
        "An answer that is asked for again anyway is in no doubt",
        "transport/http_connection.py",
        "known and not (response.status_code in _ASKED_AGAIN or response.status_code >= 500)",
        "known",
        f"{_DOUBT}::test_an_answer_that_is_asked_for_again_anyway_is_in_no_doubt",
    ),
    guard(
        "A connection that may have brought a copy is given up, whatever the copy says",
        "transport/http_connection.py",
        "        self._repeated = known\n",
        "        self._repeated = known and response.status_code < 300\n",
        f"{_DOUBT}::test_its_connection_is_given_up_all_the_same",
    ),
    guard(
        "Answers that differ in their last bytes only are told apart",
        "transport/http_connection.py",
        "body[:_COMPARED_BYTES], body[-_COMPARED_BYTES:])",
        "body[:_COMPARED_BYTES])",
        f"{_DOUBT}::test_what_differs_is_in_no_doubt",
    ),
    guard(
        "A DELETE is never sent twice",
        "transport/http.py",
        'fresh=request.method == "DELETE"',
        "fresh=False",
        f"{_DOUBT}::test_a_delete_is_never_sent_twice",
    ),
    guard(
        "What is streamed is no copy of an answer",
        "transport/http.py",
        "self._stoppable(), self._connection(fresh=True) as connection",
        "self._stoppable(), self._connection(fresh=False) as connection",
        f"{_DOUBT}::test_what_is_streamed_is_no_copy",
    ),
    guard(
        "Each request under way has a connection of its own, so that none waits for another's answer",
        "transport/connection_pool.py",
        "idle = self._idle.pop() if self._idle else None",
        "idle = self._idle[-1] if self._idle else None",
        f"{_SWAPPED}[optim_step]",
        may_hang=True,
    ),
]

SUSPENSIONS: list[Guard] = [
    guard(
        "A custom step over HTTP that is cancelled at any moment leaves the lane",
        "client/model_requests.py",
        "        finally:\n            place.leave()\n",
        "        else:\n            self.lane.remove(place)\n",
        f"{_CANCELLED}[custom step]",
        may_hang=True,
    ),
    guard(
        "An optim_step or a save that was handed over goes on when its caller is cancelled",
        "transport/place.py",
        "        return await asyncio.shield(task)\n",
        "        return await task\n",
        f"{_CANCELLED}[optim_step]",
        f"{_CANCELLED}[save_state]",
        may_hang=True,
    ),
    guard(
        "Entering that is cancelled closes the client",
        "client/service.py",
        "        except BaseException:\n            await self.aclose()\n            raise\n        return self\n",
        "        except Exception:\n            await self.aclose()\n            raise\n        return self\n",
        f"{_OPENING}[entering]",
    ),
    guard(
        "A first call that is cancelled leaves a client that can open",
        "client/service.py",
        "        async with self._opening:\n            if not self._has_session:\n"
        "                await self._open()\n",
        "        await self._opening.acquire()\n        if not self._has_session:\n            await self._open()\n"
        "        self._opening.release()\n",
        f"{_OPENING}[first model]",
        may_hang=True,
    ),
]

GUARDS: list[Guard] = [*CROWDS, *BEATS, *LOOPS, *ANSWERS, *SUSPENSIONS]
