"""`tinkex-py demo`."""

from pathlib import Path
from typing import Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.printing import echo_json
from tinkex_py.commands.common.running import EMBEDDED_SERVICE, one_line_errors, run


def demo(
    model: Annotated[str, typer.Option(help="smollm2, tiny, or a local Hugging Face folder")] = "smollm2",
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="datums per step")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="learning rate of AdamW")] = 5e-4,
    runs_dir: Annotated[Path, typer.Option(help="where the run's folder is created")] = Path("runs"),
    data: Annotated[Path | None, typer.Option(help="JSON Lines file of prompts and answers")] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pretrained language model with a composed loss; show progress and samples, and write a report."""
    with one_line_errors("demo", extra="demo", needs=("rich", "jinja2", "matplotlib", *EMBEDDED_SERVICE)):
        from rich.console import Console

        from tinkex_py.demo import DemoOptions, run_demo

        options = DemoOptions(
            model=model, steps=steps, batch_size=batch_size, learning_rate=learning_rate, runs_dir=runs_dir, data=data
        )
        summary = run(run_demo(options, Console(stderr=as_json)))
        if as_json:
            echo_json(summary)
