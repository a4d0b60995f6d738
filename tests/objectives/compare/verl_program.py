"""Evaluates verl's own functions on a batch. Runs in an environment of verl's, without this package.

python verl_program.py BATCH.json RESULT.json
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verl
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig, PolicyLossConfig

Cases = dict[str, dict[str, Any]]


def config_of(settings: dict[str, Any]) -> ActorConfig:
    inner = {one.name for one in dataclasses.fields(PolicyLossConfig)}
    policy_loss = PolicyLossConfig(**{name: value for name, value in settings.items() if name in inner})
    own = {name: value for name, value in settings.items() if name not in inner}
    needed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return ActorConfig(**needed, policy_loss=policy_loss, **own)


def main(batch_file: str, result_file: str) -> None:
    batch = json.loads(Path(batch_file).read_text())
    names = ("logprobs", "sampler", "reference", "advantages", "mask")
    logprobs, sampler, reference, advantages, mask = (torch.tensor(batch[name], dtype=torch.float64) for name in names)
    cases: Cases = {}

    def loss(case: str, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        leaf = logprobs.clone().requires_grad_()
        value = compute(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        cases[case] = {"loss": value.item(), "gradient": gradient.tolist()}

    def policy(case: str, name: str, mode: str, weights: torch.Tensor | None = None, **settings: Any) -> None:
        function, config = core_algos.get_policy_loss_fn(name), config_of(settings)
        # The total of "seq-mean-token-sum-norm" is a setting of the whole batch.
        config.global_batch_info.update(
            {"loss_scale_factor": batch["length"]} if mode == "seq-mean-token-sum-norm" else {}
        )
        loss(case, lambda leaf: function(sampler, leaf, advantages, mask, mode, config, weights)[0])

    higher = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e9}
    modes = ("token-sum", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    for mode in modes:
        policy(f"vanilla {mode}", "vanilla", mode, **higher)
    policy("vanilla dual", "vanilla", "token-mean", clip_ratio_c=1.5)
    policy("gpg", "gpg", "token-mean")
    policy("gspo", "gspo", "seq-mean-token-mean", clip_ratio_low=0.1, clip_ratio_high=0.15)
    policy("geo_mean", "geo_mean", "token-mean", clip_ratio_low=0.3, clip_ratio_high=0.4)
    policy("cispo", "cispo", "token-mean", clip_ratio_low=0.3, clip_ratio_high=0.4)
    policy("sapo", "sapo", "seq-mean-token-mean")
    policy("dro", "dro", "token-mean", dro_beta=0.3)
    policy("kl_cov", "kl_cov", "token-mean", kl_cov_ratio=0.2, ppo_kl_coef=0.5)
    policy("dppo_tv", "dppo_tv", "token-mean", clip_ratio_low=0.05, clip_ratio_high=0.04, clip_ratio_c=1e9)
    policy("dppo_kl", "dppo_kl", "token-mean", clip_ratio_low=0.02, clip_ratio_high=0.01, clip_ratio_c=1e9)

    log_ratio = logprobs - sampler
    for case, threshold, settings in (
        ("tis token", 1.2, {"rollout_is": "token"}),
        ("tis sequence", 1.2, {"rollout_is": "sequence"}),
        ("tis normalized", 1.2, {"rollout_is": "token", "rollout_is_batch_normalize": True}),
        ("icepop", "0.8_1.3", {"rollout_is": "token"}),
    ):
        weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
            log_ratio, mask, rollout_is_threshold=threshold, **settings
        )
        loss(
            case,
            lambda leaf, weights=weights: core_algos.compute_policy_loss_reinforce(
                sampler, leaf, advantages, mask, "token-mean", config_of({}), weights
            )[0],
        )
    for case, rule, threshold in (
        ("reject k3 mean", "seq_mean_k3", 0.06),
        ("reject k3 max", "seq_max_k3", 0.3),
        ("reject geometric", "seq_mean_k1", "0.8_1.25"),
        ("reject product", "seq_sum_k1", "0.5_2.0"),
        ("reject token", "token_k1", "0.8_1.25"),
    ):
        kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(log_ratio, mask, rule, threshold)
        # Our denominators count what is left out, so the sum is compared.
        loss(case, lambda leaf, kept=kept: core_algos.agg_loss(-advantages * leaf, kept, "token-sum"))

    for estimator in ("k1", "k2", "k3", "k3+", "abs"):
        loss(
            f"kl {estimator}",
            lambda leaf, estimator=estimator: core_algos.agg_loss(
                core_algos.kl_penalty(leaf, reference, estimator), mask, "token-mean"
            ),
        )

    rewards = torch.tensor(batch["rewards"], dtype=torch.float64)
    ones = torch.ones(len(rewards), 1, dtype=torch.float64)
    groups = np.array(batch["groups"])
    for case, compute, settings in (
        ("advantages std", core_algos.compute_grpo_outcome_advantage, {}),
        ("advantages none", core_algos.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}),
        ("advantages leave-one-out", core_algos.compute_rloo_outcome_advantage, {}),
    ):
        found, _ = compute(rewards.clone()[:, None], ones, groups, **settings)
        cases[case] = {"values": found[:, 0].tolist()}

    drift = rollout_corr_helper.compute_offpolicy_metrics(logprobs, sampler, mask)
    cases["drift"] = {"values": [drift[name] for name in ("kl", "k3_kl", "chi2_token", "chi2_seq", "ppl_ratio")]}
    Path(result_file).write_text(json.dumps({"version": verl.__version__, "cases": cases}))


if __name__ == "__main__":
    main(*sys.argv[1:])
