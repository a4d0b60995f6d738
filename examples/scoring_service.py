"""A term in a service of its own: the other side of `http_term`, and a training that uses it.

`uvicorn scoring_service:app` serves the term. `python examples/scoring_service.py` serves it on a free port and trains
on the embedded service: the term is the mean probability of the tokens, so that the answer stays uncertain.
"""

import asyncio
import math
import socket
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from tinkex_py import AdamParams, AsyncServiceClient, Datum, RegularizerSpec
from tinkex_py.integrations import http_term

app = FastAPI()


class Step(BaseModel):
    """What `http_term` sends: the logprobs of each datum. The datums follow as `data`, which this term ignores."""

    logprobs: list[list[float]]


class Score(BaseModel):
    """What it expects: the value, its gradient d(value)/d(logprobs) in the shape of the logprobs, and metrics."""

    value: float
    gradient: list[list[float]]
    metrics: dict[str, float]


@app.post("/confidence")
def confidence(step: Step) -> Score:
    """The mean of exp(logprob), whose derivative is exp(logprob) / count."""
    probabilities = [[math.exp(logprob) for logprob in row] for row in step.logprobs]
    everything = [probability for row in probabilities for probability in row]
    return Score(
        value=sum(everything) / len(everything),
        gradient=[[probability / len(everything) for probability in row] for row in probabilities],
        metrics={"largest": max(everything)},
    )


@asynccontextmanager
async def serving():
    """Serves the app in this process; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        task = asyncio.create_task(server.serve([listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await task


def nll(data, logprobs):
    return -logprobs.mean()


async def main():
    async with serving() as url, AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=8)
        tokenizer = await training.get_tokenizer()
        data = [Datum.from_text(tokenizer, "Q: What is the capital of France?\nA:", " Paris.")]
        judge = RegularizerSpec(fn=http_term(f"{url}/confidence"), weight=2.0, name="confidence", timeout=10.0)
        for step in range(41):
            output = await training.forward_backward_custom(data, nll, regularizers=[judge])
            await training.optim_step(AdamParams(learning_rate=0.01))
            if step % 20 == 0:
                confidence = output.regularizers["confidence"]
                print(f"step {step}: total {output.loss_total:.4f}, confidence {confidence.value:.4f}")
    print("the total is least at the confidence 0.5")  # the minimum of -log(p) + 2 p


if __name__ == "__main__":
    asyncio.run(main())
