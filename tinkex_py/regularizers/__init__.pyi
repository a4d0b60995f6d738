"""The names that `__init__.py` loads at their first use."""

from .divergences import (
    JensenShannon as JensenShannon,
    KLDivergence as KLDivergence,
)
from .entropy import (
    Entropy as Entropy,
)
from .norms import (
    L1 as L1,
    L2 as L2,
    ElasticNet as ElasticNet,
)
from .sampled import (
    SampledEntropy as SampledEntropy,
    SampledKL as SampledKL,
)
