"""Cutting long calls, and merging results as the protocol's section 5.4 says."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinkex_py import InvalidData
from tinkex_py.client.batches import (
    bytes_of,
    check_encodable,
    checked_data,
    merge_metrics,
    merge_outputs,
    plan_chunks,
)
from tinkex_py.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    PackedTensor,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
)


def sized(length: int) -> Datum:
    """4 bytes per token, 8 per target, 4 per weight."""
    return Datum(
        model_input=ModelInput.from_ints([1] * length),
        loss_fn_inputs={"target_tokens": [1] * length, "weights": [1.0] * length},
    )


def lengths(chunks) -> list[list[int]]:
    return [[item.model_input.length for item in chunk] for chunk in chunks]


def test_greedy_by_count_and_by_bytes():
    data = [sized(length) for length in (1, 2, 3, 4, 5)]
    assert lengths(plan_chunks(data, max_datums=2, max_bytes=10**6)) == [[1, 2], [3, 4], [5]]
    assert lengths(plan_chunks(data, max_datums=100, max_bytes=16 * 6)) == [[1, 2, 3], [4], [5]]
    assert lengths(plan_chunks(data, max_datums=100, max_bytes=16 * 6 - 1)) == [[1, 2], [3], [4], [5]]
    assert lengths(plan_chunks(data, max_datums=1, max_bytes=10**6)) == [[1], [2], [3], [4], [5]]
    assert lengths(plan_chunks(data, max_datums=100, max_bytes=1)) == [[1], [2], [3], [4], [5]]
    assert plan_chunks([], max_datums=1, max_bytes=1) == []


def test_what_a_custom_step_keeps_on_the_client_does_not_count():
    """4 bytes per token, 8 per target, 4 per weight, whether the datum has weights or not."""
    bare = Datum(model_input=ModelInput.from_ints([1] * 4), loss_fn_inputs={"target_tokens": [1] * 4})
    rich = Datum(
        model_input=ModelInput.from_ints([1] * 4),
        loss_fn_inputs={"target_tokens": [1] * 4, "weights": [1.0] * 4, "reference": np.zeros((4, 100), np.float32)},
    )
    for item in (bare, rich):
        for max_bytes, chunks in ((3 * 64, [[4, 4, 4], [4]]), (3 * 64 - 1, [[4, 4], [4, 4]])):
            assert lengths(plan_chunks([item] * 4, max_datums=9, max_bytes=max_bytes, custom=True)) == chunks
    candidates = Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": np.ones((1, 3), int)})
    assert len(plan_chunks([candidates] * 2, max_datums=9, max_bytes=2 * (4 + 3 * 12), custom=True)) == 1
    assert len(plan_chunks([candidates] * 2, max_datums=9, max_bytes=2 * (4 + 3 * 12) - 1, custom=True)) == 2


def test_an_oversized_datum_is_a_chunk_of_its_own():
    data = [sized(length) for length in (1, 100, 1, 1)]
    assert lengths(plan_chunks(data, max_datums=10, max_bytes=16 * 3)) == [[1], [100], [1, 1]]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 6), st.integers(1, 1500))
def test_chunks_keep_order_and_limits(sizes, max_datums, max_bytes):
    data = [sized(length) for length in sizes]
    chunks = plan_chunks(data, max_datums=max_datums, max_bytes=max_bytes)
    assert [item for chunk in chunks for item in chunk] == data
    for index, chunk in enumerate(chunks):
        total = sum(16 * item.model_input.length for item in chunk)
        assert 1 <= len(chunk) <= max_datums
        assert total <= max_bytes or len(chunk) == 1
        if index + 1 < len(chunks):  # greedy: the next datum would not have fitted
            following = 16 * chunks[index + 1][0].model_input.length
            assert len(chunk) == max_datums or total + following > max_bytes


def test_csr_indices_count():
    sparse = {
        "data": [1, 2],
        "dtype": "int64",
        "shape": [2, 5],
        "sparse_crow_indices": [0, 1, 2],
        "sparse_col_indices": [0, 4],
    }
    item = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": sparse})
    # 8 for two tokens, 16 values, 24 row pointers, 16 columns.
    assert len(plan_chunks([item, item], max_datums=9, max_bytes=2 * 64)) == 1
    assert len(plan_chunks([item, item], max_datums=9, max_bytes=2 * 64 - 1)) == 2


def test_metrics_merge_by_their_suffix():
    parts = [
        {"loss:sum": 1.0, "a:min": 3.0, "a:max": 3.0, "a:mean": 2.0, "a:slack": 2.0, "id:unique": 7.0, "h:hash2": 5.0},
        {"loss:sum": 2.5, "a:min": 1.0, "a:max": 9.0, "a:mean": 8.0, "a:slack": 8.0, "id:unique": 8.0, "h:hash2": 6.0},
        {"loss:sum": 0.5, "a:min": 2.0, "a:max": 4.0, "a:mean": 5.0, "a:slack": 5.0, "id:unique": 9.0, "h:hash2": 7.0},
    ]
    merged = merge_metrics(parts, [1, 3, 4])
    mean = (2 * 1 + 8 * 3 + 5 * 4) / 8
    assert merged == {
        "loss:sum": 4.0,
        "a:min": 1.0,
        "a:max": 9.0,
        "a:mean": mean,
        "a:slack": 8.0 - mean,
        "id:unique": 7.0,
        "id:unique_1": 8.0,
        "id:unique_2": 9.0,
        "h:hash2": 18.0,
    }


def test_metrics_merge_tolerantly():
    merged = merge_metrics([{"no colon": 1.0, "a:b:sum": 1.0, "x:new": 2.0, "m:mean": 3.0}, {"a:b:sum": 2.0}], [0, 0])
    assert merged["a:b:sum"] == 3.0
    assert merged["no colon"] == 1.0
    assert merged["x:new"] == 2.0
    assert merged["m:mean"] == 3.0
    assert merge_metrics([{"m:mean": 3.0}, {"m:mean": 5.0}], [0, 0])["m:mean"] in (3.0, 4.0)


def output(arrays, **metrics) -> ForwardBackwardOutput:
    packed = {"logprobs": PackedTensor.from_arrays([np.asarray(array, np.float32) for array in arrays])}
    return ForwardBackwardOutput(
        loss_fn_output_type="T", num_datums=len(arrays), packed=packed, metrics={"loss:sum": 1.0, **metrics}
    )


def test_outputs_merge_in_chunk_order():
    parts = [output([[1.0, 2.0], [3.0]]), output([[4.0, 5.0, 6.0]]), output([[[7.0, 8.0]]])]
    merged = merge_outputs(parts)
    assert merged.num_datums == 4
    assert merged.loss_fn_output_type == "T"
    assert merged.metrics == {"loss:sum": 3.0}
    rows = [row["logprobs"].tolist() for row in merged.loss_fn_outputs]
    assert rows == [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], [[7.0, 8.0]]]
    assert merge_outputs(parts[:1]) is parts[0]


def test_a_field_that_a_chunk_lacks_is_empty_there():
    bare = ForwardBackwardOutput(num_datums=2, metrics={})
    merged = merge_outputs([output([[1.0]]), bare, output([[2.0]])])
    assert [merged.packed["logprobs"].datum(index).tolist() for index in range(4)] == [[1.0], [], [], [2.0]]


def test_hash2_wraps_at_64_bits():
    merged = merge_metrics([{"h:hash2": float(2**63)}, {"h:hash2": float(2**63)}, {"h:hash2": -1.0}], [1, 1, 1])
    assert merged["h:hash2"] == float((2**63 + 2**63 + (2**64 - 1)) % 2**64)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metrics_that_are_not_finite_do_not_break_the_merge(value):
    merged = merge_metrics([{"h:hash2": value, "a:sum": value}, {"h:hash2": 1.0, "a:sum": 1.0}], [1, 1])
    assert not math.isfinite(merged["a:sum"])


PICTURE = ImageChunk(data=b"\xff\xd8\xff" + bytes(97), expected_tokens=2)
SHOWN = ModelInput(chunks=(EncodedTextChunk(tokens=[1]), PICTURE, EncodedTextChunk(tokens=[2])))


@pytest.mark.parametrize(
    ("chunk", "size"),
    [
        (PICTURE, 100),
        (ImageAssetPointerChunk(location="s3://a/b.png", format="png", expected_tokens=2), 12),
        (DmelChunk(dmel=bytes([0, 1, 2]) + bytes(50)), 53),
    ],
)
def test_images_and_audio_count_by_their_bytes(chunk, size):
    """The protocol's section 5.3; two targets of 8 bytes."""
    datum = Datum(model_input=ModelInput(chunks=(chunk,)), loss_fn_inputs={"target_tokens": [0, 0]})
    assert bytes_of(datum) == size + 16


