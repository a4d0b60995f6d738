"""`tinkex-py sample`."""

import asyncio
import json
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinkex_py.commands.common.options import AsJson, BaseUrl, service_at
from tinkex_py.commands.common.printing import echo, echo_json
from tinkex_py.commands.common.running import EMBEDDED_SERVICE, one_line_errors, run
from tinkex_py.errors import ConfigError, InvalidData, UnsupportedFeature, require_modules
from tinkex_py.text import decode, encode_prompt
from tinkex_py.unicode import half_at

if TYPE_CHECKING:
    from tinkex_py.client.service import AsyncServiceClient
    from tinkex_py.types import SampledSequence


def sample(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_OR_PATH", help="a base model, or tinker://RUN/sampler_weights/NAME"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="text to continue; default stdin")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="maximum number of tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 selects the most likely token")] = 1.0,
    count: Annotated[int, typer.Option("--n", min=1, help="number of samples")] = 1,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="name or folder; default that of the base model", show_default=False)
    ] = None,
    local: Annotated[
        str | None, typer.Option(help="tiny, smollm2 or a model folder, run in this process instead of on a service")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="folder with the checkpoints of --local")] = None,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Sample from a base model or a checkpoint."""
    with one_line_errors("sample"):
        if local is None and (model is None or state_dir is not None):
            raise ConfigError("give MODEL_OR_PATH, or --local MODEL; --state-dir needs --local")
        if local is not None and (base_url is not None or tokenizer is not None):
            raise ConfigError("--base-url and --tokenizer cannot be combined with --local: remove them")
        if local is not None:
            require_modules("local", *EMBEDDED_SERVICE)
        elif tokenizer is not None or (model != "tiny" and not str(model).startswith("tinker://")):
            require_modules("local", "transformers")  # for the tokenizer; that of a checkpoint is known later
        text = _from_stdin() if prompt is None else prompt
        if half_at(text) is not None:  # Python keeps bytes that are not UTF-8 as lone surrogates
            raise InvalidData("--prompt is not UTF-8 text: encode it as UTF-8")

        from tinkex_py.client.service import AsyncServiceClient
        from tinkex_py.types import ModelInput, SamplingParams

        service = service_at(base_url) if local is None else AsyncServiceClient.local(local, state_dir=state_dir)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)

        async def sampled() -> "list[tuple[SampledSequence, str]]":
            source = model or local or ""
            is_path = source.startswith("tinker://")
            async with aclosing(service):
                # Before the tokenizer, because looking for that of a model that does not exist can take minutes.
                sampler = await service.create_sampling_client(
                    base_model=None if is_path else source, model_path=source if is_path else None
                )
                loaded = await _tokenizer(service, tokenizer, source, in_process=local is not None)
                tokens = ModelInput.from_ints(_prompt_tokens(loaded, source, text, chat=chat))
                response = await sampler.sample(tokens, num_samples=count, sampling_params=params)
            return [(sequence, _decoded(loaded, sequence)) for sequence in response.sequences]

        _show(run(sampled()), as_json=as_json)


def _show(samples: "list[tuple[SampledSequence, str]]", *, as_json: bool) -> None:
    for number, (sequence, text) in enumerate(samples, start=1):
        if as_json:
            echo_json({**json.loads(sequence.model_dump_json(exclude_none=True)), "text": text})
        else:
            if len(samples) > 1:
                echo(f"--- {number} ({sequence.stop_reason})")
            echo(text)


async def _tokenizer(service: "AsyncServiceClient", name: str | None, source: str, *, in_process: bool) -> Any:
    if name is None:
        name = source
        if source.startswith("tinker://"):
            name = (await service.create_rest_client().get_weights_info(source)).base_model
    if not in_process:
        # The names of `tinkex-py serve` are unknown to transformers.
        from tinkex_py.local.models import load_tokenizer

        own = await asyncio.to_thread(load_tokenizer, name)
        if own is not None:
            return own
    try:
        return await service.get_tokenizer(name)
    except UnsupportedFeature as error:
        raise ConfigError(f"the tokenizer {name!r} cannot be loaded: name another one with --tokenizer") from error


def _prompt_tokens(tokenizer: Any, source: str, prompt: str, *, chat: bool) -> list[int]:
    from tinkex_py.data.chat import ChatRenderer, has_chat_template

    if not chat:
        return encode_prompt(tokenizer, prompt)
    if not has_chat_template(tokenizer):
        raise ConfigError(f"the tokenizer of {source} has no chat template: remove --chat, or use --tokenizer")
    return ChatRenderer(tokenizer).prompt([{"role": "user", "content": prompt}])


def _decoded(tokenizer: Any, sequence: "SampledSequence") -> str:
    """Returns the text without the token that ends it."""
    tokens = list(sequence.tokens)
    if tokens and sequence.stop_reason == "stop" and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return decode(tokenizer, tokens)


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise InvalidData("give a prompt with --prompt, or pipe one to stdin")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData("stdin is not UTF-8 text: encode it as UTF-8") from error
