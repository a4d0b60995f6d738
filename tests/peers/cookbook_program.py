"""Runs recipes of tinker-cookbook, unmodified, against a service, with the Python of its venv.

python cookbook_program.py BASE_URL API_KEY BASE_MODEL GRADIENT_VIEW [--regularized] [METHOD ...]

Prints one JSON line per recipe. The current folder contains the model under its name, so that the recipes find its
tokenizer; this package is on PYTHONPATH. The data sets of the Hub are replaced by rows of the same form, and rewards by
some that a random model can earn. With `--regularized`, the recipes run under `regularize_recipe` with an L2 term, and
what it recorded is checked, too.
"""

import asyncio
import json
import math
import os
import sys
import traceback
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import chz
import numpy as np
import tinker
from cookbook_data import messages  # before the recipes: it replaces datasets.load_dataset
from cookbook_support import (
    API_KEY,
    BASE_URL,
    MODEL,
    OPTIONS,
    REGULARIZED,
    STEPS,
    adapter,
    check,
    check_equal,
    check_falls,
    check_on_policy,
    check_record,
    check_rewarded,
    l2,
    largest_difference,
    logs,
    run,
)
from flows import report
from recipes import RECIPES
from tinker_cookbook import checkpoint_utils
from tinker_cookbook.recipes import rl_basic, rl_loop, sl_basic, sl_loop
from tinker_cookbook.recipes.chat_sl import train as chat_sl
from tinker_cookbook.recipes.distillation import (
    off_policy_reasoning,
    on_policy_distillation,
    on_policy_multi_teacher,
)
from tinker_cookbook.recipes.math_rl import train as math_rl
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticEnv
from tinker_cookbook.recipes.math_rl.math_env import MathEnv
from tinker_cookbook.recipes.multiplayer_rl.guess_number import train as guess_number
from tinker_cookbook.recipes.multiplayer_rl.twenty_questions import train as twenty_questions
from tinker_cookbook.recipes.preference.dpo import train as dpo
from tinker_cookbook.recipes.preference.rlhf import rlhf_pipeline
from tinker_cookbook.recipes.preference.shorter import train as shorter
from tinker_cookbook.recipes.prompt_distillation import train as prompt_distillation
from tinker_cookbook.recipes.sdft import train as sdft
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

from tinkex_py import AdamParams, AsyncServiceClient
from tinkex_py.integrations.tinker import regularize_recipe

RENDERER, RANK = "qwen3_instruct", 8
COMMON = {"model_name": MODEL, "behavior_if_log_dir_exists": "raise"}
_FEW = {"max_tokens": 6, "max_steps": STEPS, "eval_every": 0, "save_every": 0}


# Supervised


def basic_config(name: str, **changes: Any) -> Any:
    """The config of the recipe sl_basic: 2 batches of 128 rows."""
    config = sl_basic.build_config_blueprint(MODEL).make()
    return chz.replace(config, log_path=logs(name), lora_rank=RANK, learning_rate=1e-2, **changes)


def start() -> str:
    """Returns the state of a model with a known seed, from which several runs begin."""
    training = tinker.ServiceClient().create_lora_training_client(base_model=MODEL, rank=RANK, seed=1)
    return training.save_state("start").result().path


def trained_weights(name: str, state: str) -> dict[str, np.ndarray]:
    """Runs sl_basic from a state, and returns the weights at its end."""
    asyncio.run(sl_basic.train.main(basic_config(name, load_checkpoint_path=state)))
    return adapter(checkpoint_utils.get_last_checkpoint(logs(name)).state_path)


async def own_weights(state: str) -> dict[str, np.ndarray]:
    """The same run in our own client, with the L2 term."""
    config = basic_config("own")
    dataset, _ = config.dataset_builder()
    dataset.set_epoch(seed=0)
    async with AsyncServiceClient(base_url=BASE_URL, api_key=API_KEY) as service:
        training = await service.create_training_client_from_state(state)
        for step in range(len(dataset)):
            part = compute_schedule_lr_multiplier(lr_schedule="linear", step=step, total_steps=len(dataset))
            await training.forward_backward_custom(dataset.get_batch(step), "cross_entropy", regularizers=l2())
            await training.optim_step(
                AdamParams(learning_rate=config.learning_rate * part, beta1=0.9, beta2=0.95, eps=1e-8)
            )
        saved = await training.save_state("own")
    return await asyncio.to_thread(adapter, saved.path)


