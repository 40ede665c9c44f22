"""Conversations: what a model is told of what was said before, seen where the model sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.clients import Kind, Seen, named, see, status, stop
from tests.endpoints import ENDPOINTS, Endpoint, asking, resuming
from tests.processes import Server, UpstreamProcess
from tests.readers import Message, Sse
from tests.upstream import expected

CHAT = Endpoint("POST", "/api/chat/stream", "message", "chat", done=False)
TOOL = Endpoint("POST", "/api/chat/stream", "messages", "tool")
WORDS = "tokens=8,rate=400"

JSON = dict[str, Any]


def said(content: Any) -> JSON:
    return {"role": "user", "content": content}


def answered(content: str) -> JSON:
    return {"role": "assistant", "content": content}


class Talk:
    """Somebody in a conversation."""

    def __init__(
        self, server: Server, upstream: UpstreamProcess, conversation: str, user: str = "ann"
    ) -> None:
        self.url, self.upstream = server.url, upstream
        self.conversation, self.headers = conversation, {"X-User-Id": user}

    def asking(self, message: str, model: str, **more: Any) -> Any:
        """The request, as a context; `more` as in `asking`."""
        fields = {"conversation_id": self.conversation, **more}
        headers = {**self.headers, **fields.pop("headers", {})}
        return asking(self.url, CHAT, message, model=model, headers=headers, **fields)

    async def ask(self, message: str, model: str = "", /, **more: Any) -> Seen:
        """Asks and reads the answer to its end."""
        async with self.asking(message, model or named(WORDS), **more) as answer:
            return await see(Kind("chat"), answer)

    async def context(self, message: str = "and now?") -> list[JSON]:
        """Asks, for what the model is told when one asks."""
        model = named("tokens=1")
        await self.ask(message, model)
        return self.told(model)

    def told(self, model: str) -> list[JSON]:
        """What the model was told, in the one request that it got."""
        (request,) = self.upstream.log(model)
        messages: list[JSON] = request["body"]["messages"]
        return messages


@pytest.fixture
def talk(
    relay_server: Server, upstream: UpstreamProcess, request: pytest.FixtureRequest
) -> Callable[..., Talk]:
    """Someone in a conversation that is this test's own: `talk(user="bob")`."""

    def join(conversation: str = "", **options: str) -> Talk:
        return Talk(relay_server, upstream, conversation or request.node.name, **options)

    return join


async def first_text(messages: AsyncIterator[Message]) -> str:
    """Reads up to the first text, and says it."""
    async for message in messages:
        if message.json()["type"] == "chunk":
            return str(message.json()["content"])
    raise AssertionError("no text came")


# --- context ------------------------------------------------------------------------------------


async def test_what_was_said_before(talk: Callable[..., Talk]) -> None:
    """Each question comes to the model with all questions and answers before it."""
    ann = talk()
    one, two = await ann.ask("one?"), await ann.ask("two?")
    assert await ann.context("three?") == [
        said("one?"), answered(one.text), said("two?"), answered(two.text), said("three?"),
    ]  # fmt: skip


async def test_without_a_name_it_is_a_new_one(talk: Callable[..., Talk]) -> None:
    """A message without `conversation_id` begins a conversation, which its answer names."""
    ann = talk()
    first = await ann.ask("one?", conversation_id=None)
    name = first.headers["x-conversation-id"]
    assert await talk(name).context("two?") == [said("one?"), answered(first.text), said("two?")]
    other = await ann.ask("one?", conversation_id=None)
    assert other.headers["x-conversation-id"] != name


async def test_two_tabs(talk: Callable[..., Talk]) -> None:
    """Two tabs of one conversation ask at once. The second's model is told of the first's question
    although its answer still runs, and afterwards both see both.
    """
    ann, same = talk(), talk()
    model, second = named("tokens=40,rate=100"), named(WORDS)
    async with ann.asking("one?", model) as answer:
        messages = answer.items(Sse())
        await first_text(messages)
        two = await same.ask("two?", second)
        assert same.told(second) == [said("one?"), said("two?")]
        assert [message async for message in messages]
    both = [said("one?"), said("two?"), answered(two.text), answered(expected(model, "one?"))]
    assert await ann.context("three?") == [*both, said("three?")]
    three = answered("".join(expected("up:tokens=1", "three?")))
    assert await same.context("four?") == [*both, said("three?"), three, said("four?")]


