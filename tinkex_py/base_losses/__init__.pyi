"""The names that `__init__.py` loads at their first use."""

from .likelihood import (
    NLL as NLL,
)
from .policy import (
    CISPO as CISPO,
    PPO as PPO,
    ImportanceSampling as ImportanceSampling,
)
from .preference import (
    DPO as DPO,
)