# Reinforcement learning


def math_config(name: str, **changes: Any) -> Any:
    config = math_rl.CLIConfig(
        **COMMON, **_FEW, log_path=logs(name), lora_rank=RANK, group_size=4, groups_per_batch=4, learning_rate=1e-3
    )
    return chz.replace(config, **changes)


def rl_config(name: str, *, batch_size: int, batches: int, **changes: Any) -> Any:
    """A config of rl.train with the environment of math_rl."""
    builder = math_rl.get_dataset_builder("arithmetic", batch_size, MODEL, RENDERER, group_size=8)
    return rl_train.Config(
        model_name=MODEL,
        recipe_name=name,
        renderer_name=RENDERER,
        dataset_builder=chz.replace(builder, n_batches=batches),
        log_path=logs(name),
        lora_rank=RANK,
        **{**_FEW, "max_steps": batches, **changes},
    )


def distillation_config(name: str) -> dict[str, Any]:
    return {**COMMON, **_FEW, "group_size": 2, "log_path": logs(name), "lora_rank": RANK, "learning_rate": 1e-3}


def replace_rewards() -> None:
    """Makes about half of the answers of a random model right: those whose second letter is before "n", or missing."""

    def is_right(answer: str) -> bool:
        return answer[1:2].lower() < "n"

    for environment in (ArithmeticEnv, MathEnv):
        environment.check_answer = lambda _self, answer: is_right(answer)
    rl_loop.get_reward = lambda answer, _expected: float(is_right(answer))


