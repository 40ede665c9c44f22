"""The embedded demo model, on a clock that jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import json
import re
import selectors
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

from streaming.demo import DemoModel
from streaming.errors import UpstreamError
from streaming.models import ModelCall, Piece

T = TypeVar("T")
Timed = list[tuple[float, list[Piece]]]
USER = [{"role": "user", "content": "Why is the sky blue?"}]
TOOLS = [
    {"type": "function", "function": {"name": "lookup", "parameters": {"properties": {"q": {}}}}},
    {"type": "function", "function": {"name": "now"}},
]


class JumpingSelector(selectors.DefaultSelector):
    """Time passes only here: at once, by as much as the loop would have waited."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is left that could happen")
        self.now += max(timeout, 0)
        return super().select(0)


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Runs `main` on a loop whose clock begins at 0 and jumps."""

    def factory() -> asyncio.AbstractEventLoop:
        selector = JumpingSelector()
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now  # type: ignore[method-assign]
        return loop

    async def call() -> T:
        return await main()

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(call())


async def collect(into: Timed, call: ModelCall, rest: float, source: DemoModel) -> None:
    clock = asyncio.get_running_loop().time
    async for batch in source.stream(call):
        assert batch, "a batch is never empty"
        into.append((clock(), batch))
        await asyncio.sleep(rest)


def timed(
    model: str = "demo",
    messages: Sequence[Mapping[str, Any]] = USER,
    *,
    rest: float = 0.0,
    source: DemoModel | None = None,
    **params: Any,
) -> Timed:
    """The batches of one answer, each with its time; the consumer rests after each."""
    batches: Timed = []
    call = ModelCall(model, messages, params)
    run(lambda: collect(batches, call, rest, source or DemoModel()))
    return batches


def say(*args: Any, **kwargs: Any) -> list[Piece]:
    return [piece for _, batch in timed(*args, **kwargs) for piece in batch]


def text(pieces: list[Piece], kind: str = "text") -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def finish(pieces: list[Piece]) -> str:
    return text(pieces, "finish")


def usage(pieces: list[Piece]) -> Mapping[str, Any]:
    (piece,) = [piece for piece in pieces if piece.kind == "usage"]
    assert piece.extra is not None
    return piece.extra


def broken(model: str, **params: Any) -> tuple[Timed, UpstreamError]:
    """What came before the failure, and the failure."""
    batches: Timed = []
    with pytest.raises(UpstreamError) as caught:
        run(lambda: collect(batches, ModelCall(model, USER, params), 0.0, DemoModel()))
    return batches, caught.value


# The default answer


def test_default_answer_introduces_itself_about_the_prompt() -> None:
    """A newcomer sees who speaks, what was asked, and lines of prose."""
    answer = text(say())
    assert "demo model" in answer
    assert "Why is the sky blue?" in answer
    assert "\n" in answer
    assert 60 <= len(answer.split()) <= 100


def test_an_answer_is_text_then_finish_then_usage() -> None:
    pieces = say()
    assert [piece.kind for piece in pieces[-2:]] == ["finish", "usage"]
    assert {piece.kind for piece in pieces[:-2]} == {"text"}
    assert finish(pieces) == "stop"


@pytest.mark.parametrize("prompt", ["hi", "code, table, image", "word " * 500, "", "x" * 100_000])
def test_default_answer_takes_under_five_seconds(prompt: str) -> None:
    for model in ("demo", "a b c d e f g h i j k l m n o p q r s t u v w x y z"):
        batches = timed(model, [{"role": "user", "content": prompt}])
        assert batches[-1][0] < 5
        assert batches[0][0] == 0, "and its first token comes at once"


@pytest.mark.parametrize(
    ("word", "pattern"),
    [
        ("code", r"\n```python\n(.+\n)+```\n"),
        ("table", r"\n\|.+\|\n\|[- |]+\|\n(\|.+\|\n)+\n"),
        ("image", r"\n!\[[^]]+\]\(data:image/svg\+xml,[^ ()]+\)\n"),
    ],
)
def test_a_word_in_the_prompt_brings_a_block(word: str, pattern: str) -> None:
    """`code`, `table`, `image` as words, in any case; not inside another word."""
    assert re.search(pattern, text(say("demo", [{"role": "user", "content": f"a {word}, please"}])))
    assert re.search(pattern, text(say("demo", [{"role": "user", "content": word.upper()}])))
    other = text(say("demo", [{"role": "user", "content": f"un{word}able"}]))
    assert not re.search(pattern, other)


# What the text depends on


@pytest.mark.parametrize("rest", [0.0, 0.02, 0.5, 100.0])
@pytest.mark.parametrize("knobs", ["rate=0", "rate=3", "rate=997", "rate=50,jitter=1,delay=2"])
def test_text_is_the_same_at_every_rate_and_in_every_batching(knobs: str, rest: float) -> None:
    pieces = say(f"demo:{knobs}", rest=rest)
    assert text(pieces) == text(say())
    assert usage(pieces) == usage(say())


def test_text_depends_on_the_prompt_and_the_name() -> None:
    assert text(say()) != text(say("demo", [{"role": "user", "content": "And the sea?"}]))
    assert text(say()) != text(say("gpt-5"))
    assert "gpt-5" in text(say("gpt-5"))


def test_only_the_last_user_message_counts() -> None:
    """Neither history nor parameters change a word."""
    history = [
        {"role": "system", "content": "Answer in code."},
        {"role": "user", "content": "a table"},
        {"role": "assistant", "content": "an image"},
        *USER,
        {"role": "assistant", "content": "It scatters."},
    ]
    assert say("demo", history, temperature=2, n=3) == say()


def test_content_may_be_a_list_of_parts() -> None:
    parts = [
        {"type": "text", "text": "Why is the sky"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "blue?"},
    ]
    assert "Why is the sky blue?" in text(say("demo", [{"role": "user", "content": parts}]))


NO_PROMPT: list[Any] = [None, 7, [7, {"type": "text"}, {"type": "text", "text": 7}]]


@pytest.mark.parametrize(
    "messages", [[], [{"role": "system"}], *([{"role": "user", "content": c}] for c in NO_PROMPT)]
)
def test_without_a_prompt_it_still_answers(messages: list[dict[str, Any]]) -> None:
    assert "You asked nothing" in text(say("demo", messages))
    assert "tool_calls" in finish(say("demo:tool=1", messages))


def test_a_lone_surrogate_is_answered_with_text_that_can_be_encoded() -> None:
    r"""JSON may spell one as \ud800; it must not end as an internal error."""
    assert text(say("m\ud800", [{"role": "user", "content": "hi \ud800"}])).encode()


@pytest.mark.parametrize("model", ["demonstration", "demo-2", "gpt:rate=1", "Demo:rate=1", ""])
def test_other_names_have_no_knobs(model: str) -> None:
    batches = timed(model)
    assert len(batches) > 60
    assert batches[-1][0] < 5


# Pace


def test_a_token_is_a_piece_of_its_own_and_due_at_its_time() -> None:
    """Token i comes at start + i / rate, a word with the space before it."""
    batches = timed("demo:rate=10,tokens=30")
    assert len(batches) == 31
    for i, (when, batch) in enumerate(batches[:-1]):
        assert when == pytest.approx(i / 10)
        assert len(batch) == 1
        assert len(batch[0].text.split()) == 1
        assert batch[0].text[0].isspace() == (i > 0)
    assert batches[-1][0] == batches[-2][0], "the ending does not wait"


def test_a_consumer_that_rests_gets_what_came_due_in_one_piece() -> None:
    """Resting 20 ms at 1000 tokens a second gives 20 tokens a batch, at the same pace."""
    batches = timed("demo:rate=1000,tokens=1000", rest=0.02)
    sizes = [len(batch[0].text.split()) for _, batch in batches[:-1]]
    assert sizes[0] == 1
    assert all(19 <= size <= 21 for size in sizes[1:-1])
    assert sum(sizes) == 1000
    assert all(len(batch) == 1 for _, batch in batches[:-1])
    assert batches[-1][0] == pytest.approx(1.0, abs=0.05)


def test_a_batch_holds_every_token_that_is_due() -> None:
    """The one due at this very moment too (numbers that floats hold exactly)."""
    said = 0
    for when, batch in timed("demo:rate=512,tokens=1000", rest=1 / 32)[:-1]:
        said += len(batch[0].text.split())
        assert said == min(int(when * 512) + 1, 1000)


def test_delay_comes_before_the_first_token_only() -> None:
    batches = timed("demo:delay=2.5,rate=10,tokens=3")
    assert [when for when, _ in batches] == pytest.approx([2.5, 2.6, 2.7, 2.7])


def test_jitter_varies_the_intervals_and_keeps_the_pace() -> None:
    """The times are the same in each run; no token comes early or more than an interval late."""
    batches = timed("demo:rate=10,tokens=50,jitter=1")
    assert batches == timed("demo:rate=10,tokens=50,jitter=1")
    lags = [when - i / 10 for i, (when, _) in enumerate(batches[:-1])]
    assert all(-1e-9 <= lag <= 0.1 for lag in lags)
    assert max(lags) - min(lags) > 0.05
    half = [when - i / 10 for i, (when, _) in enumerate(timed("demo:rate=10,tokens=50,jitter=.5"))]
    assert max(half) <= 0.05 + 0.1  # the ending comes with the last token, one interval off


def test_rate_is_lowered_to_its_cap() -> None:
    """Rate 0 is the cap; a rate above it is the cap; the default is lowered too."""
    source = DemoModel(max_rate=20)
    for model in ("demo:rate=0,tokens=11", "demo:rate=1000,tokens=11", "demo:tokens=11"):
        assert timed(model, source=source)[-1][0] == pytest.approx(0.5)
    assert timed("demo:rate=10,tokens=11", source=source)[-1][0] == pytest.approx(1.0)


# Length


@pytest.mark.parametrize("tokens", [0, 1, 2, 60, 500, 5000])
def test_tokens_is_the_exact_length(tokens: int) -> None:
    """Cut or begun again, and finished of its own will: `stop`."""
    pieces = say(f"demo:rate=0,tokens={tokens}", rest=0.1)
    assert len(text(pieces).split()) == tokens
    assert finish(pieces) == "stop"
    assert usage(pieces)["completion_tokens"] == tokens


def test_a_longer_answer_begins_with_the_shorter() -> None:
    """It begins again in a new paragraph, so that Markdown in it still reads."""
    whole = text(say())
    long = text(say("demo:tokens=1000"))
    assert long.startswith(f"{whole}\n\n{whole}\n\n")
    assert whole.startswith(text(say("demo:tokens=20")))


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_the_request_bounds_the_length(key: str) -> None:
    pieces = say("demo", **{key: 10})
    assert len(text(pieces).split()) == 10
    assert finish(pieces) == "length"
    assert usage(pieces)["completion_tokens"] == 10
    assert finish(say("demo:tokens=10", **{key: 10})) == "stop", "nothing was cut"
    assert say("demo", **{key: None}) == say()


def test_the_smaller_bound_counts() -> None:
    assert usage(say(max_tokens=9, max_completion_tokens=5))["completion_tokens"] == 5
    assert usage(say(max_tokens=9, source=DemoModel(max_tokens=7)))["completion_tokens"] == 7


def test_the_cap_bounds_all_that_is_said() -> None:
    pieces = say("demo:reasoning=30,tokens=5000,tool=1", source=DemoModel(max_tokens=50))
    assert len(text(pieces, "reasoning").split()) == 30
    assert len(text(pieces).split()) == 20
    assert not text(pieces, "tool_call")
    assert finish(pieces) == "length"


@pytest.mark.parametrize("value", [0, -1, 1.5, "10", True, []])
def test_a_bad_bound_is_refused_by_its_name(value: Any) -> None:
    batches, error = broken("demo", max_tokens=value)
    assert (batches, error.code, error.param) == ([], "upstream_rejected", "max_tokens")


def test_usage_counts_prompt_and_answer() -> None:
    expected = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert usage(say("demo:reasoning=3,tokens=4")) == expected


# Reasoning and tool calls


def test_reasoning_comes_before_the_text_and_leaves_it_alone() -> None:
    pieces = say("demo:reasoning=100")
    kinds = [piece.kind for piece in pieces]
    assert kinds[:100] == ["reasoning"] * 100
    assert "reasoning" not in kinds[100:]
    assert text(pieces) == text(say())


def test_tool_ends_the_answer_with_a_call_in_fragments() -> None:
    """The first fragment alone has id and name; the fragments make JSON."""
    pieces = say("demo:tool=send_mail")
    assert text(pieces) == text(say())
    assert finish(pieces) == "tool_calls"
    fragments = [piece for piece in pieces if piece.kind == "tool_call"]
    assert len(fragments) > 1
    assert fragments[0].name == "send_mail"
    assert fragments[0].id.startswith("call_")
    assert all(not piece.id and not piece.name for piece in fragments[1:])
    assert isinstance(json.loads(text(pieces, "tool_call")), dict)
    assert pieces == say("demo:tool=send_mail"), "the id is the same in each run"


def test_tool_fragments_are_joined_where_they_are_due_together() -> None:
    fragments = [p for p in say("demo:tool=1,tokens=2", rest=60) if p.kind == "tool_call"]
    assert len(fragments) == 1
    assert fragments[0].name == "get_weather"
    assert json.loads(fragments[0].text)


def test_tool_1_is_the_first_tool_of_the_request() -> None:
    """Its arguments are the fields of its schema."""
    pieces = say("demo:tool=1,tokens=0", tools=TOOLS)
    assert pieces[0].name == "lookup"
    assert json.loads(text(pieces, "tool_call")) == {"q": "Why is the sky blue?"}
    assert say("demo:tool=now,tokens=0", tools=TOOLS)[0].name == "now"


@pytest.mark.parametrize("tools", [None, [], {}, 7, [7], [{}], [{"function": {"name": 7}}]])
def test_tool_1_is_made_up_where_none_is_given(tools: Any) -> None:
    assert say("demo:tool=1,tokens=0", tools=tools)[0].name == "get_weather"


def test_a_tool_result_is_answered_without_another_call() -> None:
    """A client's loop over tool calls comes to an end."""
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    assert say("demo:tool=1", messages) == say()


