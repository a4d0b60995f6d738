"""Every row of the table reads valid or hostile input to a value or a typed error; `make attacks` measures them."""

import pytest

from tests.attacks.readers import READERS


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_reader_ends_in_a_value_or_a_typed_error(reader):
    for parts in (1, 50):
        body = reader.make(parts)
        assert body
        reader.read(body)


def test_names_are_unique():
    assert len({reader.name for reader in READERS}) == len(READERS)
