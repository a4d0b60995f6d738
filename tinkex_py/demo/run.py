"""The demo: loads a model, samples, trains, samples again and writes a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.text import Text

from tinkex_py.arguments import check_count, check_kind, check_path, check_text
from tinkex_py.client import AsyncServiceClient, AsyncTrainingClient
from tinkex_py.data import batches, with_reference
from tinkex_py.demo.files import default_file, new_run_folder
from tinkex_py.demo.losses import masked_nll, rarity_server, regularizers
from tinkex_py.losses import Pipeline
from tinkex_py.runs import TrainSettings, train
from tinkex_py.runs.pairs import Pair, make_datum, read_pairs, sample_answers
from tinkex_py.runs.report import write_report
from tinkex_py.runs.rich_progress import RichProgress
from tinkex_py.types import AdamParams, Datum, Tokenizer
from tinkex_py.unicode import plain_line, plain_text

HELD_OUT_PROMPTS = 2


@dataclass(frozen=True)
class DemoOptions:
    """Settings of a demo run; the command documents them. `data` None selects the data set of the project."""

    model: str = "smollm2"
    steps: int = 30
    batch_size: int = 8
    learning_rate: float = 5e-4
    rank: int = 16
    runs_dir: Path = Path("runs")
    data: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_text("model", self.model)
        for name in ("steps", "batch_size", "rank"):
            check_count(name, getattr(self, name), least=1)
        check_count("seed", self.seed, least=0)
        AdamParams(learning_rate=self.learning_rate)
        check_path("runs_dir", self.runs_dir)
        if self.data is not None:
            check_path("data", self.data)


class DemoSummary(BaseModel):
    """Result of a demo run; the losses are the totals of the first and the last step."""

    model_config = ConfigDict(frozen=True)

    first_loss: float
    last_loss: float
    steps: int
    folder: Path
    report: Path


async def run_demo(options: DemoOptions, console: Console) -> DemoSummary:
    """Fine-tunes the model on the data set, and shows progress and samples on the console."""
    check_kind("options", options, DemoOptions)
    check_kind("console", console, Console)
    adam = AdamParams(learning_rate=options.learning_rate)
    pairs = read_pairs(check_path("--data", options.data or default_file("instructions.jsonl")))
    held_out = read_pairs(default_file("held_out.jsonl"))[:HELD_OUT_PROMPTS]
    service = AsyncServiceClient.local(model=options.model)
    with console.status(Text(plain_line(f"loading {options.model}"))):
        await service.__aenter__()
    try:
        training = await service.create_lora_training_client(options.model, rank=options.rank, seed=options.seed)
        tokenizer = await training.get_tokenizer()
        await _show_samples(console, "before training", training, tokenizer, held_out)
        data = [make_datum(tokenizer, pair) for pair in pairs]
        folder = await _train(options, console, service, training, data, adam)
        await _show_samples(console, "after training", training, tokenizer, held_out)
    finally:
        await service.aclose()
    report = write_report([folder], folder / "report")
    (drawn,) = report.runs
    summary = DemoSummary(
        first_loss=drawn.first["loss/total"],
        last_loss=drawn.last["loss/total"],
        steps=drawn.steps,
        folder=folder,
        report=report.page,
    )
    for line in (
        f"charts in {summary.report}",
        f"loss {summary.first_loss:.4f} -> {summary.last_loss:.4f} in {summary.steps} steps, files in {folder}",
    ):
        console.print(plain_line(line), soft_wrap=True, markup=False)
    return summary


async def _train(
    options: DemoOptions,
    console: Console,
    service: AsyncServiceClient,
    training: AsyncTrainingClient,
    data: Sequence[Datum],
    adam: AdamParams,
) -> Path:
    with console.status(f"reference logprobs of the frozen model on {len(data)} datums"):
        # A new adapter does not change the output, so this is the base model.
        data = await with_reference(training, data)
    folder = new_run_folder(options.runs_dir)
    async with rarity_server(data) as rarity:
        await train(
            service,
            training,
            batches(data, options.batch_size, options.seed),
            Pipeline(masked_nll, regularizers(rarity), track_grad_norms=True),
            folder=folder,
            optimizer=adam,
            settings=TrainSettings(steps=options.steps, checkpoint_every=None),
            config={"seed": options.seed},
            progress=RichProgress(console),
        )
    return folder


async def _show_samples(
    console: Console, title: str, training: AsyncTrainingClient, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> None:
    console.rule(title, align="left")
    answers = await sample_answers(training, tokenizer, [pair.prompt for pair in pairs])
    for prompt, answer in answers.items():
        console.print(plain_text(prompt), style="bold", markup=False, highlight=False)
        console.print(f"  {answer!r}", markup=False, highlight=False)
