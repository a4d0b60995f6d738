"""TensorData: numbers on the wire, packed, read-only, and never shown."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from tinkex_py import InvalidData, TensorData

SECRET = 31337  # stands for a token id that must not show up in messages


@pytest.mark.parametrize(
    ("values", "dtype", "shape"),
    [
        ([1, 2, 3], "int64", (3,)),
        ([1.0, 2.5], "float32", (2,)),
        ([[1, 2], [3, 4], [5, 6]], "int64", (3, 2)),
        ([True, False], "int64", (2,)),
        ([], "float32", (0,)),
        (np.arange(6, dtype=np.int32).reshape(2, 3), "int64", (2, 3)),
        (np.array([1, 2], np.uint8), "int64", (2,)),
        (np.array([0.5], np.float64), "float32", (1,)),
        (np.array([0.5], np.float16), "float32", (1,)),
        (np.array(0.5, np.float32), "float32", ()),
        (torch.tensor([1, 2], dtype=torch.int32), "int64", (2,)),
        (torch.tensor([True]), "int64", (1,)),
        (torch.tensor([[0.5, 1.0]], dtype=torch.float64), "float32", (1, 2)),
        (torch.tensor([0.5], dtype=torch.float16), "float32", (1,)),
        (torch.tensor([0.5], dtype=torch.bfloat16), "float32", (1,)),
        (torch.tensor([0.5], requires_grad=True), "float32", (1,)),
        (torch.arange(6.0).reshape(2, 3).T, "float32", (3, 2)),
        (np.zeros((2, 0), np.int64), "int64", (2, 0)),
    ],
)
def test_dtype_and_shape_follow_the_values(values: Any, dtype: str, shape: tuple[int, ...]):
    made = TensorData.of(values)
    assert (made.dtype, made.shape) == (dtype, shape)
    expected = values.detach().float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    assert np.array_equal(made.to_numpy(), expected.astype(np.dtype(dtype)))
    assert made.data.dtype == np.dtype(dtype)
    assert made.data.ndim == 1
    assert made.data.flags.c_contiguous
    assert not made.data.flags.writeable
    assert made.to_torch().shape == torch.Size(shape)
    assert made.tolist() == expected.astype(np.dtype(dtype)).tolist()


def test_bfloat16_is_exact():
    values = torch.tensor([0.1, -2.7, 1e30], dtype=torch.bfloat16)
    assert torch.equal(TensorData.of(values).to_torch(), values.float())


def test_the_values_are_copied():
    array = np.array([1.0, 2.0], np.float32)
    tensor = torch.tensor([1.0, 2.0])
    made = [TensorData.of(array), TensorData.of(tensor)]
    array[0] = 9.0
    tensor[0] = 9.0
    assert [one.tolist() for one in made] == [[1.0, 2.0]] * 2
    for one in made:
        with pytest.raises(ValueError, match="read-only"):
            one.to_numpy()[0] = 9.0
        own = one.to_torch()
        own[0] = 9.0
        assert one.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("target_tokens", "int64"),
        ("weights", "float32"),
        ("advantages", "float32"),
        ("logprobs", "float32"),
        ("my_mask", "int64"),
    ],
)
def test_plain_lists_get_the_dtype_of_a_known_field(name: str, dtype: str):
    assert TensorData.of([0, 1], name=name).dtype == dtype


def test_target_tokens_must_be_whole():
    with pytest.raises(InvalidData, match="not integers"):
        TensorData.of([1.0, 2.5], name="target_tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": [1, 2, 3], "shape": (2, 2)}, r"\(2, 2\) needs 4 values, got 3"),
        ({"data": [1, 2], "shape": (-1,)}, "negative"),
        ({"data": [[1, 2], [3]]}, "equal length"),
        ({"data": ["a", "b"]}, "numbers"),
        ({"data": [1], "dtype": "float64"}, "float64"),
        ({"data": [1j]}, "complex"),
        ({"data": [None]}, "object"),
        ({"data": [1.5], "dtype": "int64"}, "not integers"),
        ({"data": [math.nan], "dtype": "int64"}, "not integers"),
        ({"data": [1.0], "sparse_crow_indices": [0, 1]}, "both"),
    ],
)
def test_what_is_no_tensor(arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidData, match=message) as caught:
        TensorData(**arguments)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, [2**64], np.array([2**64 - 1], np.uint64), [1e30]])
def test_integers_that_do_not_fit_are_refused(value: Any):
    with pytest.raises(InvalidData):
        TensorData(data=np.atleast_1d(value) if not isinstance(value, list) else value, dtype="int64")


@pytest.mark.parametrize("value", [[1e300], np.array([1e39]), torch.tensor([1e39], dtype=torch.float64)])
def test_floats_that_do_not_fit_do_not_become_infinite_in_silence(value: Any):
    with pytest.raises(InvalidData):
        TensorData.of(value)


DENSE = [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]]
CSR = {
    "data": [2.0, 1.0, 3.0],
    "shape": (3, 3),
    "sparse_crow_indices": [0, 1, 1, 3],
    "sparse_col_indices": [1, 0, 2],
}


def test_csr_by_hand():
    made = TensorData(**CSR)
    assert made.is_sparse
    assert made.tolist() == DENSE
    assert made == TensorData.of(DENSE)
    assert hash(made) == hash(TensorData.of(DENSE))
    assert made.to_torch().tolist() == DENSE


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_csr_from_torch(dtype: torch.dtype):
    made = TensorData.of(torch.tensor(DENSE, dtype=dtype).to_sparse_csr())
    assert made.is_sparse
    assert made.tolist() == DENSE
    assert made.dtype == ("int64" if dtype == torch.int64 else "float32")


def test_other_sparse_layouts_are_dense_or_refused():
    coo = torch.tensor(DENSE).to_sparse_coo()
    try:
        assert TensorData.of(coo).tolist() == DENSE
    except InvalidData as error:
        assert "sparse" in str(error)  # noqa: PT017  # either is fine, a TypeError of torch's is not


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_crow_indices": [0, 1, 3]}, "row pointers"),
        ({"sparse_crow_indices": [0, 2, 1, 3]}, "increase"),
        ({"sparse_crow_indices": [1, 1, 1, 3]}, "increase"),
        ({"sparse_crow_indices": [0, 1, 1, 2]}, "increase"),
        ({"sparse_col_indices": [1, 0]}, "columns"),
        ({"sparse_col_indices": [1, 0, 3]}, "3"),
        ({"sparse_col_indices": [-1, 0, 2]}, "-1"),
        ({"shape": (9,)}, "shape"),
        ({"sparse_crow_indices": None}, "both"),
    ],
)
def test_csr_parts_must_fit(changes: dict[str, Any], message: str):
    with pytest.raises(InvalidData, match=message):
        TensorData(**{**CSR, **changes})


def test_empty_csr():
    made = TensorData(data=[], dtype="float32", shape=(2, 3), sparse_crow_indices=[0, 0, 0], sparse_col_indices=[])
    assert made.tolist() == [[0.0] * 3] * 2


@given(
    hnp.arrays(
        st.sampled_from([np.dtype(np.int64), np.dtype(np.float32)]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
    )
)
def test_the_wire_form_and_back(array: np.ndarray):
    made = TensorData.from_numpy(array)
    assert np.array_equal(made.to_numpy(), array, equal_nan=array.dtype.kind == "f")
    assert pickle.loads(pickle.dumps(made)) == made
    if array.dtype.kind == "i" or np.isfinite(array).all():
        plain = json.loads(made.model_dump_json())
        assert TensorData.of({key: value for key, value in plain.items() if value is not None}) == made
        assert TensorData.model_validate_json(made.model_dump_json()) == made


def test_a_sparse_tensor_makes_the_round_trip():
    made = TensorData(**CSR)
    again = TensorData.model_validate_json(made.model_dump_json())
    assert again == made
    assert again.is_sparse


def test_equality():
    assert TensorData.of([1, 2]) != TensorData.of([1.0, 2.0])
    assert TensorData.of([1, 2]) != TensorData.of([[1, 2]])
    assert TensorData.of([1, 2]) != [1, 2]
    assert TensorData.of([math.nan]) == TensorData.of([math.nan])


def test_values_never_show():
    made = TensorData.of([SECRET, 2])
    assert str(SECRET) not in repr(made) + str(made) + f"{made}"
    for broken in ({"data": [SECRET, 2], "shape": (3,)}, {"data": [[SECRET], [1, 2]]}, {"data": [str(SECRET)]}):
        with pytest.raises(InvalidData) as caught:
            TensorData(**broken)
        assert str(SECRET) not in str(caught.value)


def test_frozen():
    with pytest.raises(Exception, match="frozen"):
        TensorData.of([1]).shape = (2,)  # type: ignore[misc]


@pytest.mark.parametrize("fields", [{}, {"shape": [1]}, {"data": [1], "more": 2}, {"data": [1], 3: 4}])
def test_a_mapping_that_is_no_tensor(fields: dict[Any, Any]):
    with pytest.raises(InvalidData):
        TensorData.of(fields)


NOT_NUMBERS = [None, [1], 5, "x", object()]


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_no_array_or_tensor_is_named(value: Any):
    for make in (TensorData.from_numpy, TensorData.from_torch):
        with pytest.raises(InvalidData, match=type(value).__name__):
            make(value)


def test_tensors_of_every_layout_and_device():
    sparse = torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse()
    for packed in (TensorData(data=sparse), TensorData.of(sparse), TensorData.from_torch(sparse)):
        assert packed.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    nowhere = torch.ones(2, device="meta")
    for make in (lambda value: TensorData(data=value), TensorData.of, TensorData.from_torch):
        with pytest.raises(InvalidData, match="meta"):
            make(nowhere)
