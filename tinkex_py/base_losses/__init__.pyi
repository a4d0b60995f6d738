"""The names that `__init__.py` loads on first use."""

from .choice import (
    Choice as Choice,
)
from .distillation import (
    Distillation as Distillation,
)
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
    DPOP as DPOP,
    IPO as IPO,
    Hinge as Hinge,
)
from .reference_free import (
    CPO as CPO,
    ORPO as ORPO,
    SimPO as SimPO,
    SLiC as SLiC,
)
from .unpaired import (
    KTO as KTO,
)
