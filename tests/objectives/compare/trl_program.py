"""Evaluates TRL's own functions on a batch. Runs in an environment of TRL's, without this package.

The losses are methods of trainers, so they are called with an object that has the settings, and a model whose logprobs
are those of the batch.

    python trl_program.py BATCH.json RESULT.json
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

Loss = Callable[[torch.Tensor], torch.Tensor]

ONE_PROCESS = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda values: values,
    gather_for_metrics=lambda values: values,
    reduce=lambda values, reduction: values,
)
GRPO_SETTINGS = {
    "use_bias_correction_kl": False,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "steps_per_generation": 1,
}


def trainer(**fields: Any) -> SimpleNamespace:
    common = {
        "accelerator": ONE_PROCESS,
        "aux_loss_enabled": False,
        "model": SimpleNamespace(training=False),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**common, **fields})


class Batch:
    """The batch, and functions of the logprobs `[rows, length]`."""

    def __init__(self, fields: dict[str, Any]) -> None:
        names = ("logprobs", "sampler", "reference", "advantages", "mask", "student", "teacher")
        for name in names:
            setattr(self, name, torch.tensor(fields[name], dtype=torch.float64))
        self.length = int(fields["length"])

    def grpo(self, cls: Any = GRPOTrainer, **settings: Any) -> Loss:
        args = SimpleNamespace(**{name: settings.pop(name, value) for name, value in GRPO_SETTINGS.items()})
        fields = {
            "args": args,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
            "use_vllm": False,
            "vllm_importance_sampling_correction": False,
            "current_gradient_accumulation_steps": 1,
            "max_completion_length": self.length,
            "_entropy_bonus_enabled": False,
            "get_gamma_weights": GRPOTrainer.get_gamma_weights,
            "get_off_policy_mask": GRPOTrainer.get_off_policy_mask,
            **settings,
        }
        ids = torch.zeros(self.mask.shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": self.mask,
            "advantages": self.advantages[:, 0],
            "old_per_token_logps": self.sampler,
            "ref_per_token_logps": self.reference,
            "num_items_in_batch": self.mask.sum(),
        }

        def loss(leaf: torch.Tensor) -> torch.Tensor:
            found = (leaf, torch.zeros_like(self.mask), None)
            own = trainer(_get_per_token_logps_and_entropies=lambda *_, **__: found, **fields)
            return cls._compute_loss(own, None, inputs)

        return loss

    def outputs(self, leaf: torch.Tensor) -> Callable[..., SimpleNamespace]:
        zeros = torch.zeros_like(self.mask)
        found = SimpleNamespace(
            log_probs=leaf * self.mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
        )
        return lambda **_: found

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """The completions behind a prompt of one token."""
        completion = torch.cat([torch.zeros_like(self.mask[:, :1]), self.mask], 1)
        ids = torch.zeros(completion.shape, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self.mask).sum(1)

    def dpo(self, *kinds: str, weights: tuple[float, ...] = (1.0,), label_smoothing: float = 0.0) -> Loss:
        """The first half of the rows are the chosen answers, the second half the rejected ones."""
        own = trainer(
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=kinds,
            loss_weights=weights,
            beta=0.5,
            label_smoothing=label_smoothing,
            use_weighting=False,
        )
        chosen, rejected = self.sums(self.reference).chunk(2)
        inputs = {**self.rows, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return lambda leaf: DPOTrainer._compute_loss(own, ModelOf(self.outputs(leaf)), inputs, False)

    def kto(self, leaf: torch.Tensor) -> torch.Tensor:
        half = len(self.mask) // 2
        inputs = {
            **self.rows,
            "label": torch.tensor([True] * half + [False] * half),
            "ref_logps": self.sums(self.reference),
            "ref_KL_logps": torch.zeros(len(self.mask)),
        }
        own = trainer(
            _compute_kl_logps=lambda model, batch: torch.full((len(self.mask),), 0.25, dtype=torch.float64),
            precompute_ref_logps=True,
            calculate_KL=True,
            loss_type="kto",
            beta=0.5,
            desirable_weight=1.5,
            undesirable_weight=0.5,
        )
        return KTOTrainer._compute_loss(own, ModelOf(self.outputs(leaf)), inputs, False)

    def cpo(self, kind: str, *, by_token: bool = False, **settings: float) -> Loss:
        own = trainer(**{"alpha": 0.0, "label_smoothing": 0.0, "loss_type": kind, **settings})

        def loss(leaf: torch.Tensor) -> torch.Tensor:
            scores = self.sums(leaf) / (self.mask.sum(1) if by_token else 1.0)
            return CPOTrainer.cpo_loss(own, *scores.chunk(2))[0].mean()

        return loss

    def orpo(self, leaf: torch.Tensor) -> torch.Tensor:
        """The likelihood of the chosen answers is ours: a mean over answers."""
        chosen, rejected = (self.sums(leaf) / self.mask.sum(1)).chunk(2)
        return -chosen.mean() - ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), chosen, rejected)[0].mean()

    def gkd(self, beta: float) -> Loss:
        labels = torch.where(self.mask > 0, 0, -100)
        return lambda leaf: GKDTrainer.generalized_jsd_loss(leaf, self.teacher, labels=labels, beta=beta)


class ModelOf:
    """A model that is called and is not being trained."""

    training = False

    def __init__(self, outputs: Callable[..., SimpleNamespace]) -> None:
        self._outputs = outputs

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return self._outputs(**inputs)


def main(batch_file: str, result_file: str) -> None:
    batch = Batch(json.loads(Path(batch_file).read_text()))
    sequence = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15}
    losses: dict[str, Loss] = {
        **{kind: batch.grpo(loss_type=kind) for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
        "delta": batch.grpo(loss_type="bnpo", delta=1.5),
        "cispo": batch.grpo(loss_type="cispo", epsilon_high=1.3),
        "sequence": batch.grpo(loss_type="grpo", **sequence),
        "luspo": batch.grpo(loss_type="luspo", **sequence),
        "beta": batch.grpo(loss_type="dapo", beta=0.3),
        "bias-corrected beta": batch.grpo(loss_type="dapo", beta=0.3, use_bias_correction_kl=True),
        "off-policy mask": batch.grpo(loss_type="dapo", off_policy_mask_threshold=0.02),
        "gmpo": batch.grpo(GMPOTrainer, epsilon_low=0.3, epsilon_high=0.4),
        **{kind: batch.dpo(kind) for kind in ("sigmoid", "hinge", "ipo")},
        "robust": batch.dpo("robust", label_smoothing=0.1),
        "sigmoid and sft": batch.dpo("sigmoid", "sft", weights=(1.0, 0.2)),
        "kto": batch.kto,
        "cpo": batch.cpo("sigmoid", beta=0.5),
        "cpo hinge": batch.cpo("hinge", beta=0.05),
        "simpo": batch.cpo("simpo", by_token=True, beta=2.0, simpo_gamma=0.5),
        "orpo": batch.orpo,
    }
    candidates = {f"gkd {beta}": batch.gkd(beta) for beta in (0.0, 0.25, 0.5, 1.0)}
    cases: dict[str, dict[str, Any]] = {}
    for found, values in ((losses, batch.logprobs), (candidates, batch.student)):
        for case, loss in found.items():
            leaf = values.clone().requires_grad_()
            value = loss(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
            cases[case] = {"loss": value.item(), "gradient": gradient.tolist()}
    Path(result_file).write_text(json.dumps({"version": trl.__version__, "cases": cases}))


if __name__ == "__main__":
    main(*sys.argv[1:])
