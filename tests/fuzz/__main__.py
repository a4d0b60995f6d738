"""Fuzzes all targets with atheris: `python -m tests.fuzz --seconds 60`, or `--runs 1000`.

The first byte of an input selects the target. An input that crashes one is written to the current folder (`crash-...`)
and can be repeated with `python -m tests.fuzz --try FILE`.
"""

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--seconds", type=int, help="duration")
    chosen.add_argument("--runs", type=int, help="number of inputs")
    chosen.add_argument("--try", type=Path, dest="file", help="file with one input")
    parser.add_argument("--seed", type=int, default=20261124)
    given = parser.parse_args()
    import torch  # before the instrumentation: it is large, and not fuzzed

    del torch
    if given.file is not None:
        from tests.fuzz.targets import TARGETS

        one_input(list(TARGETS.values()), given.file.read_bytes())
        return
    try:
        import atheris
    except ModuleNotFoundError:
        sys.exit("atheris is not installed. Run: pip install atheris (Linux and macOS)")
    with atheris.instrument_imports(include=["tinkex_py", "tests.fuzz.targets"]):
        from tests.fuzz.targets import TARGETS, seeds

    targets = list(TARGETS.values())
    limit = f"-runs={given.runs}" if given.runs is not None else f"-max_total_time={given.seconds}"
    with tempfile.TemporaryDirectory() as corpus:
        for index, name in enumerate(TARGETS):
            for number, content in enumerate(seeds()[name]):
                (Path(corpus) / f"{name}-{number}").write_bytes(bytes([index]) + content)
        options = [limit, f"-seed={given.seed}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=4096", corpus]
        atheris.Setup([sys.argv[0], *options], lambda content: one_input(targets, content))
        atheris.Fuzz()


def one_input(targets: "list[object]", content: bytes) -> None:
    if content:
        targets[content[0] % len(targets)](content[1:])  # type: ignore[operator]


if __name__ == "__main__":
    main()