async def test_many_at_once(talk: Callable[..., Talk]) -> None:
    """Of many questions at once none is lost, and each model is told what came before."""
    asked = [f"{n}?" for n in range(20)]
    models = [named(WORDS) for _ in asked]
    seen = await asyncio.gather(*(talk().ask(*each) for each in zip(asked, models, strict=True)))
    context = await talk().context("and?")
    assert sorted(m["content"] for m in context if m["role"] == "user") == sorted([*asked, "and?"])
    answers = sorted(m["content"] for m in context if m["role"] == "assistant")
    assert answers == sorted(each.text for each in seen)
    for question, model in zip(asked, models, strict=True):
        assert talk().told(model)[-1] == said(question)


@pytest.mark.parametrize("other", [("bob", "c"), ("ann:c", ""), ("anonymous", "c")])
async def test_whose_it_is(talk: Callable[..., Talk], other: tuple[str, str]) -> None:
    """A conversation is its owner's: the same name said by another user is another conversation,
    however the two names are put together.
    """
    user, conversation = other
    name = f"c:{user.encode().hex()}"
    await talk(name, user="ann").ask("one?")
    theirs = talk((conversation and name) or name.removeprefix("c:"), user=user)
    assert await theirs.context("two?") == [said("two?")]
    assert len(await talk(name, user="ann").context()) == 3


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_the_last_messages(
    server: Callable[..., Server], upstream: UpstreamProcess, limit: int
) -> None:
    """The model is told `history.messages` of the last messages, the question itself among them."""
    model = {"name": "up:", "base_url": upstream.base}
    ann = Talk(server(model=model, history={"messages": limit}), upstream, "c")
    whole: list[JSON] = []
    for n in range(4):
        question, name = f"{n}?", named(WORDS)
        answer = await ann.ask(question, name)
        whole.append(said(question))
        assert ann.told(name) == whole[-limit:]
        whole.append(answered(answer.text))


# --- what is part of it -------------------------------------------------------------------------


async def test_a_stopped_answer_is_part_of_it(
    talk: Callable[..., Talk], relay_server: Server
) -> None:
    """What was said before a stop was said; an answer stopped before its first token was not."""
    ann = talk()
    async with ann.asking("one?", named("tokens=400,rate=50")) as answer:
        text = await first_text(answer.items(Sse()))
        stream_id = answer.headers["x-stream-id"]
        await stop(relay_server.url, stream_id, **ann.headers)
    async with resuming(relay_server.url, CHAT, f"{stream_id}-1", headers=ann.headers) as answer:
        seen = await see(Kind("chat"), answer)
    assert (seen.ending, seen.text[: len(text)]) == ("cancelled", text)
    async with ann.asking("two?", named("delay=60")) as answer:
        await stop(relay_server.url, answer.headers["x-stream-id"], **ann.headers)
    assert await ann.context("three?") == [
        said("one?"), answered(seen.text), said("two?"), said("three?"),
    ]  # fmt: skip


async def test_a_failed_answer_is_part_of_it(talk: Callable[..., Talk]) -> None:
    """What was said before a failure was said; a question that failed at once was asked."""
    ann = talk()
    seen = await ann.ask("one?", named("tokens=20,reset=10"))
    assert (seen.ending, bool(seen.text)) == ("failed", True)
    assert (await ann.ask("two?", named("status=400"))).ending == "failed"
    assert await ann.context("three?") == [
        said("one?"), answered(seen.text), said("two?"), said("three?"),
    ]  # fmt: skip


async def test_an_answer_that_nobody_waited_for(
    talk: Callable[..., Talk], relay_server: Server
) -> None:
    """A client that goes away finds the whole answer in the conversation when it comes back."""
    ann, model = talk(), named("tokens=30,rate=100")
    async with ann.asking("one?", model) as answer:
        await first_text(answer.items(Sse()))
        answer.connection.cut(rst=True)
        stream_id = answer.headers["x-stream-id"]
    while (await status(relay_server.url, stream_id, **ann.headers))["state"] == "running":
        pass
    whole = answered(expected(model, "one?"))
    assert await ann.context("two?") == [said("one?"), whole, said("two?")]


