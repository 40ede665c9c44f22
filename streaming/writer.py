"""What a model says, written into its log: parts opened and closed, text labelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streaming.errors import UpstreamError
from streaming.events import JSON
from streaming.log import Log
from streaming.markup import Label, Labeller
from streaming.models import Piece

CHARS_PER_TOKEN = 4  # of English, in the usual vocabularies; only for estimates, which say so


class _Part:
    """A stretch of one kind in an answer: text, reasoning, refusal, or one tool call."""

    def __init__(self, number: int, piece: Piece) -> None:
        self.kind = piece.kind
        self.id = piece.id
        self.name = piece.name
        self.arguments: list[str] = []
        # What every delta of this part says besides its text; the log merges on it.
        self.head: JSON = {"part": number, "kind": piece.kind}
        if piece.choice:
            self.head["choice"] = piece.choice
        if piece.kind == "tool_call":
            self.head["index"] = piece.place
        self.labeller = Labeller() if piece.kind == "text" else None
        self._label = Label("text")
        self._label_head = self.head

    def labelled(self, label: Label) -> JSON:
        """The head for text with this label; the same object as long as the label is the same."""
        if label != self._label:
            self._label = label
            self._label_head = {**self.head, "kind": label.kind}
            if label.kind == "code":
                self._label_head["language"] = label.language
            if label.kind == "image":
                self._label_head["image_url"] = label.image_url
        return self._label_head


class Writer:
    """Writes the pieces of one answer into `log`.

    choices: how many answers the model was asked for. max_bytes: of its log.
    `spoken`: something of the answer has come, so that another attempt would repeat it.
    """

    def __init__(self, log: Log, choices: int, max_bytes: int) -> None:
        self.spoken = False
        self.finish_reasons: dict[int, str] = {}
        self._log = log
        self._choices = choices
        self._max_bytes = max_bytes
        self._parts = 0
        self._chars = 0  # of the answer, its arguments and thoughts
        self._speech: dict[int, _Part] = {}  # the open part of each choice that is no tool call
        self._tools: dict[tuple[int, int], _Part] = {}
        self._usage: Mapping[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether the model has said that it is done, so that only usage may still come."""
        return len(self.finish_reasons) >= self._choices

    @property
    def whole(self) -> bool:
        """Whether the answer may end here: every choice that the model began is done. Many
        upstreams, and the demo model, give one however many are asked for.
        """
        begun = {*self._speech, *(choice for choice, _ in self._tools)}
        return bool(self.finish_reasons) and begun <= self.finish_reasons.keys()

    def write(self, pieces: Iterable[Piece]) -> None:
        """Appends what these pieces mean. Raises UpstreamError: too_long."""
        for piece in pieces:
            match piece.kind:
                case "finish":
                    self.finish_reasons.setdefault(piece.choice, piece.text)
                case "usage":
                    self._usage = piece.extra
                case "tool_call":
                    self.spoken = True
                    self._tool_call(piece)
                case _:
                    self.spoken = True
                    self._say(piece)
        if self._log.size > self._max_bytes:
            raise UpstreamError("too_long", f"the answer passed {self._max_bytes} bytes")

    def _say(self, piece: Piece) -> None:
        self._chars += len(piece.text)
        part = self._speech.get(piece.choice)
        if part is None or part.kind != piece.kind:
            self._close_speech(piece.choice)
            part = self._speech[piece.choice] = self._open(piece)
        if piece.extra:
            # Log probabilities and the like belong to this very delta: it stands alone.
            self._flush_labeller(part)
            data = {**part.head, "content": piece.text, "extra": piece.extra}
            self._log.append("delta", data)
        elif part.labeller is not None:
            for label, text in part.labeller.feed(piece.text):
                self._log.extend(part.labelled(label), text)
        else:
            self._log.extend(part.head, piece.text)

    def _tool_call(self, piece: Piece) -> None:
        part = self._tools.get((piece.choice, piece.place))
        if part is None:
            self._close_speech(piece.choice)
            part = self._tools[piece.choice, piece.place] = self._open(piece)
        if piece.text:
            self._chars += len(piece.text)
            part.arguments.append(piece.text)
            self._log.extend(part.head, piece.text)

    def _open(self, piece: Piece) -> _Part:
        part = _Part(self._parts, piece)
        self._parts += 1
        names = {"id": piece.id, "name": piece.name} if piece.kind == "tool_call" else {}
        self._log.append("part_started", {**part.head, **names})
        return part

    def _close_speech(self, choice: int) -> None:
        part = self._speech.pop(choice, None)
        if part is not None:
            self._flush_labeller(part)
            self._log.append("part_finished", part.head)

    def _flush_labeller(self, part: _Part) -> None:
        if part.labeller is not None:
            for label, text in part.labeller.close():
                self._log.extend(part.labelled(label), text)
            part.labeller = Labeller()

    def close_parts(self) -> None:
        """Appends what was held back, and the end of every part that is open."""
        for choice in list(self._speech):
            self._close_speech(choice)
        for part in self._tools.values():
            call = {"id": part.id, "name": part.name, "arguments": "".join(part.arguments)}
            self._log.append("part_finished", {**part.head, **call})
        self._tools.clear()

    def usage(self, messages: Sequence[Mapping[str, Any]]) -> JSON:
        """Tokens used, as the upstream counted them; else an estimate from the number of
        characters of `messages` and of the answer, with `estimated: true`.
        """
        if self._usage is not None:
            prompt = _count(self._usage.get("prompt_tokens"))
            completion = _count(self._usage.get("completion_tokens"))
            total = _count(self._usage.get("total_tokens")) or prompt + completion
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
            return {**self._usage, **usage, "total_tokens": total}
        prompt = -(-sum(map(message_chars, messages)) // CHARS_PER_TOKEN)
        completion = -(-self._chars // CHARS_PER_TOKEN)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        return {**usage, "total_tokens": prompt + completion, "estimated": True}


def message_chars(message: Mapping[str, Any]) -> int:
    """Characters of text in one message of a request; images and the like count nothing."""
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Sequence):
        texts = (part.get("text") for part in content if isinstance(part, Mapping))
        return sum(len(text) for text in texts if isinstance(text, str))
    return 0


def _count(value: object) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 53 else 0
