"""Addresses of checkpoints: `tinker://{training run}/{kind}/{name}`."""

from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import quote

from tinkex_py.errors import InvalidData

CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]

_SCHEME = "tinker://"
_KINDS = ("weights", "sampler_weights", "external_weights")


@dataclass(frozen=True)
class CheckpointPath:
    """The parts of a checkpoint's address.

    Args:
        run_id: the training run, which is also the id of its model.
        kind: "weights" (with the optimizer's state), "sampler_weights" or "external_weights".
        name: what it was saved as.

    Raises:
        InvalidData: a part is empty, is "." or "..", or has a slash or a control character; or the kind is unknown.
    """

    run_id: str
    kind: CheckpointKind
    name: str

    def __post_init__(self) -> None:
        for part in (self.run_id, self.kind, self.name):
            check_segment("a part of a checkpoint path", part)
        if self.kind not in _KINDS:
            raise InvalidData(f"{self.kind!r} is not a kind of checkpoint: there are {', '.join(_KINDS)}")

    @classmethod
    def parse(cls, path: str) -> "CheckpointPath":
        """Reads an address. SkyRL's addresses of sampler weights leave the kind out.

        Raises:
            InvalidData: it does not have the form `tinker://{training run}/{kind}/{name}`.
        """
        parts = path.removeprefix(_SCHEME).split("/") if isinstance(path, str) and path.startswith(_SCHEME) else []  # pyright: ignore[reportUnnecessaryIsInstance]
        if len(parts) == 2 and parts[1] not in _KINDS:
            parts.insert(1, "sampler_weights")
        if len(parts) != 3:
            raise InvalidData(f"{path!r} is not a checkpoint path: it must be tinker://<training run>/<kind>/<name>")
        return cls(parts[0], cast("CheckpointKind", parts[1]), parts[2])

    @property
    def checkpoint_id(self) -> str:
        """Kind and name, as services list them."""
        return f"{self.kind}/{self.name}"

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.kind}/{self.name}"


def check_address(path: object) -> str:
    """An address whose form is the service's own business, such as hatchery's `tinker://{run}/checkpoints/{name}`.

    Raises:
        InvalidData: it is no address of a checkpoint in any form.
    """
    parts = path.removeprefix(_SCHEME).split("/") if isinstance(path, str) and path.startswith(_SCHEME) else []
    if len(parts) < 2:
        raise InvalidData(f"{path!r} is not a checkpoint path: it must be tinker://<training run>/<kind>/<name>")
    for part in parts:
        check_segment("a part of a checkpoint path", part)
    return "/".join((_SCHEME + parts[0], *parts[1:]))


def check_segment(what: str, text: object) -> str:
    """A text that can be one segment of a URL's path.

    Raises:
        InvalidData: it cannot.
    """
    if not isinstance(text, str) or not text or text in (".", "..") or "/" in text or not text.isprintable():
        raise InvalidData(f"{text!r} cannot be {what}: it must be a text without slashes and control characters")
    return text


def url_segment(text: str) -> str:
    """A segment as it stands in a URL; colons stay as they are, because services do not decode them."""
    return quote(text, safe=":@!$&'()*+,;=~-._")
