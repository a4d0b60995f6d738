"""What a client found out about a service."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServiceFeatures:
    """How a service wants to be spoken to.

    Attributes:
        wire: "protobuf" or "json", the form in which it reads passes over data.
        uploaded_losses: whether it takes losses that run on the service.
    """

    wire: Literal["protobuf", "json"]
    uploaded_losses: bool
