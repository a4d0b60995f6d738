"""The names that `__init__.py` loads on first use."""

from .advantages import (
    group_advantages as group_advantages,
    in_varied_groups as in_varied_groups,
    overlong_penalty as overlong_penalty,
)
from .choice import (
    Choice as Choice,
)
from .corrected import Corrected as Corrected
from .correction import (
    MaskedIS as MaskedIS,
    OffPolicyMask as OffPolicyMask,
    ProbabilityMask as ProbabilityMask,
    Rejection as Rejection,
    TruncatedIS as TruncatedIS,
)
from .covariance import (
    ClipCov as ClipCov,
    KLCov as KLCov,
)
from .distillation import (
    Distillation as Distillation,
)
from .likelihood import (
    NLL as NLL,
)
from .policy import (
    CISPO as CISPO,
    DRO as DRO,
    PPO as PPO,
    SAPO as SAPO,
    ImportanceSampling as ImportanceSampling,
    Reinforce as Reinforce,
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
from .sequence_policy import (
    GMPO as GMPO,
    GSPO as GSPO,
    TOPR as TOPR,
    VESPO as VESPO,
)
from .token_weighting import (
    DFT as DFT,
    EAFT as EAFT,
    Focal as Focal,
    Unlikelihood as Unlikelihood,
)
from .unpaired import (
    KTO as KTO,
)
