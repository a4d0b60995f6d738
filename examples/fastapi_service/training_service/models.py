"""Requests and responses of the service, which also define its OpenAPI page."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["running", "finished", "cancelled", "failed"]
Weight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class Body(BaseModel):
    """A request body; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")


class Example(Body):
    """A prompt and the answer that the model learns."""

    prompt: Text
    answer: Text


class Regularizers(Body):
    """Weights of the regularizers; 0 omits one."""

    l2: Weight = Field(default=0.0, description="Weight of the mean square of the logprobs.")
    entropy: Weight = Field(default=0.0, description="Weight of the entropy, which discourages overconfidence.")


class JobRequest(Body):
    """The training of a job."""

    examples: list[Example] = Field(min_length=1, max_length=1000, description="Training data.")
    steps: int = Field(20, ge=1, le=10_000, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, le=64, description="Largest number of examples per optimizer step.")
    learning_rate: float = Field(5e-3, gt=0, le=1, allow_inf_nan=False)
    rank: int = Field(8, ge=1, le=64, description="Rank of the LoRA adapter.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the adapter.")
    regularizers: Regularizers = Regularizers()

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "examples": [{"prompt": "What is the capital of France?", "answer": "Ahoy friend, Paris!"}],
                    "steps": 10,
                    "regularizers": {"l2": 0.01},
                }
            ]
        }
    )


class Step(BaseModel):
    """One optimizer step; the numbers have the names of `tinkex_py.runs.scalars`."""

    step: int = Field(examples=[3])
    metrics: dict[str, float] = Field(examples=[{"loss/total": 1.25, "loss/base": 1.2, "time/step": 0.04}])


class JobState(BaseModel):
    """The state of a job."""

    id: str = Field(examples=["4f2c9a"])
    status: Status
    steps: int = Field(description="Planned optimizer steps.", examples=[10])
    steps_made: int = Field(examples=[3])
    loss: float | None = Field(description="Total loss of the last step.", examples=[1.25])
    error: str | None = Field(None, description="Why it failed.")
    followers: int = Field(description="Open streams of its events.", examples=[1])


class JobResult(BaseModel):
    """The result of a finished job."""

    id: str = Field(examples=["4f2c9a"])
    checkpoint: str = Field(description="Path of the trained adapter on the training service.")
    first_loss: float
    last_loss: float
    history: list[Step]
