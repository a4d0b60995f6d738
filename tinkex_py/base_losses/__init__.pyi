"""The names that `__init__.py` loads on first use."""

from .likelihood import (
    DPO as DPO,
    NLL as NLL,
)
from .policy import (
    CISPO as CISPO,
    PPO as PPO,
    ImportanceSampling as ImportanceSampling,
)
