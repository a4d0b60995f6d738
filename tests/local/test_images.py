"""Vision-language models on the embedded service: training and sampling equal plain transformers."""

import asyncio
import base64
import io
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_vision import IMAGE_TOKENS, library, picture, qwen2_vl, save_llava
from tinkex_py import (
    AsyncServiceClient,
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    InvalidData,
    LoraConfig,
    ModelInput,
    RegularizerSpec,
    RequestFailed,
    SamplingParams,
    TinkexConfig,
)
from tinkex_py.data import image_tokens
from tinkex_py.data.images import MAX_PIXELS, processed
from tinkex_py.local import LocalOptions
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.data import EncodedDatum, EncodedImage, EnginePass, SampleRequest
from tinkex_py.local.engine import Engine
from tinkex_py.local.graphs import fingerprint
from tinkex_py.local.images import ImageReader
from tinkex_py.local.losses import find_loss
from tinkex_py.local.models import LoadedModel, load_model, quiet_loading
from tinkex_py.local.passes import prepare
from tinkex_py.local.records import TrainingRunInfo
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.regularizers import L2

pytestmark = pytest.mark.asyncio
RANK = 4
SCALE = 32 / RANK
TEXTS = [("see ", " a cat"), ("no image", " at all"), ("two: ", " and ", " differ")]
PICTURES = [[picture(1)], [], [picture(2, 30, 20), picture(3)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    save_llava(made)
    return made


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def parts(index: int, count: int) -> list[Any]:
    """The texts of an example with its images between them, as bytes of tokens."""
    texts, images = TEXTS[index], PICTURES[index]
    found: list[Any] = [list(texts[0].encode())]
    for image, text in zip(images, texts[1:], strict=False):
        found += [ImageChunk.of(image, expected_tokens=count), list(text.encode())]
    return found if images else [list("".join(texts).encode())]


def datums() -> list[Datum]:
    """The last three tokens of each example are learned."""
    made: list[Datum] = []
    for index in range(len(TEXTS)):
        whole = ModelInput.from_parts(*parts(index, IMAGE_TOKENS))
        last = whole.chunks[-1]
        assert isinstance(last, EncodedTextChunk)
        prompt = ModelInput(chunks=(*whole.chunks[:-1], EncodedTextChunk(tokens=last.tokens[:-3])))
        made.append(Datum.from_tokens(prompt, last.tokens[-3:]))
    return made


@asynccontextmanager
async def connected(run_service: Any, folder: Path) -> AsyncIterator[tuple[AsyncServiceClient, Any]]:
    async with run_service(LocalOptions(model=str(folder), device="cpu", hold_seconds=5)) as raw:
        config = TinkexConfig(base_url="http://local", api_key="tml-x")
        async with AsyncServiceClient(config, http_client=raw.http) as service:
            yield service, raw.service.core


class Plain:
    """The same model in transformers alone: its processor makes the inputs of whole texts."""

    def __init__(self, folder: Path) -> None:
        with quiet_loading():
            self.processor = library.AutoProcessor.from_pretrained(str(folder))
            network = library.AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)
        self.network = network.eval()

    def inputs(self, index: int) -> Any:
        texts, images = TEXTS[index], PICTURES[index]
        text = "<image>".join(texts) if images else "".join(texts)
        return self.processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt")

    def logprobs(self, index: int) -> torch.Tensor:
        """Of the last three tokens."""
        inputs = self.inputs(index)
        every = self.network(**inputs).logits[0, :-1].log_softmax(-1)
        return every.gather(-1, inputs["input_ids"][0, 1:, None])[-3:, 0]


async def test_losses_and_gradients_equal_plain_transformers(run_service, folder):
    """With weights W + s B A and B = 0: dL/dB = s dL/dW A^T, and dL/dA = 0."""
    plain = Plain(folder)
    total = sum(-plain.logprobs(index).sum() + 0.1 * plain.logprobs(index).square().sum() for index in range(3))
    total.backward()

    def nll(data: Sequence[Datum], logprobs: Logprobs) -> torch.Tensor:
        weights = torch.cat([datum.loss_fn_inputs["weights"].to_torch() for datum in data])
        return -(logprobs * weights).sum()

    async with connected(run_service, folder) as (service, core):
        training = await service.create_lora_training_client(rank=RANK, seed=1)
        base = await training.forward(datums())
        terms = [RegularizerSpec(fn=L2(mask="weights"), weight=0.1, name="l2")]
        out = await training.forward_backward_custom(datums(), nll, regularizers=terms)
        saved = core.store.find((await training.save_state("start")).path)
        matrices = load_file(core.store.file(saved, "adapter_model.safetensors"))
        held = core.engine.gradient(training.model_id)
    assert base.metrics["loss:sum"] == pytest.approx(
        -sum(plain.logprobs(index).sum().item() for index in range(3)), rel=1e-4
    )
    assert out.loss_total == pytest.approx(total.item(), rel=1e-4)
    assert {key.split(".")[3] for key in held if "lm_head" not in key} == {"language_model"}
    for key, gradient in held.items():
        if "lora_A" in key:
            assert not gradient.any()
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        wanted = plain.network.get_submodule(name).weight.grad
        assert wanted.abs().max() > 0
        expected = SCALE * wanted @ matrices[key.replace("lora_B", "lora_A")].T
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


async def test_an_image_is_not_learned_without_weights_either(run_service, folder):
    """Left out, the weights are 1 for text, as labels of transformers are -100 for images."""
    plain = Plain(folder)
    inputs = plain.inputs(0)
    ids = inputs["input_ids"][0]
    every = plain.network(**inputs).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    (datum, *_) = datums()
    bare = Datum(model_input=datum.model_input, loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"]})
    async with connected(run_service, folder) as (service, _):
        training = await service.create_lora_training_client(rank=RANK)
        loss = (await training.forward([bare])).metrics["loss:sum"]
    assert loss == pytest.approx(-every[ids[1:] != 258].sum().item(), rel=1e-5)


async def test_the_service_alone_may_know_the_length_of_an_image(run_service, folder):
    (datum, *_) = datums()
    chunks = [
        ImageChunk(data=chunk.data) if isinstance(chunk, ImageChunk) else chunk for chunk in datum.model_input.chunks
    ]
    unknown = Datum(model_input=ModelInput(chunks=tuple(chunks)), loss_fn_inputs=datum.loss_fn_inputs)
    async with connected(run_service, folder) as (service, _):
        training = await service.create_lora_training_client(rank=RANK)
        known, found = [(await training.forward([one] * 2)).metrics for one in (datum, unknown)]
        step = await training.forward_backward_custom([unknown] * 2, lambda _, logprobs: -logprobs.mean())
    assert found["loss:sum"] == known["loss:sum"]
    assert step.logprob_difference_largest == 0.0


async def test_samples_equal_plain_transformers_whatever_else_is_sampled(run_service, folder):
    plain = Plain(folder)
    wanted: list[list[int]] = []
    for index in range(3):
        inputs, tokens = dict(plain.inputs(index)), list[int]()
        for _ in range(6):
            tokens.append(int(plain.network(**inputs).logits[0, -1].argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[-1:]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        wanted.append(tokens)
    async with connected(run_service, folder) as (service, _):
        sampler = await service.create_sampling_client()
        params = SamplingParams(max_tokens=6, temperature=0.0, stop=[])
        drawn = await asyncio.gather(
            *[
                sampler.sample(
                    ModelInput.from_parts(*parts(index, IMAGE_TOKENS)), num_samples=2, sampling_params=params
                )
                for index in (0, 1, 2, 1, 0)
            ]
        )
    for index, response in zip((0, 1, 2, 1, 0), drawn, strict=True):
        assert [sequence.tokens for sequence in response.sequences] == [wanted[index]] * 2


def prompt_of(*chunks: Any) -> ModelInput:
    return ModelInput(chunks=(EncodedTextChunk(tokens=[1]), *chunks, EncodedTextChunk(tokens=[2])))


WIDE = png(picture(1).resize((MAX_PIXELS // 1024 + 1, 1024)))
REFUSED = {
    "no image": (prompt_of(ImageChunk(data=b"private", format="png", expected_tokens=4)), "cannot be read"),
    "cut off": (prompt_of(ImageChunk(data=png(picture(1))[:90], expected_tokens=4)), "cannot be read"),
    "too large": (prompt_of(ImageChunk(data=WIDE, expected_tokens=4)), f"more than {MAX_PIXELS}"),
    "other length": (prompt_of(ImageChunk(data=png(picture(1)), expected_tokens=5)), "makes 4 tokens"),
    "pointer": (prompt_of(ImageAssetPointerChunk(location="x", format="png", expected_tokens=1)), "text and images"),
    "audio": (prompt_of(DmelChunk(dmel=bytes([0, 1, 1]))), "text and images only, not 'dmel'"),
    "a mark in the text": (
        prompt_of(ImageChunk.of(picture(1), expected_tokens=4), EncodedTextChunk(tokens=[258])),
        "token 258, which stands for an image",
    ),
}


async def test_what_cannot_be_read_is_the_users_error_and_the_service_goes_on(run_service, folder):
    one = SamplingParams(max_tokens=1)
    async with connected(run_service, folder) as (service, _):
        sampler, training = await service.create_sampling_client(), await service.create_lora_training_client(rank=RANK)
        for name, (bad, reason) in REFUSED.items():
            with pytest.raises(RequestFailed, match=reason) as caught:
                await sampler.sample(bad, sampling_params=one)
            assert caught.value.category == "user", name
            assert "private" not in str(caught.value)
            if name != "pointer":  # which the client does not send
                with pytest.raises(RequestFailed, match=reason):
                    await training.forward_backward([Datum.from_tokens(bad, [3])])
        assert (await training.forward_backward(datums())).num_datums == 3


async def test_the_processor_counts_the_tokens_of_images(folder):
    processor = library.AutoProcessor.from_pretrained(str(folder))
    made = ModelInput.from_parts(
        "a", picture(1), "b", tokenizer=processor.tokenizer, image_tokens=image_tokens(processor)
    )
    assert [chunk.length for chunk in made.chunks] == [1, IMAGE_TOKENS, 1]
    with pytest.raises(InvalidData, match="must be a Hugging Face processor"):
        image_tokens(processor.tokenizer)


async def test_json_holds_the_same_image(client):
    """A model of text refuses it by name, and data that is no base64 is an error of the client's."""
    chunk = {"type": "image", "data": base64.b64encode(b"x").decode(), "format": "png"}
    body = {"base_model": "tiny", "prompt": {"chunks": [chunk]}}
    assert "reads text only, not 'image'" in (await client.done("asample", body))["error"]
    for data in ("*", 3, None):
        body["prompt"] = {"chunks": [{**chunk, "data": data}]}
        assert "base64" in (await client.done("asample", body))["error"]


async def test_passes_with_other_pixels_share_no_graph(folder, tmp_path):
    model = load_model(str(folder), "cpu", tmp_path)
    tokens = np.array([1, *[258] * 4])
    inputs = {"target_tokens": np.array([258, 258, 258, 258, 2])}
    keys = [
        fingerprint(
            prepare(
                [EncodedDatum(tokens, inputs, (EncodedImage(png(picture(seed)), 1, 4),))],
                find_loss("cross_entropy", {}),
                model,
            )
        )
        for seed in (1, 1, 2)
    ]
    assert keys[0] == keys[1] != keys[2]


async def test_positions_of_two_dimensions(tmp_path):
    """Qwen2-VL: training and sampling with the positions that its own `generate` uses, beside text alone."""
    network, processor = qwen2_vl()
    image = png(picture(4, 16, 24))
    seen = processed(processor, [image])
    before, after = [5, 6, 261], [262, 7, 8]
    count = seen["input_ids"].shape[1]
    ids = torch.tensor([[*before, *[259] * count, *after]])
    kinds = (ids == 259).int()
    given = {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
    wanted = network(input_ids=ids, mm_token_type_ids=kinds, **given).logits[0].log_softmax(-1).detach()
    generated = network.generate(
        input_ids=ids, mm_token_type_ids=kinds, **given, max_new_tokens=5, do_sample=False, eos_token_id=None
    )[0, ids.shape[1] :]
    text_generated = network.generate(
        input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, eos_token_id=None
    )[0, 3:]
    reader = ImageReader(processor, network)
    base = load_model("tiny", "cpu", tmp_path)
    model: LoadedModel = replace(
        base, name="qwen", network=network, vocabulary_size=263, context_length=256, images=reader
    )
    network.requires_grad_(False)
    store = CheckpointStore(tmp_path)
    engine = Engine(model, store, LocalOptions(), threading.Event())
    place = (EncodedImage(image, 3, count),)
    engine.create_model(
        TrainingRunInfo.model_validate(
            {"run_id": "s:train:0", "base_model": "qwen", "rank": 4, "created": "2026-01-01T00:00:00Z"}
            | dict.fromkeys(("train_unembed", "train_mlp", "train_attn"), True)
        ),
        LoraConfig(rank=4),
        1,
    )
    targets = ids[0].roll(-1).numpy()
    result = engine.run_pass(
        "s:train:0",
        EnginePass(
            lambda: [EncodedDatum(ids[0].numpy(), {"target_tokens": targets}, place)], "cross_entropy", {}, True
        ),
    )
    np.testing.assert_allclose(
        result.logprobs[0], wanted.gather(-1, torch.tensor(targets)[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    shown = engine.sample_batch([SampleRequest(ids[0].numpy(), place, max_tokens=5, temperature=0.0)])
    plain = engine.sample_batch([SampleRequest(np.array([5, 6, 7]), max_tokens=5, temperature=0.0)])
    unfinished = [shown, plain]
    while unfinished:  # in turns, as the queue does
        unfinished = [batch for batch in unfinished if not engine.draw(None, batch, 1)]
    assert shown.results()[0].sequences[0].tokens.tolist() == generated.tolist()
    assert plain.results()[0].sequences[0].tokens.tolist() == text_generated.tolist()
    store.close()
