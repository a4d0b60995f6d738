"""What is no term, no datum, no tensor is named, whichever door it comes through."""

from typing import Any

import pytest
import torch

from tests.losses.support import datum, guide_logprobs, l1, nll, spec
from tinkex_py import Executor, GradientTracker, InvalidData, InvalidSpec, Pipeline, execute, split
from tinkex_py.losses.logprobs import packed_field

NO_TERMS = [None, 5, "l1", torch.zeros(2), lambda data: data]
NO_DATA = [None, 5, iter([])]


@pytest.mark.asyncio
@pytest.mark.parametrize("term", NO_TERMS)
async def test_what_is_no_term(term: Any):
    with pytest.raises(InvalidSpec):
        await execute(term, [], guide_logprobs())
    with pytest.raises(InvalidSpec, match="RegularizerSpec"):
        await Executor.execute_one(term, [], guide_logprobs())
    with pytest.raises(InvalidSpec, match="RegularizerSpec"):
        await GradientTracker.regularizer_grad_norm(term, [], guide_logprobs())


@pytest.mark.asyncio
@pytest.mark.parametrize("data", NO_DATA)
async def test_what_is_no_list_of_datums(data: Any):
    with pytest.raises(InvalidData, match=type(data).__name__):
        await Pipeline(nll).compute(data, guide_logprobs())
    with pytest.raises(InvalidData, match=type(data).__name__):
        await Executor.execute_all([spec(l1, "l1")], data, guide_logprobs())


def test_what_is_no_datum_or_tensor():
    for call in (lambda: split([5], torch.zeros(1)), lambda: packed_field(["x"], "weights")):
        with pytest.raises(InvalidData, match=r"data\[0\] must be a Datum"):
            call()
    with pytest.raises(InvalidData, match="list"):
        split([datum(2)], [0.1, 0.2])
