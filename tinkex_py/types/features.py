"""Features of a service, as a client detected them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServiceFeatures:
    """Features of a service.

    Attributes:
        wire: "protobuf" or "json", the encoding that it accepts for passes over data.
        uploaded_losses: whether it accepts custom losses that run on the service.
    """

    wire: Literal["protobuf", "json"]
    uploaded_losses: bool
