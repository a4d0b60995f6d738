"""`python -m tinkex_py` and the `tinkex-py` command."""

import sys

from tinkex_py.errors import MissingExtra


def main() -> None:
    """Run the command line; without its libraries, say what to install and exit with status 2."""
    try:
        from tinkex_py.cli import app
    except MissingExtra as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
