"""Encrypts the files of external weights to age recipients (https://age-encryption.org), with the library pyrage."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinkex_py.errors import InvalidData, UnsupportedFeature

_SUFFIX = ".age"
_MOST_RECIPIENTS = 10


def encryption_to(recipients: Sequence[str]) -> Callable[[Path], None] | None:
    """Returns a function that replaces the files of a folder by encrypted ones, `NAME.age`; None without recipients.

    Args:
        recipients: at most 10 public keys, `age1...` or of SSH.

    Raises:
        InvalidData: a recipient is not a public key, or there are too many.
        UnsupportedFeature: pyrage is not installed.
    """
    if not recipients:
        return None
    if len(recipients) > _MOST_RECIPIENTS:
        raise InvalidData(
            f"age_encryption_recipients has {len(recipients)} keys: pass at most {_MOST_RECIPIENTS} public keys"
        )
    try:
        pyrage: Any = importlib.import_module("pyrage")
    except ModuleNotFoundError:
        raise UnsupportedFeature(
            "the embedded service encrypts weights with pyrage, which is not installed where it runs: pip install "
            "'tinkex-py[age]' there, or leave age_encryption_recipients out"
        ) from None
    keys = [_key(pyrage, number, recipient) for number, recipient in enumerate(recipients)]

    def encrypt(folder: Path) -> None:
        for file in sorted(folder.iterdir()):
            pyrage.encrypt_file(str(file), str(file.with_name(file.name + _SUFFIX)), keys)
            file.unlink()

    return encrypt


def _key(pyrage: Any, number: int, recipient: str) -> Any:
    kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(recipient)
    except pyrage.RecipientError as error:
        raise InvalidData(
            f"age_encryption_recipients[{number}] is not a public key of age (age1...) or SSH (ssh-...): {error}"
        ) from None
