"""One job's training, with `tinkex_py.runs.train`."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tinkex_py import AdamParams, AsyncServiceClient, AsyncTrainingClient, Datum, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.data import text_datum
from tinkex_py.regularizers import L2, Entropy
from tinkex_py.runs import ProgressView, TrainedRun, TrainSettings, train
from training_service.models import Example, JobRequest, Regularizers


async def train_job(
    service: AsyncServiceClient, base_model: str, request: JobRequest, folder: Path, view: ProgressView
) -> TrainedRun:
    """Trains an adapter and writes the run's folder; the model is closed in any case."""
    async with made_model(service, base_model, request) as training:
        tokenizer = await training.get_tokenizer()
        data = [make_datum(tokenizer, example) for example in request.examples]

        def batches(start: int):
            size = min(request.batch_size, len(data))
            for number in range(start, request.steps):
                yield [data[(number * size + place) % len(data)] for place in range(size)]

        trained = await train(
            service,
            training,
            batches,
            make_pipeline(request.regularizers),
            folder=folder,
            optimizer=AdamParams(learning_rate=request.learning_rate),
            settings=TrainSettings(steps=request.steps, checkpoint_every=None),
            config={"seed": request.seed},
            progress=view,
        )
        await trained.training.aclose()  # differs from `training` if the run restarted from a checkpoint
        return trained


@contextlib.asynccontextmanager
async def made_model(
    service: AsyncServiceClient, base_model: str, request: JobRequest
) -> AsyncIterator[AsyncTrainingClient]:
    training = await service.create_lora_training_client(base_model, rank=request.rank, seed=request.seed)
    try:
        yield training
    finally:
        await training.aclose()


def make_pipeline(weights: Regularizers) -> Pipeline:
    l2 = L2(mask="weights", reduction="token-mean")
    entropy = Entropy(over="tokens", mask="weights", reduction="mean")
    specs = [
        RegularizerSpec(fn=l2, weight=weights.l2, name="l2", enabled=weights.l2 > 0),
        RegularizerSpec(fn=entropy, weight=weights.entropy, name="entropy", enabled=weights.entropy > 0),
    ]
    return Pipeline(NLL(reduction="token-mean"), specs)


def make_datum(tokenizer, example: Example) -> Datum:
    """Returns a datum in which only the answer's tokens have weight."""
    return text_datum(tokenizer, f"{example.answer}\n", prompt=f"{example.prompt}\n", append_end=False)
