"""Runs the client for a long time against the embedded service, behind a proxy that injects faults.

`python -m tests.soak --seconds 600`, or `--segments 3`; `--seed` repeats a run. Ends with a table, and with the first
difference and exit code 1 if a promise does not hold.
"""

import argparse
import asyncio
import os
import random
import sys
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Runs a soak; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no segment after this time")
    parser.add_argument("--segments", type=int, help="the maximum number of segments")
    parser.add_argument("--seed", type=int, help="seed of the run to repeat")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported
    from tests.soak.report import table
    from tests.soak.run import Settings, Tally, soak

    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    settings, tally = Settings(seed=seed, seconds=given.seconds, segments=given.segments, on_start=print), Tally()
    print(f"soak: seed {seed}, {given.seconds:g} s", flush=True)
    try:
        asyncio.run(soak(settings, tally))
    except KeyboardInterrupt:
        print(table(settings, tally))
        print(f"\nended by Ctrl-C; no failure so far (seed {seed})")
        return 130
    except Exception as error:  # noqa: BLE001  (any failure is reported with the seed)
        print(table(settings, tally))
        print(f"\nFAILED with seed {seed} in segment {tally.segments}:")
        for found in first_errors(error):
            print("".join(traceback.format_exception(found)))
        return 1
    print(table(settings, tally))
    print(f"\nall checks passed (seed {seed})")
    return 0


def first_errors(error: BaseException) -> list[BaseException]:
    """Returns the errors inside exception groups."""
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return [found for one in inner for found in first_errors(one)] or [error]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
