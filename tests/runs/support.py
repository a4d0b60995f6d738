"""Records of a run, made up."""

from tinkex_py import BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.runs.records import RunInfo, StepRecord


def run_info(**fields) -> RunInfo:
    return RunInfo(**{"name": "somewhere", "started_at": 1.0, "updated_at": 2.0, **fields})


def step_record(step: int, loss: float = 1.5, **fields) -> StepRecord:
    output = CustomLossOutput(
        loss_total=loss + 0.5,
        base_loss=BaseLossOutput(value=loss, metrics={"naïve ratio": float("inf")}),
        regularizers={"l2": RegularizerOutput(name="l2", value=5.0, weight=0.1, contribution=0.5)},
        regularizer_total=0.5,
    )
    return StepRecord(
        **{
            "step": step,
            "finished_at": 10.0 + step,
            "seconds": 0.25,
            "datums": 2,
            "tokens": 12,
            "losses": (output,),
            **fields,
        }
    )
