"""Add a regularizer to a recipe of the tinker-cookbook, without a change of the recipe.

The same supervised recipe runs three times from the same initial weights: as it is, with a regularizer of weight 0,
which only measures, and with one that pulls the logprobs of the answers' tokens together. Runs against `tinkex-py
serve --model tiny`, which it starts, or against TINKER_BASE_URL with TINKER_API_KEY. Writes into the folder
`cookbook_runs`; `tinkex-py report cookbook_runs/even-*` shows the recorded runs.
"""

# pyright: reportMissingImports=false
import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

import tinker
from official_sdk import some_service

from tinkex_py import RegularizerSpec, packed_field
from tinkex_py.integrations.tinker import regularize_recipe
from tinkex_py.runs import read_steps, scalars

try:
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
    from tinker_cookbook.tokenizer_utils import register_tokenizer
except ModuleNotFoundError:
    sys.exit("This example needs the tinker-cookbook: pip install tinker-cookbook")

ROWS = Path(__file__).parent / "data" / "instructions.jsonl"
FOLDER = Path("cookbook_runs")


def spread(data, logprobs):
    """The variance of the logprobs of the answers' tokens: an answer whose tokens are learned evenly costs less."""
    return logprobs[packed_field(data, "weights") > 0].var()


def write_conversations():
    """Writes our rows as the cookbook reads them."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    turns = [(("user", row["prompt"]), ("assistant", row["answer"])) for row in rows]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in turn]}) for turn in turns]
    FOLDER.mkdir()
    (FOLDER / "conversations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def config(name, model):
    dataset = FromConversationFileBuilder(
        file_path=str(FOLDER / "conversations.jsonl"),
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=model, renderer_name="role_colon", max_length=256, batch_size=16
        ),
    )
    return train.Config(
        log_path=str(FOLDER / "logs" / name),
        model_name=model,
        recipe_name="supervised",
        renderer_name="role_colon",
        dataset_builder=dataset,
        learning_rate=1e-2,
        num_epochs=2,
        lora_rank=16,
    )


def run_recipe(name, model):
    """Runs the recipe, whose messages go to a file. Returns its mean losses per token."""
    with (
        (FOLDER / f"{name}.txt").open("w", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        asyncio.run(train.main(config(name, model)))
    rows = (FOLDER / "logs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["train_mean_nll"] for row in rows]


def use_tokenizer_of_service(model):
    """Tells the cookbook, which knows the tokenizers of models on the Hub, the tokenizer of this one."""
    tokenizer = tinker.ServiceClient().create_lora_training_client(base_model=model).result().get_tokenizer()
    register_tokenizer(model, lambda: tokenizer)


def main():
    write_conversations()
    with some_service() as (address, key):
        os.environ |= {"TINKER_BASE_URL": address, "TINKER_API_KEY": key}  # where the recipe finds the service
        rest = tinker.RestClient(base_url=address, api_key=key)
        model = rest.get_server_capabilities().result().supported_models[0].model_name
        use_tokenizer_of_service(model)
        losses = run_recipe("as-it-is", model)
        print(f"as it is: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        for weight in (0.0, 10.0):
            name = f"even-{weight}"
            with regularize_recipe([RegularizerSpec(fn=spread, weight=weight, name="spread")], record=FOLDER / name):
                losses = run_recipe(name, model)
            spreads = [scalars(step)["term/spread/value"] for step in read_steps(FOLDER / name)]
            print(f"weight {weight}: loss {losses[0]:.4f} -> {losses[-1]:.4f}", end="  ")
            print(f"spread {spreads[0]:.4f} -> {spreads[-1]:.4f}")


if __name__ == "__main__":
    main()
