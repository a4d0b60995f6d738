"""The names that `__init__.py` loads on first use."""

from .constraints import (
    Consistency as Consistency,
    Orthogonality as Orthogonality,
)
from .distributions import (
    Entropy as Entropy,
    JensenShannon as JensenShannon,
    KLDivergence as KLDivergence,
)
from .gradient_penalty import (
    GradientPenalty as GradientPenalty,
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
