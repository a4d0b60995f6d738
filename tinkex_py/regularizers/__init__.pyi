"""The names that `__init__.py` loads at their first use."""

from .norms import (
    L1 as L1,
    L2 as L2,
    ElasticNet as ElasticNet,
)
