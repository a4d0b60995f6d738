"""What `tinkex-py sample` does: find the tokenizer, draw, print."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import typer

from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.errors import ConfigError, UnsupportedFeature
from tinkex_py.types import ModelInput, SampledSequence, SamplingParams


@dataclass(frozen=True)
class Draw:
    """What to draw.

    Attributes:
        source: name of a base model, or path of a checkpoint.
        prompt: what the model continues.
        params: how to draw.
        count: how many sequences.
        chat: whether the prompt goes into the chat template, as a message of the user.
        tokenizer: name or folder of the tokenizer; None is that of the base model.
        in_process: whether the service is in this process, and has the tokenizer itself.
    """

    source: str
    prompt: str
    params: SamplingParams
    count: int
    chat: bool
    tokenizer: str | None
    in_process: bool

    @property
    def is_checkpoint(self) -> bool:
        """Whether the source is the path of a checkpoint."""
        return self.source.startswith("tinker://")


async def draw(wanted: Draw, service: AsyncServiceClient, *, as_json: bool) -> None:
    """Draws and prints the texts, or one line of JSON for each sequence; closes the service client.

    Raises:
        ConfigError: there is no tokenizer, or it has no chat template.
        TinkexError: as `AsyncSamplingClient.sample` raises.
    """
    async with aclosing(service):
        # First of all: to look for the tokenizer of a model that is not there may take minutes.
        sampler = await service.create_sampling_client(
            base_model=None if wanted.is_checkpoint else wanted.source,
            model_path=wanted.source if wanted.is_checkpoint else None,
        )
        tokenizer = await _tokenizer(wanted, service)
        prompt = ModelInput.from_ints(_prompt_tokens(wanted, tokenizer))
        response = await sampler.sample(prompt, num_samples=wanted.count, sampling_params=wanted.params)
    for number, sequence in enumerate(response.sequences, start=1):
        text = _text(sequence, tokenizer)
        if as_json:
            typer.echo(_Line(**sequence.model_dump(), text=text).model_dump_json(exclude_none=True))
        else:
            if wanted.count > 1:
                typer.echo(f"--- {number} ({sequence.stop_reason})")
            typer.echo(text)


class _Line(SampledSequence):
    """A sequence with its text."""

    text: str


async def _tokenizer(wanted: Draw, service: AsyncServiceClient) -> Any:
    name = wanted.tokenizer
    if name is None:
        name = wanted.source
        if wanted.is_checkpoint:
            name = (await service.create_rest_client().get_weights_info(wanted.source)).base_model
    if not wanted.in_process:
        # What `tinkex-py serve` serves under these names, no library knows by them.
        from tinkex_py.local.models import load_tokenizer

        own = await asyncio.to_thread(load_tokenizer, name)
        if own is not None:
            return own
    try:
        return await service.get_tokenizer(name)
    except UnsupportedFeature as error:
        raise ConfigError(f"no tokenizer {name!r} could be loaded; name another one with --tokenizer") from error


def _prompt_tokens(wanted: Draw, tokenizer: Any) -> list[int]:
    if not wanted.chat:
        return list(tokenizer.encode(wanted.prompt))
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"the tokenizer of {wanted.source} has no chat template: leave out --chat")
    message = {"role": "user", "content": wanted.prompt}
    return list(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"])


def _text(sequence: SampledSequence, tokenizer: Any) -> str:
    """The text without the token that ends it."""
    tokens = list(sequence.tokens)
    if tokens and sequence.stop_reason == "stop" and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return str(tokenizer.decode(tokens))
