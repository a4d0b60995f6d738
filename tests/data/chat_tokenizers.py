"""Small tokenizers in memory with chat templates of several kinds, and the expected datums."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, with marks around the text of the assistant.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The answer has no header of its own: it stands behind the bracket that closes the question.
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Words only, and no special token at all.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Earlier thoughts are dropped.
FORGETFUL = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_tokenizer(
    template: str | None,
    *,
    merges: tuple[tuple[str, str], ...] = (),
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
) -> Any:
    """One token per byte, more where merges join two, BOS, EOS and other special tokens."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
    )


def adding_a_start() -> Any:
    """A tokenizer that puts its first token in front of every text, as that of Llama does."""
    tokenizer = byte_tokenizer.__wrapped__(BRACKETS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def said(role, content):
    return {"role": role, "content": content}


def learned_text(tokenizer, datum):
    """The text that the datum teaches, one for each run of weights that are not 0."""
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    weights = datum.loss_fn_inputs["weights"].tolist()
    texts, run = [], []
    for token, weight in zip([*targets, 0], [*weights, 0.0], strict=True):
        if weight:
            assert weight == 1.0
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def whole(tokenizer, datum):
    """The tokens before shifting; inputs and targets must overlap."""
    inputs, targets = datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()
    assert inputs[1:] == targets[:-1]
    assert len(inputs) == len(targets) == len(datum.loss_fn_inputs["weights"].tolist())
    return [*inputs, targets[-1]]


def chatml_by_hand(tokenizer, messages, turns):
    """Tokens and mask of ChatML, piece by piece."""
    start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>"))

    def encoded(text):
        return tokenizer.encode(text, add_special_tokens=False)

    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    tokens, mask = [], []
    for index, message in enumerate(messages):
        is_learned = message["role"] == "assistant" and (turns == "all" or index == last)
        for piece, learned in (
            ([start, *encoded(message["role"] + "\n")], False),
            ([*encoded(message["content"]), end], is_learned),
            (encoded("\n"), False),
        ):
            tokens += piece
            mask += [float(learned)] * len(piece)
    return tokens, mask