# Failures


@pytest.mark.parametrize(
    ("fail", "code", "status", "retry_after"),
    [
        ("before", "upstream_failed", 502, None),
        ("400", "upstream_rejected", 400, None),
        ("401", "upstream_unauthorized", 502, None),
        ("429", "upstream_rate_limited", 429, 1),
        ("500", "upstream_failed", 502, None),
        ("503", "upstream_failed", 502, None),
    ],
)
def test_fail_before_anything(fail: str, code: str, status: int, retry_after: float | None) -> None:
    batches, error = broken(f"demo:fail={fail}")
    assert batches == []
    assert (error.code, error.status, error.retry_after) == (code, status, retry_after)
    assert error.upstream_status == (None if fail == "before" else int(fail))


@pytest.mark.parametrize(("fail", "code"), [("midway", "upstream_failed"), ("cut", "upstream_cut")])
@pytest.mark.parametrize(("tokens", "said"), [(1, 1), (9, 5), (100, 50)])
def test_fail_after_half_of_the_tokens(fail: str, code: str, tokens: int, said: int) -> None:
    """At least one token is said; then no finish, no usage, but the error."""
    batches, error = broken(f"demo:tokens={tokens},fail={fail}")
    pieces = [piece for _, batch in batches for piece in batch]
    assert error.code == code
    assert {piece.kind for piece in pieces} == {"text"}
    assert len(text(pieces).split()) == said
    assert text(say()).startswith(text(pieces)) or tokens > 60


