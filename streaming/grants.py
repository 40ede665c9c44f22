"""Grants: which rooms, by pattern, and what may be done in them."""

from __future__ import annotations

from dataclasses import dataclass

ACTIONS = ("subscribe", "publish", "generate", "moderate")
USUAL = ACTIONS[:3]  # what a pattern without actions gives
PERSONAL = ("conv:", "user:")  # rooms that belong to somebody


@dataclass(frozen=True, slots=True)
class Grants:
    """Patterns with their actions. In a pattern `*` is any text; all else is itself."""

    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def read(cls, value: object) -> Grants:
        """From a list of patterns, which gives the usual actions, or an object of pattern and list
        of actions. Raises ValueError.
        """
        if isinstance(value, list):
            value = dict.fromkeys(value, USUAL) if all(type(p) is str for p in value) else None
        if not isinstance(value, dict):
            raise ValueError("must be a list of room patterns, or a table of pattern and actions")
        for pattern, actions in value.items():
            known = isinstance(actions, list | tuple) and all(a in ACTIONS for a in actions)
            if not (isinstance(pattern, str) and pattern and known):
                raise ValueError(f"must give each pattern a list of {', '.join(ACTIONS)}")
        return cls(tuple((pattern, tuple(actions)) for pattern, actions in value.items()))

    def have(self, action: str) -> bool:
        """Whether one of them gives this action, in whichever room."""
        return any(action in actions for _, actions in self.rules)

    def allow(self, action: str, room: str) -> bool:
        """Whether one of them gives this action in this room. A personal room must be spelled:
        `*` alone does not reach it.
        """
        spelled = next((prefix for prefix in PERSONAL if room.startswith(prefix)), "")
        return any(
            action in actions and pattern.startswith(spelled) and _matches(pattern, room)
            for pattern, actions in self.rules
        )


def _matches(pattern: str, room: str) -> bool:
    """In one pass, whatever the pattern: a regular expression with many `*` can take for ever."""
    head, *pieces = pattern.split("*")
    if not pieces:
        return room == pattern
    *pieces, tail = pieces
    at, end = len(head), len(room) - len(tail)
    if at > end or not (room.startswith(head) and room.endswith(tail)):
        return False
    for piece in pieces:
        at = room.find(piece, at, end) + len(piece)
        if at < len(piece):
            return False
    return True
