"""The table at the end of `make faults`."""

import execnet

from tests.faults.tally import Tally


def test_counts_of_two_processes_add_up():
    one, other = Tally(), Tally()
    one.injected["reset", "F"] += 2
    one.checked["a promise"] += 1
    other.injected.update({("reset", "F"): 3, ("reset", "B"): 1, ("stall", "any"): 1})
    other.checked.update({"a promise": 2, "another": 5})
    one.add(execnet.loads(execnet.dumps(other.counts())))
    assert list(one.lines()) == [
        "injected  times  where",
        "reset         6  B 1, F 5",
        "stall         1  any 1",
        "7 faults of 2 kinds",
        "",
        "checked    times",
        "a promise      3",
        "another        5",
    ]
