"""Markdown as it streams: which text is fenced code, a table, an image. The text is never altered.

    line start --"```" or "~~~"--> opening line ---newline--> code ---closing fence's newline--> line start
               --"|"-------------> table row ------newline--> line start
               --anything else---> text -----------newline--> line start
    text --"!["--> image --")"--> text        text --"`"--> span --"`"--> text

Held back is what could still become a marker, and no more than the bounds below; in code nothing.
A span of inline code is text in which no image begins; an open one ends with its line at the latest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

# Characters held back at most. A model may write "|" or "![" and then never end that line.
MAX_FENCE = 256  # a longer opening line is code without a language; a longer line closes no code
MAX_ROW = 4096  # a longer row goes out in pieces
MAX_IMAGE = 2048  # a longer image is text (data: URLs are)


class Label(NamedTuple):
    """What a stretch of text is. language: of code, "" where it says none. image_url: of an image."""

    kind: Literal["text", "code", "table", "image"]
    language: str = ""
    image_url: str = ""


TEXT = Label("text")
TABLE = Label("table")

# What matters within a line of text. A newline only matters where the next line might be no text, so
# that most of a large chunk is passed over in one search.
_MARK = re.compile(r"\n(?= {0,3}(?:[|`~]|\Z))|`|!(?=\[|\Z)|\\(?=[!`\\]|\Z)")
_SPAN_END = re.compile(r"[`\n]")
_LINE = re.compile(
    r" {0,3}(?:(?P<row>\|)"
    r"|(?P<ticks>`{3,})(?P<info>[^`\n]*)|(?P<tildes>~{3,})(?P<any_info>[^\n]*)"
    r"|(?:`{0,2}|~{0,2})\Z)"  # nothing yet, but it could become a fence or a row
)
_CLOSING = re.compile(r" {0,3}(`{3,}|~{3,})[ \t\r]*")

# An image, one character at a time: state -> character -> state; "" is any other character, or, as
# a state, no image. A table and not a pattern, which would begin again with every piece.
_IMAGE: dict[str, dict[str, str]] = {
    "start": {"!": "!"},
    "!": {"[": "alt"},
    "alt": {"]": "alt]", "[": "", "": "alt"},
    "alt]": {"(": "("},
    "(": {" ": "(", "\t": "(", "<": "<", "(": "", ")": "", "": "url"},
    "<": {">": "", "<": "", "": "<url"},
    "<url": {">": "gap", "<": "", "": "<url"},
    "url": {" ": "gap", "\t": "gap", "(": "url(", ")": "done", "": "url"},
    "url(": {" ": "", "\t": "", "(": "", ")": "url", "": "url("},
    "gap": {" ": "gap", "\t": "gap", '"': '"', "'": "'", "(": "title(", ")": "done"},
    '"': {'"': "end", "": '"'},
    "'": {"'": "end", "": "'"},
    "title(": {")": "end", "(": "", "": "title("},
    "end": {" ": "end", "\t": "end", ")": "done"},
}
_URL = re.compile(r"!\[(?:\\.|[^]\\])*\]\([ \t]*(?:<((?:\\.|[^>\\])*)|((?:\\.|[^ \t\\])*))")
_ESCAPE = re.compile(r"\\([!-/:-@[-`{-~])")

_BAR = re.compile(r"(?<!\\)\|")
_DELIMITER = re.compile(r":?-+:?")


class Labeller:
    """Labels one text that arrives in pieces. How it was cut into pieces changes no label.

    A step labels text[start:end] and sets the step that goes on from there; end == start is: hold
    this back until more has come. text[start:seen] has been looked at by an earlier call.
    """

    __slots__ = (
        "_code", "_code_line", "_fence", "_held", "_image_last", "_image_state", "_step",
    )  # fmt: skip

    _step: Callable[[Labeller, str, int, int], tuple[Label, int]]

    def __init__(self) -> None:
        self._step = Labeller._at_line_start
        self._held = ""
        self._code = TEXT  # the label of the code block it is in,
        self._fence = ""  # the fence that opened it,
        self._code_line = ""  # and the line of it that has begun, as far as it could close it
        self._image_state = ""  # of the image that is held back, in _IMAGE,
        self._image_last = ""  # and its last character, "" if a backslash escapes it

    def feed(self, text: str) -> list[tuple[Label, str]]:
        """Takes the next piece and gives what can be labelled now, in order, adjacent text with the
        same label joined. Never fails.
        """
        if self._step is _IN_TEXT and text and _MARK.search(text) is None:
            return [(TEXT, text)]  # most pieces
        seen = len(self._held)
        text = self._held + text
        labelled: list[tuple[Label, str]] = []
        label, begin, start = TEXT, 0, 0
        while start < len(text):
            found, end = self._step(self, text, start, seen)
            if end == start:
                break
            if found != label and start > begin:
                labelled.append((label, text[begin:start]))
                begin = start
            label, seen, start = found, end, end
        if start > begin:
            labelled.append((label, text[begin:start]))
        self._held = text[start:]
        return labelled

    def close(self) -> list[tuple[Label, str]]:
        """The text is at its end: gives what was held back. What is fed after it is a new text."""
        held, step = self._held, self._step
        self._held, self._step = "", _AT_LINE_START
        if not held:
            return []
        label, _ = step(self, held + "\n", 0, len(held))  # the end of a text ends its line
        self._step = _AT_LINE_START
        return [(label, held)]

    def _at_line_start(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        limit = start + MAX_FENCE
        match = _LINE.match(text, start, limit)
        if match is None:
            return self._in_text(text, start, seen)
        if match["row"]:
            return self._in_row(text, start, seen)
        fence, end = match["ticks"] or match["tildes"], match.end()
        if end == len(text) and end < limit:
            return TEXT, start
        if end < limit and text[end] != "\n":  # a backtick after ``` is inline code
            return self._in_text(text, start, seen)
        self._step, self._fence = _IN_CODE, fence
        if end == limit:
            self._code, self._code_line = Label("code"), text[start:end]
            return self._code, end
        words = (match["info"] or match["any_info"] or "").split(maxsplit=1)
        self._code, self._code_line = Label("code", words[0] if words else ""), ""
        return self._code, end + 1

    def _in_code(self, text: str, start: int, _: int) -> tuple[Label, int]:
        newline = text.find("\n", start)
        if newline < 0:
            if len(self._code_line) < MAX_FENCE:
                self._code_line += text[start : start + MAX_FENCE]
            return self._code, len(text)
        line = self._code_line + text[start:newline]
        self._code_line = ""
        closing = _CLOSING.fullmatch(line) if len(line) < MAX_FENCE else None
        if closing and closing[1].startswith(self._fence):
            self._step = _AT_LINE_START
        return self._code, newline + 1

    def _in_row(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        newline = text.find("\n", seen)
        if newline < 0 and len(text) - start < MAX_ROW:
            self._step = _IN_ROW
            return TABLE, start
        self._step = _AT_LINE_START if newline >= 0 else _IN_LONG_ROW
        return TABLE, newline + 1 or len(text)

    def _in_long_row(self, text: str, start: int, _: int) -> tuple[Label, int]:
        newline = text.find("\n", start)
        if newline >= 0:
            self._step = _AT_LINE_START
        return TABLE, newline + 1 or len(text)

    def _in_text(self, text: str, start: int, _: int) -> tuple[Label, int]:
        self._step = _IN_TEXT
        mark = _MARK.search(text, start)
        if mark is None:
            return TEXT, len(text)
        if mark[0] == "!":
            self._step, self._image_state, self._image_last = _IN_IMAGE, "start", ""
            at = mark.start()
            return (TEXT, at) if at > start else self._in_image(text, at, at)
        self._step = _AFTER[mark[0]]
        return TEXT, mark.end()

    def _after_backslash(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        self._step = _IN_TEXT
        escapes = text[start] in "!`\\"
        return (TEXT, start + 1) if escapes else self._in_text(text, start, seen)

    def _in_span(self, text: str, start: int, _: int) -> tuple[Label, int]:
        end = _SPAN_END.search(text, start)
        if end is None:
            return TEXT, len(text)
        self._step = _IN_TEXT if end[0] == "`" else _AT_LINE_START
        return TEXT, end.end()

    def _in_image(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        state, last = self._image_state, self._image_last
        stop = min(len(text), start + MAX_IMAGE)
        for at in range(seen, stop):
            char = text[at]
            if char == "\n" or (char == "[" and last == "!" and state != "!"):
                break  # an image within is the one that counts, so no character is tried twice
            steps = _IMAGE[state]
            last = "" if last == "\\" else char
            state = steps.get(last, steps.get("", ""))
            if state == "done":
                self._step = _IN_TEXT
                return Label("image", image_url=_image_url(text, start, at)), at + 1
            if not state:
                break
        else:
            if stop == len(text) and stop < start + MAX_IMAGE:
                self._step, self._image_state, self._image_last = _IN_IMAGE, state, last
                return TEXT, start
            at = stop
        self._step = _IN_TEXT
        return TEXT, min(at, start + 2)  # past its "![" it is text like any other


_AT_LINE_START = Labeller._at_line_start
_IN_CODE = Labeller._in_code
_IN_ROW = Labeller._in_row
_IN_LONG_ROW = Labeller._in_long_row
_IN_TEXT = Labeller._in_text
_AFTER_BACKSLASH = Labeller._after_backslash
_IN_SPAN = Labeller._in_span
_IN_IMAGE = Labeller._in_image
_AFTER = {"\n": _AT_LINE_START, "`": _IN_SPAN, "\\": _AFTER_BACKSLASH}


def _image_url(text: str, start: int, stop: int) -> str:
    match = _URL.match(text, start, stop)
    assert match is not None  # _IMAGE has accepted it
    return _ESCAPE.sub(r"\1", match[1] or match[2])


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row in a text labelled table, without delimiter rows (`|---|:-:|`)."""
    rows = []
    for line in text.split("\n"):
        if line := line.strip():
            cells = [
                cell.strip().replace("\\|", "|") for cell in _BAR.split(line.removeprefix("|"))
            ]
            if not cells[-1]:
                cells.pop()  # what follows the bar that ends a row
            if not all(map(_DELIMITER.fullmatch, cells)):
                rows.append(cells)
    return rows