async def test_messages_of_the_client(talk: Callable[..., Talk], relay_server: Server) -> None:
    """With `messages` the model is told just these. Their last question and its answer are said in
    the conversation, so that a `message` after them finds both.
    """
    ann = talk()
    parts = [{"type": "text", "text": "a picture of "}, {"type": "text", "text": "what?"}]
    await ann.ask("one?")
    before = (await ann.context("two?"))[:2]
    for content in ("three?", parts):
        model = named(WORDS)
        messages = [{"role": "system", "content": "be brief"}, said("zero?"), said(content)]
        async with asking(
            relay_server.url, TOOL, model=model, headers=ann.headers, messages=messages,
            conversation_id=ann.conversation,
        ) as answer:  # fmt: skip
            assert answer.headers["x-conversation-id"] == ann.conversation
            seen = await see(Kind("tool"), answer)
        assert ann.told(model) == messages
        context = await ann.context("and?")
        assert context[:2] == before
        assert context[-3:] == [said(content), answered(seen.text), said("and?")]


async def test_a_shared_room(talk: Callable[..., Talk]) -> None:
    """With `room` the question is asked in a room that all share, whoever asks."""
    ann, bob = talk(user="ann"), talk(user="bob")
    room: JSON = {"room": "kitchen", "conversation_id": None}
    one = await ann.ask("one?", **room)
    model = named(WORDS)
    await bob.ask("two?", model, **room)
    assert bob.told(model) == [said("one?"), answered(one.text), said("two?")]
    assert await ann.context("three?") == [said("three?")]


# --- what is not --------------------------------------------------------------------------------


async def test_the_same_question_again(talk: Callable[..., Talk]) -> None:
    """A question repeated with its idempotency key, or with a position, is asked once."""
    ann, model = talk(), named(WORDS)
    key = {"headers": {"Idempotency-Key": "k-1"}}
    first = await ann.ask("one?", model, **key)
    again = await ann.ask("one?", model, **key)
    assert (again.stream_id, again.text) == (first.stream_id, first.text)
    resumed = {"headers": {"Last-Event-ID": f"{first.stream_id}-1"}}
    assert (await ann.ask("one?", model, **resumed)).text == first.text
    assert await ann.context("two?") == [said("one?"), answered(first.text), said("two?")]


async def test_a_refused_question(server: Callable[..., Server], upstream: UpstreamProcess) -> None:
    """A question that the server does not take leaves nothing behind: too much at once, bad input,
    a position that is gone.
    """
    config = {"model": {"name": "up:", "base_url": upstream.base}, "generation": {"max_running": 1}}
    ann = Talk(server(**config), upstream, "c")
    async with ann.asking("one?", named("delay=60")) as running:
        for key in ({}, {"Idempotency-Key": "k"}):
            async with ann.asking("two?", "up:", headers=key) as answer:
                assert answer.status == 503
                assert int(answer.headers["retry-after"]) > 0
                assert (await answer.json())["error"]["code"] == "overloaded"
        await stop(ann.url, running.headers["x-stream-id"], **ann.headers)
    bad: list[tuple[JSON, int]] = [
        ({"room": 7}, 422), ({"query": {"format": "x"}}, 422),
        ({"headers": {"Last-Event-ID": "7"}}, 410), ({"headers": {"Idempotency-Key": ""}}, 422),
    ]  # fmt: skip
    for fields, refusal in bad:
        async with ann.asking("three?", "up:", **fields) as answer:
            assert answer.status == refusal
    assert await ann.context("four?") == [said("one?"), said("four?")]


async def test_who_may_have_no_more_streams(
    server: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """They are refused before anything is begun: nothing is said, and no model is asked."""
    config = {"model": {"name": "up:", "base_url": upstream.base}}
    process = server(**config, limits={"connections_per_user": 1})
    ann, model = Talk(process, upstream, "c"), named("tokens=5")
    async with ann.asking("one?", named("delay=60")) as running:
        for endpoint in ENDPOINTS:
            async with asking(process.url, endpoint, model=model, headers=ann.headers) as answer:
                assert answer.status == 429
                assert (await answer.json())["error"]["code"] == "too_many_connections"
        async with ann.asking("two?", model) as answer:
            assert answer.status == 429
        await stop(ann.url, running.headers["x-stream-id"], **ann.headers)
    assert await ann.context("three?") == [said("one?"), said("three?")]
    assert upstream.log(model) == []
