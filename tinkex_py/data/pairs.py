"""Pairs of answers to one prompt: which datums belong together, and masks for one side of them."""

from collections.abc import Sequence

import numpy as np

from tinkex_py.arguments import check_list, check_text
from tinkex_py.errors import InvalidData
from tinkex_py.types import Datum, TensorData
from tinkex_py.types.datum import number_of, target_shape


def pair_indices(
    data: Sequence[Datum], pair_field: str | None = None, *, reader: str = "a loss on pairs"
) -> tuple[list[int], list[int]]:
    """Returns the indices of the chosen and of the rejected datums, in the same order of pairs.

    Args:
        data: the datums.
        pair_field: a field with one whole number per datum, n for the chosen and -n for the rejected answer of pair
            n >= 1. None: the datums are chosen, rejected, chosen, rejected, and so on.
        reader: who needs the pairs, for messages.

    Raises:
        InvalidData: a datum has no partner, or a number is not that of a pair.
    """
    if pair_field is None:
        if not data or len(data) % 2:
            raise InvalidData(
                f"{reader} needs datums in pairs (chosen, rejected, chosen, rejected, ...), got {len(data)}"
            )
        return list(range(0, len(data), 2)), list(range(1, len(data), 2))
    places: dict[int, int] = {}
    for index, datum in enumerate(data):
        number = _pair_number(datum, index, pair_field)
        if not number.is_integer() or not number:
            raise InvalidData(
                f"{pair_field!r} of datum {index} is {number:g}: {reader} needs n for the chosen and -n for the "
                "rejected answer of pair n, from 1"
            )
        if int(number) in places:
            raise InvalidData(
                f"datums {places[int(number)]} and {index} both have {number:g} in {pair_field!r}: give every pair a "
                "number of its own"
            )
        places[int(number)] = index
    for number in places:
        if -number not in places:
            raise InvalidData(
                f"pair {abs(number)} has no {'rejected' if number > 0 else 'chosen'} answer among the {len(data)} "
                f"datums of this call: {reader} needs both in one call"
            )
    if not places:
        raise InvalidData(f"{reader} needs datums in pairs, got none")
    chosen = [number for number in places if number > 0]
    return [places[number] for number in chosen], [places[-number] for number in chosen]


def with_role_masks(data: Sequence[Datum], *, pair_field: str | None = None) -> list[Datum]:
    """Returns the datums of pairs with masks for one side of them.

    `chosen_weights` has the weights of the chosen answers and 0 on the rejected ones, `rejected_weights` the opposite.
    A term with `mask="chosen_weights"` then counts the chosen answers only.

    Args:
        data: the datums; those without `weights` have weight 1 everywhere.
        pair_field: as in the losses on pairs: None if the datums are chosen, rejected, chosen, rejected, and so on.

    Raises:
        InvalidData: a datum has no partner.
    """
    datums = check_list("data", data, Datum)
    if not datums:
        raise InvalidData("data is empty: pass pairs of datums")
    if pair_field is not None:
        check_text("pair_field", pair_field)
    chosen = frozenset(pair_indices(datums, pair_field, reader="with_role_masks")[0])
    return [_with_masks(datum, index, is_chosen=index in chosen) for index, datum in enumerate(datums)]


def _pair_number(datum: Datum, index: int, pair_field: str) -> float:
    try:
        return number_of(datum, index, pair_field)
    except InvalidData as error:
        raise InvalidData(f"pair_field={pair_field!r}: {error}") from None


def _with_masks(datum: Datum, index: int, *, is_chosen: bool) -> Datum:
    given = datum.loss_fn_inputs.get("weights")
    weights = np.ones(target_shape(datum, index), np.float32) if given is None else given.to_numpy()
    masks = {"chosen_weights": weights * is_chosen, "rejected_weights": weights * (not is_chosen)}
    packed = {name: TensorData.from_numpy(mask.astype(np.float32)) for name, mask in masks.items()}
    return datum.with_inputs(**packed)
