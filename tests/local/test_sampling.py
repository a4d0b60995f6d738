"""Sampling against full forward passes of the same network."""

import math

import numpy as np
import pytest
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import SampleRequest
from tinkex_py.local.sampling import allowed
from tinkex_py.local.worker import EngineClosing
from tinkex_py.types import AdamParams

PROMPT = np.array([256, *b"once upon"], dtype=np.int64)


def draw(bench, source=None, **fields):
    return bench.engine.sample(source, SampleRequest(PROMPT, **{"max_tokens": 8, **fields}))


def full_logprobs(bench, ids) -> torch.Tensor:
    """Log-softmax table [T, V] of the base network, without a cache."""
    bench.engine._bank.activate(None)
    with torch.no_grad():
        return bench.model.network(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def tokens_of(result) -> list[list[int]]:
    return [sequence.tokens.tolist() for sequence in result.sequences]


def test_greedy_is_the_argmax_of_full_forwards_and_reports_their_logprobs(bench):
    result = draw(bench, temperature=0.0, num_samples=2)
    ids = PROMPT.tolist()
    for token, logprob in zip(result.sequences[0].tokens, result.sequences[0].logprobs, strict=True):
        row = full_logprobs(bench, ids)[-1]
        assert token == int(row.argmax())
        assert logprob == pytest.approx(float(row.max()), abs=1e-4)
        ids.append(int(token))
    assert tokens_of(result)[0] == tokens_of(result)[1]
    assert not result.sequences[0].stopped


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_the_coldest_temperature_is_greedy(bench, temperature, limits):
    assert tokens_of(draw(bench, temperature=temperature, **limits)) == tokens_of(draw(bench, temperature=0.0))


def test_sampled_logprobs_are_the_models_own_whatever_the_temperature(bench):
    result = draw(bench, temperature=2.5, top_k=50, top_p=0.9, seed=4)
    sequence = result.sequences[0]
    table = full_logprobs(bench, [*PROMPT, *sequence.tokens])
    expected = [float(table[len(PROMPT) - 1 + i, token]) for i, token in enumerate(sequence.tokens)]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)


def test_a_seed_repeats_and_sequences_do_not_depend_on_their_number(bench):
    three = tokens_of(draw(bench, seed=7, num_samples=3))
    assert three == tokens_of(draw(bench, seed=7, num_samples=3))
    assert three[:2] == tokens_of(draw(bench, seed=7, num_samples=2))
    assert len({tuple(tokens) for tokens in three}) == 3
    assert three != tokens_of(draw(bench, seed=8, num_samples=3))
    assert tokens_of(draw(bench)) != tokens_of(draw(bench))


def test_sequences_that_stop_early_leave_the_others_as_they_were(bench):
    free = tokens_of(draw(bench, seed=7, num_samples=3))
    stop = free[1][2]
    cut = draw(bench, seed=7, num_samples=3, stop_tokens=frozenset({stop}))
    for got, want in zip(cut.sequences, free, strict=True):
        expected = want[: want.index(stop) + 1] if stop in want else want
        assert got.tokens.tolist() == expected
        assert got.stopped == (stop in want)


