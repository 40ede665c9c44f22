"""Positions as they go over the wire, and epochs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.events import Position, new_epoch
from tests.properties import property_test

EPOCH = "abcdefgh_0123456"
epochs = st.from_regex(r"[A-Za-z0-9_]{16,64}", fullmatch=True)
offsets = st.integers(0, 10**15 - 1)


@property_test
@given(epochs, offsets)
def test_a_position_survives_the_wire(epoch: str, offset: int) -> None:
    """What is written as `<epoch>-<offset>` is read as the same position."""
    position = Position(epoch, offset)
    assert str(position) == f"{epoch}-{offset}"
    assert Position.parse(str(position)) == position


HOSTILE = {
    "nothing": "",
    "a dash": "-",
    "no offset": f"{EPOCH}-",
    "no epoch": "-5",
    "no dash": f"{EPOCH}5",
    "an epoch too short": f"{EPOCH[:15]}-5",
    "an epoch too long": f"{'a' * 65}-5",
    "a dash in the epoch": f"{EPOCH}-4-5",
    "a letter of another script in the epoch": f"{EPOCH[:15]}é-5",
    "a slash in the epoch": f"{EPOCH[:15]}/-5",
    "a brace, as Redis' hash slots have": f"{{{EPOCH}}}-5",
    "an offset below zero": f"{EPOCH}--5",
    "a sign": f"{EPOCH}-+5",
    "a fraction": f"{EPOCH}-5.0",
    "an exponent": f"{EPOCH}-5e3",
    "hexadecimal": f"{EPOCH}-0x5",
    "an underscore in the offset": f"{EPOCH}-5_0",
    "digits of another script": f"{EPOCH}-\u0665",
    "a superscript": f"{EPOCH}-²",
    "more than JavaScript counts": f"{EPOCH}-1000000000000000",
    "a very long offset": f"{EPOCH}-{'9' * 100_000}",
    "a space before": f" {EPOCH}-5",
    "a space behind": f"{EPOCH}-5 ",
    "a line end behind": f"{EPOCH}-5\n",
    "a line end between": f"{EPOCH}\n-5",
    "a NUL": f"{EPOCH}-5\0",
    "two positions": f"{EPOCH}-5,{EPOCH}-6",
    "a lone surrogate": f"{EPOCH}\ud800-5",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_position_is_none(text: str) -> None:
    """It neither raises nor is it taken for another position."""
    assert Position.parse(text) is None


@property_test
@given(
    st.text()
    | st.tuples(epochs, st.sampled_from(["-", "--", "\u2013", ""]), st.text()).map("".join)
)
def test_any_text_is_one_position_or_none(text: str) -> None:
    """What is taken for a position spells it, but for zeros before its offset."""
    position = Position.parse(text)
    if position is not None:
        epoch, _, offset = text.rpartition("-")
        assert str(position) == f"{epoch}-{offset.lstrip('0') or '0'}"
        assert 0 <= position.offset < 2**53


def test_positions_of_one_life_are_ordered() -> None:
    """By their offsets, as numbers."""
    assert Position(EPOCH, 9) < Position(EPOCH, 10)


def test_an_epoch_is_new_and_unguessable() -> None:
    """32 hexadecimal digits, 128 bits; it can stand in a position and in a path."""
    made = {new_epoch() for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(epoch) == 32 and int(epoch, 16) >= 0 for epoch in made)
    assert all(Position.parse(f"{epoch}-0") == (epoch, 0) for epoch in made)
