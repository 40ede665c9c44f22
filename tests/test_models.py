"""Which source answers which model name."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from streaming.models import ModelCall, Models, ModelSource, Piece, Route


class Source:
    """A source that only counts how often it is closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = 0

    async def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        yield [Piece("finish", "stop")]

    async def close(self) -> None:
        self.closed += 1

    def __repr__(self) -> str:
        return self.name


DEFAULT, LOCAL, OTHER, DEMO = map(Source, ("default", "local", "other", "demo"))
MODELS = Models(
    "gpt",
    DEFAULT,
    {
        "llama": (LOCAL, ["mistral", "gpt", "demo:rate=5", "unheard-of"]),
        "mistral": (OTHER, ["llama"]),
        "demo": (DEMO, []),
        "demo:rate=5": (LOCAL, []),
    },
)


def test_a_request_without_a_model_gets_the_default() -> None:
    """By its name, as the upstream knows it."""
    assert MODELS.routes("") == MODELS.routes("gpt") == [Route("gpt", DEFAULT)]


def test_an_unlisted_name_goes_to_the_default_as_it_is() -> None:
    """The upstream may know models that nobody listed here."""
    assert MODELS.routes("gpt-next") == [Route("gpt-next", DEFAULT)]
    assert MODELS.routes("LLAMA") == [Route("LLAMA", DEFAULT)]


def test_a_listed_name_goes_to_its_source_then_its_fallbacks() -> None:
    """In order, each where its own name leads; a fallback's fallbacks do not count."""
    assert MODELS.routes("llama") == [
        Route("llama", LOCAL),
        Route("mistral", OTHER),
        Route("gpt", DEFAULT),
        Route("demo:rate=5", LOCAL),
        Route("unheard-of", DEFAULT),
    ]
    assert MODELS.routes("mistral") == [Route("mistral", OTHER), Route("llama", LOCAL)]


def test_a_demo_with_knobs_is_the_listed_demo() -> None:
    """With its whole name, unless that name is listed itself."""
    assert MODELS.routes("demo:tokens=3") == [Route("demo:tokens=3", DEMO)]
    assert MODELS.routes("demo:rate=5") == [Route("demo:rate=5", LOCAL)]
    assert MODELS.routes("demonstration") == [Route("demonstration", DEFAULT)]


def test_the_demo_is_not_reached_where_it_is_not_listed() -> None:
    """Its names go to the default upstream like any other."""
    models = Models("gpt", DEFAULT, {"llama": (LOCAL, [])})
    assert models.routes("demo:fail=midway") == [Route("demo:fail=midway", DEFAULT)]


def test_the_demo_as_the_default_answers_to_any_name() -> None:
    """And with its knobs."""
    models = Models("demo", DEMO, {})
    assert models.routes("demo:rate=5") == [Route("demo:rate=5", DEMO)]
    assert models.routes("gpt-4o") == [Route("gpt-4o", DEMO)]


def test_a_default_that_is_listed_leads_where_it_is_listed() -> None:
    """A table of its own, with fallbacks, goes before the default's source."""
    models = Models("llama", DEFAULT, {"llama": (LOCAL, ["gpt"])})
    assert models.routes("") == [Route("llama", LOCAL), Route("gpt", DEFAULT)]
    assert models.names == ["llama"]


def test_names_are_the_default_and_the_listed() -> None:
    """In that order, each once."""
    assert MODELS.names == ["gpt", "llama", "mistral", "demo", "demo:rate=5"]


async def test_each_source_is_closed_once() -> None:
    """Also where several names lead to it."""
    default, shared = Source("default"), Source("shared")
    sources: list[ModelSource] = [default, shared]
    models = Models("a", sources[0], {"a": (default, []), "b": (shared, []), "c": (shared, [])})
    await models.close()
    assert (default.closed, shared.closed) == (1, 1)
