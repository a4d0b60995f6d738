"""Checkpoint paths: `tinker://{training run}/{kind}/{name}`."""

from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import quote

from tinkex_py.arguments import check_choice, shown
from tinkex_py.errors import InvalidData

CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]

_SCHEME = "tinker://"
_KINDS = ("weights", "sampler_weights", "external_weights")


@dataclass(frozen=True)
class CheckpointPath:
    """The parts of a checkpoint path.

    Args:
        run_id: id of the training run, which is also the id of its model.
        kind: "weights" (with the optimizer's state), "sampler_weights" or "external_weights".
        name: name under which the checkpoint was saved.

    Raises:
        InvalidData: a part is empty, is "." or "..", or contains a slash or a control character; or the kind is
            unknown.
    """

    run_id: str
    kind: CheckpointKind
    name: str

    def __post_init__(self) -> None:
        check_segment("run_id", self.run_id)
        check_choice("kind", self.kind, _KINDS)
        check_segment("name", self.name)

    @classmethod
    def parse(cls, path: str) -> "CheckpointPath":
        """Parses a path. SkyRL's paths of sampler weights omit the kind.

        Raises:
            InvalidData: the path does not have the form `tinker://{training run}/{kind}/{name}`.
        """
        parts = path.removeprefix(_SCHEME).split("/") if isinstance(path, str) and path.startswith(_SCHEME) else []  # pyright: ignore[reportUnnecessaryIsInstance]
        if len(parts) == 2 and parts[1] not in _KINDS:
            parts.insert(1, "sampler_weights")
        if len(parts) != 3:
            raise InvalidData(
                f"{shown(path)} is not a checkpoint path: it must be tinker://<training run>/<kind>/<name>"
            )
        return cls(parts[0], cast("CheckpointKind", parts[1]), parts[2])

    @property
    def checkpoint_id(self) -> str:
        """Kind and name, such as "weights/step-100", as in the listings of services."""
        return f"{self.kind}/{self.name}"

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.kind}/{self.name}"


def check_address(path: object) -> str:
    """Checks a path in any service's form, such as hatchery's `tinker://{run}/checkpoints/{name}`, and returns it.

    Raises:
        InvalidData: it is not a checkpoint path in any form.
    """
    parts = path.removeprefix(_SCHEME).split("/") if isinstance(path, str) and path.startswith(_SCHEME) else []
    if len(parts) < 2:
        raise InvalidData(f"{shown(path)} is not a checkpoint path: it must be tinker://<training run>/<kind>/<name>")
    for part in parts:
        check_segment("a part of a checkpoint's path", part)
    return "/".join((_SCHEME + parts[0], *parts[1:]))


def check_segment(name: str, text: object) -> str:
    """Checks that a value can be one segment of a URL's path, and returns it.

    Args:
        name: name of the argument, for the message.
        text: the value.

    Raises:
        InvalidData: it cannot.
    """
    if not isinstance(text, str) or not text or text in (".", "..") or "/" in text or not text.isprintable():
        raise InvalidData(
            f"{name} must be a non-empty string without slashes and control characters, other than '.' and '..', got "
            f"{shown(text)}"
        )
    return text


def url_segment(text: str) -> str:
    """Returns a segment quoted for a URL; colons stay unquoted, because services do not decode them."""
    return quote(text, safe=":@!$&'()*+,;=~-._")
