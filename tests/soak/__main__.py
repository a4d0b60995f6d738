"""A long run of the client against the embedded service behind a proxy that spoils requests.

`python -m tests.soak --seconds 600`, or `--segments 3`; `--seed` repeats a run. Ends with a table, and with the exit
code 1 and the first difference where something does not hold.
"""

import argparse
import asyncio
import os
import random
import sys
import traceback


def main() -> int:
    """Runs a soak; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=600.0, help="no segment begins after these")
    parser.add_argument("--segments", type=int, help="no more than these")
    parser.add_argument("--seed", type=int, help="repeats a run")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported
    from tests.soak.report import table
    from tests.soak.run import Settings, Tally, soak

    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    settings, tally = Settings(seed=seed, seconds=given.seconds, segments=given.segments, tell=print), Tally()
    print(f"soak: seed {seed}, {given.seconds:g} s", flush=True)
    try:
        asyncio.run(soak(settings, tally))
    except KeyboardInterrupt:
        print(table(settings, tally))
        print(f"\nended by Ctrl-C; nothing was found up to here (seed {seed})")
        return 130
    except Exception as error:  # noqa: BLE001  (whatever it is, it is told together with the seed)
        print(table(settings, tally))
        print(f"\nFAILED with seed {seed} in segment {tally.segments}:")
        for found in first_errors(error):
            print("".join(traceback.format_exception(found)))
        return 1
    print(table(settings, tally))
    print(f"\neverything holds (seed {seed})")
    return 0


def first_errors(error: BaseException) -> list[BaseException]:
    """What groups of errors hold: the groups of tasks around an error say nothing."""
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return [found for one in inner for found in first_errors(one)] or [error]


if __name__ == "__main__":
    sys.exit(main())