@pytest.mark.parametrize("field", ["weights", "advantages"])
def test_what_learns_an_image_is_refused(field):
    def datum(learned: list[float]) -> Datum:
        inputs = {"target_tokens": [0, 0, 2, 3], "logprobs": np.zeros(4, np.float32)}
        return Datum(model_input=SHOWN, loss_fn_inputs={**inputs, field: np.array(learned, np.float32)})

    assert checked_data([datum([0, 0, 1, 1])])
    with pytest.raises(InvalidData, match=f"{field} of datum 1 are not 0 at position 1, .* at 1 positions"):
        checked_data([datum([0, 0, 1, 1]), datum([0, 0.5, 0, 0])])


def test_images_of_unknown_length_are_the_services_business():
    unknown = ModelInput(chunks=(ImageChunk(data=PICTURE.data),))
    assert checked_data([Datum(model_input=unknown, loss_fn_inputs={"target_tokens": [0] * 9, "weights": [1.0] * 9})])


def test_stable_reinforce_needs_the_sequences_that_were_sampled():
    datum = Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]})
    prompt, sampled = (kind(sequence_id="a", length=1) for kind in (PromptProvenanceSpan, SampledProvenanceSpan))
    assert checked_data([datum.with_provenance([prompt, sampled], [prompt, sampled])], "stable_reinforce")
    for bad in (datum, datum.with_provenance([prompt, prompt], [prompt, prompt])):
        with pytest.raises(InvalidData, match="datum 0 names no sampled sequence.*record_stability_info"):
            checked_data([bad], "stable_reinforce")


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
def test_each_encoding_says_what_it_cannot_hold(encoding):
    pointer = ImageAssetPointerChunk(location="x", format="png", expected_tokens=1)
    pointing = Datum(model_input=ModelInput(chunks=(pointer,)), loss_fn_inputs={"target_tokens": [1]})
    plain = Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [1]})
    span = [PromptProvenanceSpan(sequence_id="a", length=1)]
    held, refused = (
        (pointing, plain.with_provenance(span, span))
        if encoding == "json"
        else (plain.with_provenance(span, span), pointing)
    )
    check_encodable([held], encoding)
    with pytest.raises(InvalidData, match=f"datum 1 .* {'JSON' if encoding == 'json' else 'protobuf'} cannot"):
        check_encodable([plain, refused], encoding)
