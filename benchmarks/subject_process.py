"""The process of one measured subject. `subjects.subject` starts it.

    python -m benchmarks.subject_process benchmarks.clients:own_step '{"base_url": "..."}'

The named function is an async context manager that prepares everything and yields the work: an async function without
arguments. Each line on stdin runs it once; each run prints a line of JSON on stdout.
"""

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.usage import resident, used_by


async def serve(name: str, arguments: Mapping[str, Any]) -> None:
    module, _, function = name.partition(":")
    prepare = getattr(importlib.import_module(module), function)
    async with prepare(**arguments) as work:
        report({"resident": resident()})
        while await asyncio.to_thread(sys.stdin.readline):
            found: list[object] = []

            async def once(found: list[object] = found) -> None:
                found.append(await work())

            usage = await used_by(once)
            report({**asdict(usage), "returned": found[0]})


def report(fields: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], json.loads(sys.argv[2])))
    # All is measured and closed. The threads that the official SDK leaves behind may abort a regular exit.
    sys.stdout.flush()
    os._exit(0)
