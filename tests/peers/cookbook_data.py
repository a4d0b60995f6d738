"""Rows in the place of the data sets that the recipes of the cookbook read from the Hub.

Importing this file replaces `datasets.load_dataset`, so it must come before the recipes.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

ROWS = 64
WORDS = ("north", "south", "tea", "rain", "stone", "river", "lamp", "song", "bread", "snow")
_RANDOM = random.Random(0)


def sentence(length: int) -> str:
    return " ".join(_RANDOM.choice(WORDS) for _ in range(length))


def messages(answer: str = "Aye.") -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(3)}, {"role": "assistant", "content": answer}]


def preferred() -> dict[str, str]:
    human = f"\n\nHuman: {sentence(3)}?\n\nAssistant: "
    return {"chosen": human + "Aye, captain.", "rejected": human + sentence(4)}


def sum_of_two() -> dict[str, str]:
    first, second = _RANDOM.randrange(10), _RANDOM.randrange(10)
    return {"question": f"What is {first} + {second}?", "answer": f"They are #### {first + second}"}


def choice() -> dict[str, Any]:
    return {
        "domain": "Chemistry",
        "details": {"level": "L3"},
        "type": "mcq-4-choices",
        "question": sentence(4),
        "choices": {"label": ["A", "B"], "text": [sentence(1), sentence(1)]},
        "answerKey": "A",
    }


def thoughts() -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": sentence(3)}, {"from": "gpt", "value": "Aye."}]}


_MAKERS = {
    "HuggingFaceH4/no_robots": lambda: {"messages": messages()},
    "allenai/tulu-3-sft-mixture": lambda: {"messages": messages()},
    "open-thoughts/OpenThoughts3-1.2M": thoughts,
    "openai/gsm8k": sum_of_two,
    "zwhe99/DeepMath-103K": sum_of_two,
    "Anthropic/hh-rlhf": preferred,
    "hicai-zju/SciKnowEval": choice,
}


def load_dataset(path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False) -> Any:
    """Stands for `datasets.load_dataset`."""
    make = _MAKERS[path]
    _RANDOM.seed(path)
    splits: Mapping[str, Sequence[Mapping[str, Any]]] = {
        part: [make() for _ in range(count)] for part, count in (("train", 4 * ROWS), ("test", 2 * ROWS))
    }
    found = datasets.DatasetDict({part: datasets.Dataset.from_list(list(rows)) for part, rows in splits.items()})
    if split is None:
        return found
    return found[split].to_iterable_dataset() if streaming else found[split]


datasets.load_dataset = load_dataset
