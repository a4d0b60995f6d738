"""Runs in a process of its own: all parts of the unmodified official SDK against the service at argv[1].

Prints what each part has seen, as one line of JSON.
"""

import json
import sys
from types import ModuleType

import official_rest_program
import official_sampling_program
import official_sdk_engine_program
import official_sdk_program

# The first part lists an empty service; the last part counts calls of the SDK.
PARTS: tuple[ModuleType, ...] = (
    official_rest_program,
    official_sdk_program,
    official_sdk_engine_program,
    official_sampling_program,
)


def main() -> None:
    seen = {part.__name__: part.main(sys.argv[1]) for part in PARTS}
    sys.stdout.write(json.dumps(seen, default=list) + "\n")


if __name__ == "__main__":
    main()
