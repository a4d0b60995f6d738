"""`tinkex-py lint`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.printing import echo, echo_json
from tinkex_py.commands.common.running import FAILED, one_line_errors, run

if TYPE_CHECKING:
    from tinkex_py.runs.config import TrainConfig
    from tinkex_py.types import Datum

_DATUMS = 16


def lint(
    config: Annotated[Path, typer.Argument(help="YAML file that describes a run, as for `train`")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="replaces a setting of the file; can be repeated"),
    ] = [],  # noqa: B006  (typer copies it)
    ignore: Annotated[list[str], typer.Option(metavar="RULE", help="leaves out a rule; can be repeated")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Look for mistakes in the loss of a run, without a model or a service.

    Exit codes: 0 there is no finding, or only warnings, 1 there is an error, 2 the input is invalid.
    """
    with one_line_errors("lint", needs=("yaml",)):
        from tinkex_py.lint import lint as find
        from tinkex_py.runs.config import pipeline_of, read_config

        described = read_config(config, overrides)
        pipeline, data = pipeline_of(described.loss), _data(described)
        findings = run(find(pipeline, data, accumulate=described.training.accumulate, ignore=ignore))
        for finding in findings:
            echo_json(dataclasses.asdict(finding)) if as_json else echo(str(finding))
        if not (findings or as_json):
            echo(f"no findings in {1 + len(pipeline.regularizers)} terms")
        if any(finding.severity == "error" for finding in findings):
            raise typer.Exit(FAILED)


def _data(config: "TrainConfig") -> "Sequence[Datum]":
    """Returns datums with the fields that `train` makes; a token is a byte, and references are invented."""
    from tinkex_py.lint.cases import case_of
    from tinkex_py.runs.pairs import make_datum, read_pairs
    from tinkex_py.types import Datum

    data = [make_datum(Bytes(), pair) for pair in read_pairs(config.data.path)[:_DATUMS]]
    if not config.data.reference_logprobs:
        return data
    return [
        Datum(
            model_input=datum.model_input,
            loss_fn_inputs={**datum.loss_fn_inputs, "reference_logprobs": logprobs.float()},
        )
        for datum, logprobs in zip(data, case_of(data, None, seed=1).logprobs, strict=True)
    ]


class Bytes:
    """An encoder whose tokens are the bytes of the text."""

    def encode(self, text: str, /) -> list[int]:
        """Returns the bytes."""
        return list(text.encode())
