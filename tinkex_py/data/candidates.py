"""Datums with several candidate tokens per position, and a target distribution over them."""

from collections.abc import Sequence

import numpy as np

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData
from tinkex_py.types import Datum, ModelInput, TensorData
from tinkex_py.types.tensors import Array, TensorInput

# Targets may be float32 numbers, such as the output of another model.
_TOLERANCE = 1e-3


def candidates_datum(
    prompt: ModelInput | Sequence[int], candidate_ids: TensorInput, target_probs: TensorInput
) -> Datum:
    """Makes a datum of a prompt of `N` tokens and a distribution over `K` tokens that could follow it.

    `target_tokens`, `[N, K]`, has the candidates at every position. `weights`, `[N, K]`, has the target probabilities
    at the last position and 0 elsewhere, so that `base_losses.Choice` reads only this one.

    Args:
        prompt: the tokens before the choice.
        candidate_ids: the candidates, `[K]`, different token ids: the first token of each option.
        target_probs: the probability of each candidate, `[K]`, which add up to 1; 1 for the right one, 0 for the
            others.

    Raises:
        InvalidData: the prompt is empty, a candidate occurs twice, or the probabilities are none.
    """
    read = prompt if isinstance(prompt, ModelInput) else _as_prompt(prompt)
    if not read.length:
        raise InvalidData("prompt is empty: it needs at least one token before the choice")
    candidates = _packed("candidate_ids", candidate_ids)
    if candidates.dtype.kind != "i":
        raise InvalidData(f"candidate_ids must be token ids, got numbers of type {candidates.dtype}")
    wrong = candidates[(candidates < 0) | (candidates >= 2**31)]
    if wrong.size:
        raise InvalidData(f"candidate_ids must be in [0, 2**31), got {wrong[0]}")
    tokens, counts = np.unique(candidates, return_counts=True)
    if tokens.size < candidates.size:
        raise InvalidData(f"candidate_ids must differ, but {tokens[counts > 1][0]} occurs {counts.max()} times")
    targets = _packed("target_probs", target_probs).astype(np.float64)
    if targets.shape != candidates.shape:
        raise InvalidData(
            f"target_probs must have one number for each of the {candidates.size} candidate_ids, got {targets.size}"
        )
    if not (targets >= 0).all() or not abs(float(targets.sum()) - 1.0) <= _TOLERANCE:
        raise InvalidData(
            f"target_probs must be numbers >= 0 that add up to 1, got {shown([round(float(t), 6) for t in targets])}"
        )
    weights = np.zeros((read.length, targets.size), np.float32)
    weights[-1] = targets
    return Datum(
        model_input=read,
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(np.tile(candidates, (read.length, 1))),
            "weights": TensorData.from_numpy(weights),
        },
    )


def _as_prompt(prompt: Sequence[int]) -> ModelInput:
    try:
        return ModelInput.from_ints(prompt)
    except (InvalidData, ValueError, TypeError) as error:
        raise InvalidData(f"prompt must be a ModelInput or token ids: {error}") from None


def _packed(name: str, values: TensorInput) -> Array:
    """Returns a flat, non-empty list of numbers."""
    try:
        array = TensorData.of(values).to_numpy()
    except (InvalidData, ValueError, TypeError) as error:
        raise InvalidData(f"{name}: {error}") from None
    if array.ndim != 1 or not array.size:
        raise InvalidData(f"{name} must be a flat list of at least one number, got shape {array.shape}")
    return array
