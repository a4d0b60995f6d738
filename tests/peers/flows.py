"""The rows of the conformance table, and how a program tells what became of them.

The programs run with the Python of a peer's venv, so this file needs nothing but the standard library.
"""

import json
import sys
from typing import Literal

# "unsupported": the client said so, by name. "silent": nothing in the server's answers tells that it cannot.
Outcome = Literal["pass", "unsupported", "silent", "absent", "fail"]

FLOWS = (
    "create_lora_training_client",
    "unknown base model is refused",
    "forward",
    "forward_backward",
    "importance_sampling, ppo, cispo",
    "optim_step",
    "forward_backward_custom",
    "custom loss with regularizers",
    "gradient of a custom loss arrives as computed",
    "a call of 300 datums",
    "training lowers the loss",
    "save_state",
    "from state",
    "from state with optimizer",
    "save_weights_and_get_sampling_client",
    "sample",
    "compute_logprobs",
    "topk_prompt_logprobs",
    "concurrent samplers",
    "save_weights_for_sampler, sample by path",
    "sample from the base model",
    "list training runs",
    "list checkpoints of a run",
    "list all checkpoints",
    "list sessions",
    "weights info",
    "checkpoint archive URL",
)


def tell(flow: str, outcome: Outcome, detail: str = "") -> None:
    """Prints one line of JSON, at once: a program that hangs later has told this."""
    sys.stdout.write(json.dumps({"flow": flow, "outcome": outcome, "detail": detail}) + "\n")
    sys.stdout.flush()
