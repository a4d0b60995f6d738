"""Measures every reader at n and 4n parts: `python -m tests.attacks`, or with a word for the rows whose name has it.

A reader is linear if four times as many parts take less than eight times as long: CPU time, best of three, with n so
large that the first takes 20 ms or more. A reader that refuses large input never takes that long.
"""

import argparse
import gc
import sys
import time
from dataclasses import dataclass

from tests.attacks.readers import READERS, Reader

LONG_ENOUGH = 0.02
LARGEST_INPUT = 48 * 1024**2
MOST = 8.0


@dataclass(frozen=True)
class Measured:
    """What happened at n and 4n parts: seconds of CPU time, bytes of input, and an exception that is no typed error."""

    parts: int
    sizes: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] = (0.0, 0.0)
    defect: str = ""

    @property
    def factor(self) -> float:
        return self.seconds[1] / max(self.seconds[0], LONG_ENOUGH)

    @property
    def is_good(self) -> bool:
        return not self.defect and self.factor <= MOST

    @property
    def outcome(self) -> str:
        if self.defect:
            return self.defect
        return "linear" if self.seconds[0] >= LONG_ENOUGH else "refused or cheap"


def cpu_seconds(reader: Reader, body: bytes) -> float:
    best = float("inf")
    for _ in range(3):
        # Otherwise the larger input pays for a collection of everything that the process has imported.
        gc.collect()
        gc.freeze()
        start = time.process_time()
        reader.read(body)
        best = min(best, time.process_time() - start)
        if best > 20 * LONG_ENOUGH:
            break  # long enough to be exact, and perhaps quadratic
    return best


def measure(reader: Reader) -> Measured:
    parts = reader.least
    try:
        reader.read(reader.make(parts))  # imports
        body = reader.make(parts)
        first = cpu_seconds(reader, body)
        while first < LONG_ENOUGH and 8 * len(body) <= LARGEST_INPUT and parts < 2**22:
            parts *= 2
            body = reader.make(parts)
            first = cpu_seconds(reader, body)
        larger = reader.make(4 * parts)
        return Measured(parts, (len(body), len(larger)), (first, cpu_seconds(reader, larger)))
    except Exception as error:  # noqa: BLE001  (any exception is what this looks for)
        return Measured(parts, defect=f"{type(error).__name__}: {str(error)[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks")
    parser.add_argument("word", nargs="?", default="", help="measure only readers whose name has it")
    word = parser.parse_args().word
    readers = [reader for reader in READERS if word in reader.name]
    print(f"{'reader':52} {'bytes':>10} {'x 4':>11} {'ms':>7} {'ms x 4':>8} {'factor':>6}   (bound: {MOST:g})")
    failed = 0
    for reader in readers:
        found = measure(reader)
        failed += not found.is_good
        times = " ".join(f"{1000 * seconds:{width}.0f}" for seconds, width in zip(found.seconds, (7, 8), strict=True))
        mark = "" if found.is_good else "  FAILED"
        sizes = f"{found.sizes[0]:10} {found.sizes[1]:11}"
        print(f"{reader.name:52} {sizes} {times} {found.factor:6.1f}   {found.outcome}{mark}", flush=True)
    print(f"{len(readers)} readers, {failed} beyond their bound")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
