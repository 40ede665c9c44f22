"""Model sources: what a model call is, what a model says, and which source answers which name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class Piece(NamedTuple):
    """One thing a model said, in the order it said it.

    kind       text                     meaning of the other fields
    text       answer text              extra: unknown delta fields and logprobs, if any
    reasoning  thoughts                 extra as above
    refusal    refusal text
    tool_call  a fragment of arguments  place: which call; id, name: only with its first fragment
    finish     the finish reason
    usage      ""                       extra: {prompt_tokens, completion_tokens, total_tokens, ...}

    choice: which of `n` answers it belongs to (0 unless the client asked for several).
    """

    kind: str
    text: str = ""
    choice: int = 0
    place: int = 0
    id: str = ""
    name: str = ""
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One question to a model. `params` are the request's other fields, passed on untouched;
    headers: to be sent to the upstream besides its own, a trace's say.
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class ModelSource(Protocol):
    """Where model output comes from. name: what the operator calls it."""

    name: str

    def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        """The answer in batches (never empty): what one read of the source gave, adjacent text of
        one choice joined. A `finish` piece comes once a choice, then perhaps `usage`; then it ends.

        The consumer may take its time between two batches: the source then stops reading, so that
        the next batch gathers what came meanwhile. Raises UpstreamError. Closing the generator or
        cancelling the task that reads it closes the upstream connection at once.
        """

    async def close(self) -> None:
        """Gives back connections. Streams that still run are cut."""


class Route(NamedTuple):
    """Where a model name leads: the source, and what the model is called there."""

    model: str
    source: ModelSource


class Models:
    """Which source answers which name.

    default_name and default: for a request without a model, and for a name that is not listed,
    which goes to the default source as it is. listed: name -> (source, names to fall back to, in
    order). A name `demo:...` is found under `demo`.
    """

    def __init__(
        self,
        default_name: str,
        default: ModelSource,
        listed: Mapping[str, tuple[ModelSource, Sequence[str]]],
    ) -> None:
        self.default_name = default_name
        self._default = default
        self._listed = listed

    @property
    def names(self) -> list[str]:
        """What `/v1/models` lists, the default first."""
        return list(dict.fromkeys([self.default_name, *self._listed]))

    def routes(self, name: str) -> list[Route]:
        """The way for this model name ("" is the default), then its fallbacks."""
        name = name or self.default_name
        source, fallbacks = self._find(name)
        return [Route(name, source), *(Route(other, self._find(other)[0]) for other in fallbacks)]

    def _find(self, name: str) -> tuple[ModelSource, Sequence[str]]:
        family = "demo" if name.startswith("demo:") else name
        return self._listed.get(name) or self._listed.get(family) or (self._default, ())

    async def close(self) -> None:
        """Closes every source, each once."""
        sources = [self._default, *(source for source, _ in self._listed.values())]
        for source in {id(source): source for source in sources}.values():
            await source.close()
