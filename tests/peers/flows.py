"""The rows of the conformance table, and how a program reports the outcome of each.

The programs run with the Python of a peer's venv, so this file needs nothing but the standard library.
"""

import json
import sys
from typing import Literal

# "unsupported": the client raised an error that names the feature. "silent": no response of the server says that it
# cannot do it.
Outcome = Literal["pass", "unsupported", "silent", "absent", "fail"]

FLOWS = {
    "create_lora_training_client": "create",
    "unknown base model is refused": "unknown_model",
    "forward": "forward",
    "forward_backward": "forward_backward",
    "importance_sampling, ppo, cispo": "policy_losses",
    "optim_step": "optim_step",
    "forward_backward_custom": "custom",
    "custom loss with regularizers": "with_regularizers",
    "gradient of a custom loss arrives as computed": "gradient",
    "a call of 300 datums": "many_datums",
    "training lowers the loss": "lowers",
    "save_state": "save_state",
    "from state": "from_state",
    "from state with optimizer": "with_optimizer",
    "save_weights_and_get_sampling_client": "get_sampler",
    "sample": "sample",
    "compute_logprobs": "compute_logprobs",
    "topk_prompt_logprobs": "topk",
    "concurrent samplers": "concurrent",
    "save_weights_for_sampler, sample by path": "by_path",
    "sample from the base model": "from_base",
    "list training runs": "runs",
    "list checkpoints of a run": "checkpoints",
    "list all checkpoints": "all_checkpoints",
    "list sessions": "sessions",
    "weights info": "info",
    "checkpoint archive URL": "archive",
}
"""Name of each flow, and the method of `Flows` in each program that runs it."""


def report(flow: str, outcome: Outcome, detail: str = "") -> None:
    """Prints one line of JSON and flushes it, so that it is not lost if the program hangs later."""
    sys.stdout.write(json.dumps({"flow": flow, "outcome": outcome, "detail": detail}) + "\n")
    sys.stdout.flush()