class Recipes:
    """A method for each row of the table."""

    def sl_basic(self) -> None:
        rows = run("sl_basic", sl_basic.main, basic_config("sl_basic"), steps=(2,))
        check_falls(rows, "train_mean_nll")

    def same_weights(self) -> None:
        state = start()
        plain = trained_weights("plain", state)
        with regularize_recipe([]) if REGULARIZED else nullcontext():
            again = trained_weights("again", state)
        check_equal(plain, again, 1e-6)
        if REGULARIZED:
            with regularize_recipe(l2()):
                penalized = trained_weights("penalized", state)
            check(largest_difference(plain, penalized) > 1e-3, "the L2 term changes nothing")
            check_equal(penalized, asyncio.run(own_weights(state)), 1e-5)

    def chat_sl(self) -> None:
        config = chat_sl.CLIConfig(
            **{**COMMON, "behavior_if_log_dir_exists": "resume"},
            log_path=logs("chat_sl"),
            dataset="no_robots",
            batch_size=64,
            learning_rate=1e-2,
            lora_rank=RANK,
            save_every=2,
        )
        rows = run("chat_sl", chat_sl.cli_main, config, steps=(4,))
        check([row["step"] for row in rows] == [0, 1, 2, 3], f"the steps are {[row['step'] for row in rows]}")
        before = [row["train_mean_nll"] for row in rows]
        record = Path("records") / "chat_sl"
        with regularize_recipe(l2(), step=4, record=record) if REGULARIZED else nullcontext():
            chat_sl.cli_main(chz.replace(config, num_epochs=2))
        if REGULARIZED:
            check_record(record, 8)
        rows = [json.loads(line) for line in (Path(logs("chat_sl")) / "metrics.jsonl").read_text().splitlines()]
        check([row["step"] for row in rows] == [*range(8)], f"the steps are {[row['step'] for row in rows]}")
        check(rows[4]["train_mean_nll"] < before[0], f"it begins again: {before}, then {rows[4]['train_mean_nll']}")

    def sl_loop(self) -> None:
        config = sl_loop.Config(
            model_name=MODEL,
            log_path=logs("sl_loop"),
            batch_size=32,
            learning_rate=1e-2,
            lora_rank=RANK,
            max_steps=STEPS,
        )
        check_falls(run("sl_loop", sl_loop.main, config), "train_mean_nll")

    def prompt_distillation(self) -> None:
        file = Path("conversations.jsonl")
        file.write_text("".join(json.dumps({"messages": messages("en")}) + "\n" for _ in range(96)))
        config = prompt_distillation.CLIConfig(
            **COMMON,
            file_path=str(file),
            log_path=logs("prompt_distillation"),
            batch_size=32,
            num_epochs=1,
            learning_rate=1e-2,
            lora_rank=RANK,
        )
        check_falls(run("prompt_distillation", prompt_distillation.cli_main, config), "train_mean_nll")

    def off_policy_reasoning(self) -> None:
        config = off_policy_reasoning.CLIConfig(
            **COMMON,
            renderer_name=RENDERER,
            log_path=logs("off_policy_reasoning"),
            batch_size=16,
            buffer_size=32,
            max_prompts=64,
            learning_rate=1e-2,
            lora_rank=RANK,
            max_steps=STEPS,
        )
        check_falls(run("off_policy_reasoning", off_policy_reasoning.cli_main, config), "train_mean_nll")

    def dpo(self) -> None:
        config = dpo.CLIConfig(
            **COMMON, log_path=logs("dpo"), batch_size=32, learning_rate=1e-2, dpo_beta=0.1, max_steps=STEPS
        )
        rows = run("dpo", dpo.cli_main, config)
        first = rows[0]["dpo_loss"]
        check(math.isclose(first, math.log(2), abs_tol=1e-4), f"the first loss is {first}")
        check_falls(rows, "dpo_loss")

    def math_rl(self) -> None:
        check_on_policy(run("math_rl", math_rl.cli_main, math_config("math_rl", loss_fn="importance_sampling")))

    def math_rl_ppo(self) -> None:
        check_on_policy(run("ppo", math_rl.cli_main, math_config("ppo", loss_fn="ppo")))

    def math_rl_cispo(self) -> None:
        check_on_policy(run("cispo", math_rl.cli_main, math_config("cispo", loss_fn="cispo")))

    def kl_penalty(self) -> None:
        penalty = {"kl_penalty_coef": 0.1, "kl_reference_config": rl_train.KLReferenceConfig(base_model=MODEL)}
        config = rl_config(
            "kl_penalty", batch_size=4, batches=STEPS, learning_rate=1e-3, loss_fn="ppo", num_substeps=2, **penalty
        )
        rows = run("kl_penalty", rl_train.main, config, steps=(2 * STEPS,))
        check_rewarded(rows)
        check(abs(rows[0]["kl_policy_base"]) < 1e-5, f"a new adapter differs from its base: {rows[0]}")

    def math_rl_async(self) -> None:
        # It drops what it samples while it ends, so that it makes fewer steps.
        rows = run("async", math_rl.cli_main, math_config("async", max_steps_off_policy=1), steps=None)
        check_rewarded(rows)

    def math_rl_stream(self) -> None:
        stream = rl_train.StreamMinibatchConfig(groups_per_batch=4, num_minibatches=2)
        check_rewarded(run("stream", math_rl.cli_main, math_config("stream", stream_minibatch_config=stream)))

    def easy_reward(self) -> None:
        config = rl_config("easy_reward", batch_size=16, batches=12, learning_rate=1e-2, max_tokens=4)
        rows = run("easy_reward", rl_train.main, config, steps=(12,))
        correct = [row["env/all/correct"] for row in rows]
        check(correct[-1] > min(correct[0] + 0.2, 0.95), f"the share of correct answers is {correct}")

    def rl_basic(self) -> None:
        config = rl_basic.build_config_blueprint(MODEL).make()
        builder = chz.replace(config.dataset_builder, batch_size=4, group_size=4)
        limits = {**_FEW, "lora_rank": RANK}
        run(
            "rl_basic", rl_basic.main, chz.replace(config, log_path=logs("rl_basic"), dataset_builder=builder, **limits)
        )

    def rl_loop(self) -> None:
        config = rl_loop.Config(
            model_name=MODEL,
            log_path=logs("rl_loop"),
            batch_size=4,
            group_size=4,
            max_tokens=6,
            lora_rank=RANK,
            max_steps=STEPS,
        )
        run("rl_loop", rl_loop.main, config)

    def on_policy_distillation(self) -> None:
        config = on_policy_distillation.CLIConfig(
            **distillation_config("on_policy"), teacher_model=MODEL, groups_per_batch=4
        )
        rows = run("on_policy", on_policy_distillation.cli_main, config)
        check(abs(rows[0]["teacher_kl"]) < 1e-5, f"a new adapter differs from its base: {rows[0]}")

    def multi_teacher(self) -> None:
        config = on_policy_multi_teacher.CLIConfig(
            **distillation_config("multi_teacher"),
            deepmath_teacher_model=MODEL,
            tulu3_teacher_model=MODEL,
            deepmath_groups_per_batch=2,
            tulu3_groups_per_batch=2,
        )
        run("multi_teacher", on_policy_multi_teacher.cli_main, config)

    def sdft(self) -> None:
        run("sdft", sdft.cli_main, sdft.CLIConfig(**distillation_config("sdft"), groups_per_batch=4, topk=5))

    def shorter(self) -> None:
        config = shorter.CLIConfig(
            **COMMON,
            renderer_name=RENDERER,
            log_path=logs("shorter"),
            batch_size=2,
            group_size=4,
            max_tokens=6,
            max_steps=STEPS,
            eval_every=0,
        )
        run("shorter", shorter.cli_main, config)

    def rlhf(self) -> None:
        config = rlhf_pipeline.CLIConfig(
            base_model=MODEL,
            short_name="tiny",
            lora_rank=RANK,
            batch_size=4,
            rl_max_tokens=6,
            rl_group_size=2,
            save_every=0,
            eval_every=0,
            max_steps=STEPS,
        )
        run("rlhf", rlhf_pipeline.cli_main, config, steps=(STEPS,) * 3)

    def guess_number(self) -> None:
        config = guess_number.CLIConfig(
            **COMMON,
            renderer_name=RENDERER,
            log_path=logs("guess_number"),
            batch_size=2,
            group_size=2,
            max_tokens=6,
            max_steps=STEPS,
            eval_every=0,
        )
        run("guess_number", rl_train.main, guess_number.build_config(config))

    def twenty_questions(self) -> None:
        cli = twenty_questions.CLIConfig(
            **COMMON,
            renderer_name=RENDERER,
            log_path=logs("twenty_questions"),
            batch_size=2,
            group_size=2,
            max_tokens=6,
            max_steps=STEPS,
            eval_every=0,
        )
        config = twenty_questions.build_config(cli)
        builder = chz.replace(config.dataset_builder, answerer_base_model=MODEL)
        run("twenty_questions", rl_train.main, chz.replace(config, dataset_builder=builder))

    def download(self) -> None:
        training = tinker.ServiceClient().create_lora_training_client(base_model=MODEL, rank=RANK, seed=2)
        state, plain = training.save_state("state").result(), training.save_weights_external("plain").result()
        check_equal(adapter(state.path), adapter(plain.path), 0.0)


def main() -> None:
    os.environ.update(
        TINKER_BASE_URL=BASE_URL,
        TINKER_API_KEY=API_KEY,
        TINKER_COOKBOOK_RUNS_DIR=str(Path("runs").resolve()),
        HF_HUB_OFFLINE="1",
    )
    replace_rewards()
    recipes = Recipes()
    wanted = {option for option in OPTIONS if not option.startswith("--")}
    for row, method in RECIPES.items():
        if wanted and method not in wanted:
            continue
        try:
            with redirect_stdout(sys.stderr):
                getattr(recipes, method)()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a row of the table
            traceback.print_exc()
            report(row, "fail", f"{type(error).__name__}: {error}"[:400])
        else:
            report(row, "pass")


if __name__ == "__main__":
    main()
