"""The names that `__init__.py` loads at their first use."""

from . import (
    controllers as controllers,
    schedules as schedules,
)
from .datum_sums import (
    sum_over_datums as sum_over_datums,
)
from .direct import (
    Executor as Executor,
    GradientTracker as GradientTracker,
    execute as execute,
)
from .known_gradient import (
    Scored as Scored,
)
from .logprobs import (
    packed_field as packed_field,
    split as split,
)
from .options import (
    PipelineOptions as PipelineOptions,
)
from .output import (
    BaseLossOutput as BaseLossOutput,
    CustomLossOutput as CustomLossOutput,
    GradientDiagnosis as GradientDiagnosis,
    RegularizerOutput as RegularizerOutput,
)
from .pipeline import (
    Pipeline as Pipeline,
)
from .replaying import (
    replay as replay,
)
from .spec import (
    Metric as Metric,
    Regularizer as Regularizer,
    RegularizerSpec as RegularizerSpec,
    Term as Term,
    TermResult as TermResult,
    per_datum as per_datum,
)
from .weights import (
    WeightController as WeightController,
)
