"""Take probability from answers that contradict stated facts, as the solver Z3 finds in a worker process.

The data has every question with both answers, so a model that learns them gives each half of the probability. Then it
goes on with the same data and the term, which reads facts and answer of each datum from its text, and asks Z3 whether
they can be true together.

Needs `pip install -e '.[local,processes]'` and `pip install z3-solver`. Runs on the embedded
service, or on TINKER_BASE_URL with TINKER_API_KEY.
"""

import asyncio
import re

import torch
import z3

from tinkex_py import AdamParams, AsyncServiceClient, RegularizerSpec, per_datum
from tinkex_py.base_losses import NLL
from tinkex_py.data import text_datum

STEPS = 16
STORIES = [
    ("Ann is older than Bob. Bob is older than Cy.", "Ann", "Cy"),
    ("Dan is older than Eve. Fay is older than Dan.", "Fay", "Eve"),
    ("Ida is older than Jo. Gus is older than Hal. Hal is older than Ida.", "Gus", "Jo"),
]


def make_data(tokenizer):
    pairs = []
    for facts, older, younger in STORIES:
        prompt = f"{facts} Who is older, {min(older, younger)} or {max(older, younger)}? "
        pairs += [(prompt, older), (prompt, younger)]
    return [text_datum(tokenizer, answer, prompt=prompt, append_end=False) for prompt, answer in pairs]


def contradicts(text):
    """Returns whether the answer at the end of a text cannot be true if the facts before the question are."""
    facts = re.findall(r"(\w+) is older than (\w+)\.", text)
    ((first, second, older),) = re.findall(r"Who is older, (\w+) or (\w+)\? (\w+)", text)
    claim = (older, second if older == first else first)
    solver = z3.Solver()
    solver.add(*(z3.Int(one) > z3.Int(other) for one, other in [*facts, claim]))
    return solver.check() == z3.unsat


def contradiction(data, logprobs, tokenizer):
    """Mean of -log(1 - p) over the answers that contradict the facts, where p is the probability of the answer."""
    right, wrong = [], []
    for datum, own in zip(data, logprobs, strict=True):
        targets, is_answer = (datum.loss_fn_inputs[name].to_torch() for name in ("target_tokens", "weights"))
        text = tokenizer.decode([datum.model_input.to_ints()[0], *targets.tolist()])
        (wrong if contradicts(text) else right).append((own * is_answer).sum().exp())
    rejected = torch.stack(wrong)
    metrics = {"wrong": rejected.mean(), "right": torch.stack(right).mean(), "contradictions": len(wrong)}
    return -torch.log1p(-rejected).mean(), metrics


async def main():
    async with AsyncServiceClient.from_env(local="tiny") as service:
        model = (await service.get_server_capabilities()).supported_models[0].model_name
        training = await service.create_lora_training_client(model, rank=16, seed=0)
        tokenizer = await training.get_tokenizer()
        data = make_data(tokenizer)
        nll = NLL(mask="weights", reduction="token-mean")

        seen = []
        for weight in [0.0] * STEPS + [5.0] * STEPS:
            logic = RegularizerSpec(
                fn=per_datum(contradiction),
                weight=weight,
                options={"tokenizer": tokenizer},
                runs_in="process",
                timeout=20.0,
            )
            output, _ = await asyncio.gather(
                training.forward_backward_custom(data, nll, regularizers=[logic]),
                training.optim_step(AdamParams(learning_rate=5e-3)),
            )
            term = output.regularizers["contradiction"]
            seen.append(term.custom_metrics)
            if len(seen) % 2 == 0:
                print(
                    f"step {len(seen):2}  weight {weight}  loss {output.base_loss.value:.3f}  "
                    f"right answers {seen[-1]['right']:.3f}  wrong answers {seen[-1]['wrong']:.3f}"
                )
    before, after = seen[STEPS - 1], seen[-1]
    print(f"Z3 finds {after['contradictions']} contradictions in {len(data)} answers")
    print(f"probability of answers that contradict the facts: {before['wrong']:.3f} -> {after['wrong']:.3f}")
    print(f"probability of the others: {before['right']:.3f} -> {after['right']:.3f}")


if __name__ == "__main__":
    asyncio.run(main())
