"""Fingerprints: they change with what a run trains on, and with nothing else."""

import functools
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinkex_py import Datum, ModelInput
from tinkex_py.base_losses import DPO, NLL
from tinkex_py.losses import per_datum
from tinkex_py.losses.schedules import Linear
from tinkex_py.regularizers import KLDivergence
from tinkex_py.runs.fingerprints import BYTECODE, batch_fingerprint, fingerprint

SOURCE = '''
import torch

SCALE = 2.0


def helper(logprobs):
    return logprobs.pow(2).sum()


def term(data, logprobs, power=1):
    """Squares."""
    return SCALE * helper(logprobs) ** power  # a comment


def made(factor):
    def inner(data, logprobs):
        return factor * logprobs.sum()

    return inner


class Term:
    """A term."""

    def __init__(self, beta):
        self.beta = beta

    def compute(self, data, logprobs):
        return self.beta * helper(logprobs)


tens = lambda data, logprobs: 10 * logprobs.sum()
'''
NUMBERS = itertools.count()


def module_of(source: str, folder: Path) -> Any:
    """A module made of a new file, so that nothing of another version is cached."""
    file = folder / f"terms_{next(NUMBERS)}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("terms", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_of(module: Any) -> list[str | None]:
    values = (module.term, module.made(3.0), module.Term(0.1), module.tens, functools.partial(module.term, power=2))
    return [*map(fingerprint, values), fingerprint(per_datum(module.term))]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", "  # another one\n"),
        ('"""Squares."""', '"""Squares them.\n\n    At length.\n    """'),
        ("\n\n\n", "\n\n# moved down\n\n\n\n"),
        ('    """A term."""\n\n', ""),
        ("SCALE * helper(logprobs) ** power", "(SCALE   * (helper(logprobs) ** power))"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path: Path, old: str, new: str):
    assert old in SOURCE
    assert all_of(module_of(SOURCE, tmp_path)) == all_of(module_of(SOURCE.replace(old, new), tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("** power", "** -power", [0, 4, 5]),
        ("power=1", "power=3", [0, 4, 5]),
        ("SCALE = 2.0", "SCALE = 2.5", [0, 4, 5]),
        (".pow(2)", ".pow(4)", [0, 2, 4, 5]),
        ("factor * logprobs", "-factor * logprobs", [1]),
        ("self.beta * helper", "-self.beta * helper", [2]),
        ("10 * logprobs", "11 * logprobs", [3]),
    ],
)
def test_code_defaults_constants_and_helpers_count(tmp_path: Path, old: str, new: str, changed: list[int]):
    before, after = all_of(module_of(SOURCE, tmp_path)), all_of(module_of(SOURCE.replace(old, new), tmp_path))
    assert None not in before
    assert [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == changed


def test_captured_values_and_settings_count(tmp_path: Path):
    module = module_of(SOURCE, tmp_path)
    captured = [2.0, 3.0, "3.0", torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.zeros(2), np.ones(2), (3.0,)]
    different = [
        *map(module.made, captured),
        *map(module.Term, captured),
        functools.partial(module.term, power=2),
        functools.partial(module.term, power=3),
        NLL(),
        NLL(reduction="token-mean"),
        DPO(reference_field="a"),
        DPO(reference_field="a", beta=0.2),
        Linear(start=0.0, end=1.0, steps=3),
        Linear(start=0.0, end=1.0, steps=4),
    ]
    prints = [fingerprint(value) for value in different]
    assert None not in prints
    assert len(set(prints)) == len(prints)
    assert [fingerprint(module.made(value)) for value in captured] == prints[: len(captured)]


def test_without_source_bytecode_counts_under_the_same_python():
    def made(text: str) -> Any:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(text, names)
        return fingerprint(names["term"])

    first = made('def term(data, logprobs):\n    "Doc."\n    return 2 * logprobs.sum()')
    assert first is not None
    assert first.startswith(BYTECODE)
    assert made('\n\ndef term(data, logprobs):\n    "Other."\n    return 2 * logprobs.sum()  # same') == first
    assert made("def term(data, logprobs):\n    return 3 * logprobs.sum()") != first


def test_two_lambdas_on_one_line_are_told_apart():
    first, second = [lambda data, logprobs: logprobs.sum(), lambda data, logprobs: -logprobs.sum()]
    assert fingerprint(first) != fingerprint(second)


def test_compiled_code_is_unknown():
    class Opaque:
        __slots__ = ()

        def __call__(self, data: Any, logprobs: Any) -> Any:
            return logprobs.sum()

    assert fingerprint(Opaque()) is None


def test_a_value_that_contains_itself_has_a_fingerprint():
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) != fingerprint([1, 1])


def datum(tokens: list[int], **inputs: Any) -> Datum:
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": tokens, **inputs})


def test_tokens_fields_and_order_of_a_batch_count():
    batches = [
        [datum([1, 2]), datum([3])],
        [datum([3]), datum([1, 2])],
        [datum([1, 2]), datum([4])],
        [datum([1, 2], weights=[0.0, 1.0]), datum([3])],
        [datum([1, 2], weights=[0.0, 0.5]), datum([3])],
        [datum([1, 2])],
    ]
    prints = [batch_fingerprint(batch) for batch in batches]
    assert len(set(prints)) == len(batches)
    assert [batch_fingerprint(list(batch)) for batch in batches] == prints


def test_terms_of_older_runs_keep_their_fingerprints():
    """As computed before DPO moved to another module and both got more settings."""
    assert fingerprint(DPO(reference_field="reference_logprobs")) == "15cb987cb8f91152"
    assert fingerprint(KLDivergence(reference_field="a")) == "f6f03d9878fe9955"
