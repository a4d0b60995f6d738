"""`tinkex-py sample`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson, BaseUrl, service_at
from tinkex_py.commands.common.outcomes import told_in_one_line
from tinkex_py.commands.common.running import run
from tinkex_py.errors import ConfigError, InvalidData

if TYPE_CHECKING:
    from tinkex_py.client.service import AsyncServiceClient


def sample(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_OR_PATH", help="a base model, or tinker://RUN/sampler_weights/NAME"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="what the model continues; read from stdin by default")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to draw")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 draws the likeliest")] = 1.0,
    count: Annotated[int, typer.Option("--n", min=1, help="how many samples")] = 1,
    seed: Annotated[int | None, typer.Option(help="makes the draw repeatable", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="name or folder; that of the base model by default", show_default=False)
    ] = None,
    local: Annotated[
        str | None, typer.Option(help="tiny, smollm2 or a model folder, in this process instead of a service")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="with --local: where its checkpoints are")] = None,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Draw from a base model or a checkpoint."""
    with told_in_one_line("sample", extra="local"):
        if local is None and (model is None or state_dir is not None):
            raise ConfigError("give MODEL_OR_PATH, or --local MODEL; --state-dir goes with --local")
        if local is not None and (base_url is not None or tokenizer is not None):
            raise ConfigError("--base-url and --tokenizer do not go with --local, which has its own")
        text = _from_stdin() if prompt is None else prompt
        if not _is_text(text):
            raise InvalidData("--prompt is not UTF-8 text")

        from tinkex_py.commands.work.sampling import Draw, draw
        from tinkex_py.types import SamplingParams

        wanted = Draw(
            source=model or local or "",
            prompt=text,
            params=SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed),
            count=count,
            chat=chat,
            tokenizer=tokenizer,
            in_process=local is not None,
        )
        run(draw(wanted, _service(local, state_dir, base_url), as_json=as_json))


def _service(local: str | None, state_dir: Path | None, base_url: str | None) -> "AsyncServiceClient":
    from tinkex_py.client.service import AsyncServiceClient

    return service_at(base_url) if local is None else AsyncServiceClient.local(local, state_dir=state_dir)


def _is_text(prompt: str) -> bool:
    """Whether nothing in it came from bytes that are no text, which Python keeps as lone surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise InvalidData("give a prompt with --prompt, or pipe one in")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData("what came from stdin is not UTF-8 text") from error
