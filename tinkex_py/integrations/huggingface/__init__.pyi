"""The names that `__init__.py` loads at their first use."""

from .adapters import (
    download_adapter as download_adapter,
    export_adapter as export_adapter,
)
from .datums import (
    chat_datum as chat_datum,
    datums_from as datums_from,
    preference_datums as preference_datums,
    text_datum as text_datum,
)
