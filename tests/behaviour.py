"""What the upstream of the tests does, by the words of a model name, and the text it answers with.

`up:` and words, for example `up:tokens=200,rate=50` or `up:stall`. `then` separates what the first,
the second, ... request to that model gets, the last for ever: `up:status=500,then,tokens=5`.
Any other model name gets the defaults. Counting goes by the whole name, so a test that counts puts
an `id` of its own into it. An unknown word is a 400, so that a typing error is no passing test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

NEVER, HALF = -1, -2
WORDS = ("river", "stone", "light", "cloud", "amber", "field", "quiet", "north", "copper", "seven")
ODD = ("\u2028", "\u0085", "\U0001f30a", "\u2029", "é", "\u000b")
TOOL = ("get_weather", '{"city": "Oslo", "unit": "celsius", "note": "a } and a \\" inside"}')


def answer(prompt: str, tokens: int) -> list[str]:
    """The answer's tokens. Each carries its number, so that a lost, doubled or moved one shows."""
    chance = random.Random(prompt)
    return [f"{chance.choice(WORDS)}{i} " for i in range(tokens)]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one request gets. A fault's number says after how many tokens (reasoning, text and tool
    fragments together) it comes; the bare word means halfway."""

    id: str = ""  # only makes the name unique
    tokens: int = 20  # text tokens
    rate: float = 0.0  # tokens a second; 0: as fast as they go
    delay: float = 0.0  # seconds before the first token, after the headers
    headers_delay: float = 0.0  # seconds before the headers
    role_first: bool = False  # the role chunk comes before the delay
    # what the answer is made of
    echo: int = 0  # the text is the prompt itself, in tokens of so many characters
    u2028: bool = False  # characters that some line splitters take for a line's end, and an emoji
    line: int = 0  # the middle token is so many bytes long
    reasoning: int = 0  # tokens of reasoning before the text
    tool: int = 0  # calls of a tool after the text (which is then empty unless `tokens` is named)
    refusal: bool = False  # the text is a refusal
    logprobs: bool = False
    finish: str = ""  # the finish reason
    usage: int = 1  # 0: no usage, even where asked for
    # how it is written
    batch: int = 1  # events a write
    split: bool = False  # each byte a chunk and a write of its own
    crlf: bool = False  # lines end with CR LF
    comments: bool = False  # `: keepalive` between the events, and every 50 ms while waiting
    close: bool = False  # HTTP/1.1 without chunks: the body ends with the connection
    no_blank: bool = False  # the last line has no line end
    # refusals before the answer
    status: int = 200
    retry_after: str = ""  # the header's value
    flaky: int = 0  # so many requests get `status` (500 unless named), later ones the answer
    # faults in the answer
    stall: int = NEVER  # nothing more, the connection stays open
    reset: int = NEVER  # RST
    drop: int = NEVER  # FIN in the midst of the body, as from a process that was killed
    end_clean: int = NEVER  # a clean end without a finish reason
    bad_json: int = NEVER
    error_event: int = NEVER
    first_error: bool = False  # an error event is the first event
    stall_end: bool = False  # stalls after the finish reason
    late_done: float = 0.0  # seconds between the finish reason and what follows it
    no_done: bool = False  # no `[DONE]`

    @classmethod
    def parse(cls, words: str) -> Behaviour:
        """Raises ValueError naming the word that is none."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for word in filter(None, words.split(",")):
            name, equals, value = word.partition("=")
            default = defaults.get(name)
            if default is None:
                raise ValueError(f"no such behaviour: {name}")
            if isinstance(default, bool):
                chosen[name] = value not in ("0", "false")
            elif equals:
                chosen[name] = type(default)(value)
            else:
                chosen[name] = HALF if default == NEVER else 1
        if chosen.get("tool"):
            chosen.setdefault("tokens", 0)
        if chosen.get("flaky"):
            chosen.setdefault("status", 500)
        return cls(**chosen)

    @classmethod
    def of(cls, model: str, turn: int = 10**9) -> Behaviour:
        """What the request number `turn` (from 0) to this model gets; by default, a late one."""
        if not model.startswith("up:"):
            return cls()
        parts = f",{model[3:]},".split(",then,")
        return cls.parse(parts[min(turn, len(parts) - 1)])

    def text(self, prompt: str, choice: int = 0) -> list[str]:
        """The answer's text, token by token."""
        if self.echo:
            return [prompt[i : i + self.echo] for i in range(0, len(prompt), self.echo)]
        tokens = answer(f"{prompt}#{choice}" if choice else prompt, self.tokens)
        if self.u2028:
            tokens = [f"{token}{ODD[i % len(ODD)]}" for i, token in enumerate(tokens)]
        if self.line:
            tokens[len(tokens) // 2] = "x" * self.line
        return tokens

    def faults(self, total: int) -> dict[int, str]:
        """After how many tokens which fault comes."""
        kinds = ("stall", "reset", "drop", "end_clean", "bad_json", "error_event")
        places = {kind: getattr(self, kind) for kind in kinds}
        return {total // 2 if at == HALF else at: kind for kind, at in places.items()}


def expected(model: str, prompt: str, choice: int = 0) -> str:
    """The whole text that a late request to `model` gets for `prompt`."""
    return "".join(Behaviour.of(model).text(prompt, choice))


def prompt_of(messages: list[dict[str, Any]]) -> str:
    """The question: the text of the last user message."""
    content = next((m["content"] for m in reversed(messages) if m.get("role") == "user"), "")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def choice_of(delta: dict[str, Any], index: int = 0, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def tokens_of(b: Behaviour, prompt: str, n: int, limit: int) -> Iterator[dict[str, Any]]:
    """The choice objects of every token, in order: reasoning, text, tool calls, n interleaved."""
    for i in range(b.reasoning):
        for index in range(n):
            yield choice_of({"reasoning_content": f"thought{i} "}, index)
    texts = [b.text(prompt, index)[:limit] for index in range(n)]
    for column in zip(*texts, strict=True):
        for index, token in enumerate(column):
            choice = choice_of({"refusal" if b.refusal else "content": token}, index)
            if b.logprobs:
                entry = {"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}
                choice["logprobs"] = {"content": [entry], "refusal": None}
            yield choice
    for index in range(n):
        for call in range(b.tool):
            name, arguments = TOOL
            head = {"id": f"call_{index}_{call}", "type": "function"}
            for at in range(-7, len(arguments), 7):
                fragment = {"name": name, "arguments": ""} if at < 0 else {}
                function = fragment or {"arguments": arguments[at : at + 7]}
                entry = {"index": call, **(head if at < 0 else {}), "function": function}
                yield choice_of({"tool_calls": [entry]}, index)
