"""(i) The embedded service on a real model: against plain torch and peft, and the cost of a custom step."""

from contextlib import ExitStack

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import BenchmarkError, Measured, alternate, served, subject

MODEL, SHAPE, VOCABULARY = "smollm2", (8, 128), 49_000
QUICK_MODEL, QUICK_SHAPE, QUICK_VOCABULARY = "tiny", (2, 16), 256
CALLS = ("forward_backward", "custom", "two_passes")
# Relative difference of two float32 sums over the same logits.
TOLERANCE = 1e-3


def run(settings: Settings) -> list[Result]:
    """Measures all calls on one service, and plain torch for comparison."""
    if settings.quick:
        measured = measure(QUICK_MODEL, QUICK_SHAPE, QUICK_VOCABULARY, settings.rounds)
    else:
        measured = measure(MODEL, SHAPE, VOCABULARY, settings.rounds)
    facts = {f"{name}_{fact}": value for name, one in measured.items() for fact, value in one.facts().items()}
    single, custom, double, plain = (measured[name].wall for name in (*CALLS, "plain"))

    def result(what: str, number: float, bound: float | None) -> Result:
        return Result(benchmark="i", what=what, measured=number, bound=bound, facts=facts)

    return [
        result("forward_backward over HTTP / plain torch + peft, wall time", single / plain, 1.15),
        result("custom step / forward_backward, both over HTTP, wall time", custom / single, 1.15),
        result("custom step / forward and then forward_backward, wall time", custom / double, None),
    ]


def measure(model: str, shape: tuple[int, int], vocabulary: int, rounds: int) -> dict[str, Measured]:
    """Runs every call in turn, and checks that all compute the same loss."""
    with ExitStack() as stack:
        service = stack.enter_context(served("tinkex_py", "serve", "--model", model, "--port", "0"))
        common = {"shape": shape, "vocabulary": vocabulary}
        subjects = {
            call: stack.enter_context(
                subject("benchmarks.trainings:over_http", {"base_url": service, "call": call, **common})
            )
            for call in CALLS
        }
        subjects["plain"] = stack.enter_context(subject("benchmarks.trainings:plain", {"model": model, **common}))
        measured = alternate(subjects, rounds=rounds)
    check_losses(measured)
    return measured


def check_losses(measured: dict[str, Measured]) -> None:
    """Checks that all subjects computed the same loss.

    Raises:
        BenchmarkError: naming the losses.
    """
    losses = {name: one.returned[-1] for name, one in measured.items()}
    expected = losses["plain"]
    if any(abs(loss - expected) > TOLERANCE * abs(expected) for loss in losses.values()):
        raise BenchmarkError(f"the losses differ: {losses}")


BENCHMARK = Benchmark("i", "the embedded service against plain torch and peft", run)