def test_a_text_stops_at_the_token_that_completes_it(bench):
    free = tokens_of(draw(bench, seed=11, max_tokens=40))[0]
    ascii_pairs = [i for i in range(3, 38) if all(32 <= token < 127 for token in free[i : i + 2])]
    place = ascii_pairs[0]
    text = bytes(free[place : place + 2]).decode()
    decoded = bench.model.tokenizer.decode
    first = next(end for end in range(1, 41) if text in decoded(free[:end]))
    cut = draw(bench, seed=11, max_tokens=40, stop_texts=(text,)).sequences[0]
    assert cut.tokens.tolist() == free[:first]
    assert cut.stopped


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(top_k: int, top_p: float) -> list[int]:
        return torch.isfinite(allowed(logits, top_k, top_p))[0].nonzero()[:, 0].tolist()

    assert kept(-1, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [0, 1]
    assert kept(9, 1.0) == [0, 1, 2, 3]
    assert kept(-1, 0.4) == [0]
    assert kept(-1, 0.79) == [0, 1]
    assert kept(-1, 0.9) == [0, 1, 2]
    # After top_k = 2 the two have 0.625 and 0.375 of what is left.
    assert kept(2, 0.6) == [0]
    assert kept(2, 0.63) == [0, 1]


def test_top_k_one_is_greedy_and_draws_follow_the_distribution(bench):
    greedy = tokens_of(draw(bench, temperature=0.0))
    assert tokens_of(draw(bench, top_k=1)) == greedy
    assert tokens_of(draw(bench, top_p=1e-9)) == greedy
    drawn = draw(bench, seed=1, num_samples=600, max_tokens=1, top_k=3, temperature=0.7)
    counts = np.bincount([tokens[0] for tokens in tokens_of(drawn)], minlength=258)
    values, ids = full_logprobs(bench, PROMPT)[-1].topk(3)
    expected = (values / 0.7).softmax(-1).numpy()
    assert counts[ids.numpy()].sum() == 600
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(counts[ids.numpy()] / 600, expected, atol=5 * math.sqrt(0.25 / 600))


def test_prompt_logprobs_equal_those_of_a_forward_pass(bench, kit):
    model_id = bench.create("a")
    bench.passed(model_id, [kit.datum(9, 1)])
    bench.engine.optim_step(model_id, AdamParams(learning_rate=0.02))
    source = bench.checkpoint(model_id, "x", "sampler_weights")
    datum = kit.datum(12, 3)
    ids = np.append(datum.tokens, datum.inputs["target_tokens"][-1])
    scored = bench.engine.sample(source, SampleRequest(ids, max_tokens=1, prompt_logprobs=True)).prompt.logprobs
    forward = bench.passed(model_id, [datum], forward_only=True).logprobs[0]
    assert math.isnan(scored[0])
    np.testing.assert_allclose(scored[1:], forward, atol=1e-4)
    base = bench.engine.sample(None, SampleRequest(ids, max_tokens=1, prompt_logprobs=True)).prompt.logprobs
    assert np.abs(base[1:] - forward).max() > 0.01
    last = SampleRequest(ids, max_tokens=1, prompt_logprobs=True, prompt_logprobs_last=3)
    partial = bench.engine.sample(source, last).prompt.logprobs
    assert np.isnan(partial[:-3]).all()
    np.testing.assert_array_equal(partial[-3:], scored[-3:])


def test_topk_and_target_tables(bench):
    targets = np.full((len(PROMPT) - 1, 2), -1, dtype=np.int64)
    targets[3] = [65, 66]
    result = draw(bench, topk_prompt_logprobs=2, topk_sample_logprobs=3, target_logprobs=targets, temperature=0.0)
    values, ids = full_logprobs(bench, PROMPT).topk(2)
    assert result.prompt.topk.ids[0].tolist() == [0, 0]
    assert result.prompt.topk.logprobs[0].tolist() == [-99999.0, -99999.0]
    np.testing.assert_array_equal(result.prompt.topk.ids[1:], ids[:-1].numpy())
    np.testing.assert_allclose(result.prompt.topk.logprobs[1:], values[:-1].numpy(), atol=1e-5)
    table = result.sequences[0].topk
    assert table.ids.shape == (8, 3)
    np.testing.assert_array_equal(table.ids[:, 0], result.sequences[0].tokens)
    np.testing.assert_array_equal(table.logprobs[:, 0], result.sequences[0].logprobs)
    expected = np.zeros_like(targets, dtype=np.float32)
    expected[3] = full_logprobs(bench, PROMPT)[3, [65, 66]].numpy()
    np.testing.assert_allclose(result.prompt.targets, expected, atol=1e-5)


def test_the_context_is_never_exceeded(bench):
    full = np.zeros(2048, dtype=np.int64)
    assert len(bench.engine.sample(None, SampleRequest(full, max_tokens=5)).sequences[0].tokens) == 0
    almost = bench.engine.sample(None, SampleRequest(full[:-3], max_tokens=50)).sequences[0]
    assert len(almost.tokens) == 3
    with pytest.raises(InvalidData, match="2049 tokens"):
        bench.engine.sample(None, SampleRequest(np.zeros(2049, dtype=np.int64)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SampleRequest(np.zeros(0, np.int64)), "prompt is empty"),
        (SampleRequest(np.array([300])), "token 300"),
        (SampleRequest(PROMPT, topk_prompt_logprobs=999), "topk_prompt_logprobs=999"),
        (SampleRequest(PROMPT, num_samples=0), "num_samples=0"),
        (SampleRequest(PROMPT, target_logprobs=np.zeros((2, 2), np.int64)), "target_prompt_logprobs has shape"),
    ],
)
def test_bad_requests_are_named(bench, request_, message):
    with pytest.raises(InvalidData, match=message):
        bench.engine.sample(None, request_)


def test_many_kinds_of_adapters_can_be_sampled_in_turn(bench):
    sources = []
    for rank in range(1, 7):
        model_id = bench.create(f"r{rank}", rank=rank)
        info = bench.run(model_id, rank)
        sources.append(bench.checkpoint(model_id, "x", "sampler_weights").model_copy(update={"run": info}))
    results = [tokens_of(draw(bench, source, temperature=0.0)) for source in (*sources, None)]
    assert all(result == results[-1] for result in results)
    assert len(bench.engine._samplers) == 4


def test_a_closing_service_ends_a_draw_early(bench):
    bench.closing.set()
    with pytest.raises(EngineClosing):
        draw(bench)