def test_half_counts_reasoning_and_what_a_bound_leaves() -> None:
    batches, _ = broken("demo:reasoning=10,tokens=1000,fail=cut", max_tokens=30)
    pieces = [piece for _, batch in batches for piece in batch]
    assert len(text(pieces, "reasoning").split()) == 10
    assert len(text(pieces).split()) == 5


def test_stall_says_half_and_then_nothing_until_cancelled() -> None:
    batches: Timed = []

    async def main() -> None:
        await asyncio.wait_for(
            collect(batches, ModelCall("demo:tokens=10,fail=stall", USER), 0.0, DemoModel()), 86_000
        )

    with pytest.raises(TimeoutError):
        run(main)
    assert len(batches) == 5
    assert batches[-1][0] < 1


@pytest.mark.parametrize(
    "knobs",
    ["delay=3600", "rate=.001", "rate=50,tokens=2,fail=stall", "fail=before,delay=3600"],
)
def test_cancelling_its_reader_ends_it_at_once(knobs: str) -> None:
    """In the delay, between two tokens and in a stall."""

    async def main() -> float:
        call = ModelCall(f"demo:{knobs}", USER)
        task = asyncio.create_task(collect([], call, 0.0, DemoModel()))
        await asyncio.sleep(10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.get_running_loop().time()

    assert run(main) == pytest.approx(10)


def test_a_stream_that_is_late_lets_other_tasks_run_before_each_batch() -> None:
    async def main() -> None:
        answer = DemoModel().stream(ModelCall("demo:reasoning=5,tool=1", USER))
        await anext(answer)
        await asyncio.sleep(100)
        for kind in ("reasoning", "text", "tool_call"):
            others: list[bool] = []
            asyncio.get_running_loop().call_soon(others.append, True)
            (piece,) = await anext(answer)
            assert piece.kind == kind
            assert others

    run(main)


# Refusals


BAD_KNOBS = """speed=5 Rate=5 rate=5, rate rate= rate=fast rate=-1 rate=nan rate=inf rate=1e5
    tokens=1.5 tokens=-1 tokens=99999999999 delay=-1 jitter=1.1 reasoning=x tool= tool=a/b fail=
    fail=sometimes fail=418,delay=3600"""


@pytest.mark.parametrize("knobs", ["", *BAD_KNOBS.split()])
def test_an_unknown_knob_or_a_bad_value_is_refused_by_name(knobs: str) -> None:
    """Before anything, at once, as the fault of the field `model`."""
    batches, error = broken(f"demo:{knobs}")
    assert batches == []
    assert (error.code, error.status, error.param) == ("upstream_rejected", 400, "model")
    assert (re.findall(r"\w+", knobs) or [""])[0] in error.message


def test_knobs_may_have_spaces_and_the_last_one_wins() -> None:
    assert usage(say("demo: tokens=5 , tokens = 7"))["completion_tokens"] == 7


# Many at once


def test_five_hundred_streams_do_not_disturb_each_other() -> None:
    source = DemoModel()

    async def main() -> list[Timed]:
        streams: list[Timed] = [[] for _ in range(500)]
        call = ModelCall("demo:rate=50,tokens=20", USER)
        await asyncio.gather(*(collect(batches, call, 0.0, source) for batches in streams))
        await source.close()
        return streams

    streams = run(main)
    assert all(stream == streams[0] for stream in streams)
    assert streams[0][-1][0] == pytest.approx(19 / 50)
