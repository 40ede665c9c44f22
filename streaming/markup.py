"""Markdown as it streams: which text is fenced code, a table, an image. The text is never altered.

    line start  -- ``` or ~~~ -->  opening line  -- newline -->  code -- closing line --> line start
                -- | -->           table row     -- newline -->  line start
                -- the rest -->    text          -- newline -->  line start
    text        -- ![ -->          image         -- ) -->        text
                -- ` -->           code span     -- ` -->        text

Held back is what could still become a marker, within the bounds below; in code nothing. A code span
is text in which no image begins, so that Markdown can be talked about. Each backtick begins or ends
one (so ``these`` are two empty ones), and a line's end does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

# Characters held back at most. A model may write "|" or "![" and then never end that line.
MAX_FENCE = 256  # a longer opening line is code without a language; a longer line closes no code
MAX_ROW = 4096  # a longer row goes out in pieces
MAX_IMAGE = 2048  # a longer image is text (most data: URLs are)


class Label(NamedTuple):
    """What a stretch of text is. language: of code, if it names one. image_url: of an image."""

    kind: Literal["text", "code", "table", "image"]
    language: str = ""
    image_url: str = ""


TEXT = Label("text")
TABLE = Label("table")

# What matters in a line of text. A newline only does where the next line might be something else,
# so that one search passes over plain text of any length.
_MARK = re.compile(r"\n(?= {0,3}(?:[|`~]|\Z))|`|!(?=\[|\Z)|\\(?=[!`\\]|\Z)")
_LINE = re.compile(  # the last alternative could still become one of the others
    r" {0,3}(?:(?P<row>\|)|(?P<fence>`{3,}+(?![^\n]*`)|~{3,})(?P<info>[^\n]*)|(?:`{0,2}|~{0,2})\Z)"
)
_CLOSING = re.compile(r" {0,3}(`{3,}|~{3,})[ \t\r]*")
_SPAN_END = re.compile(r"[`\n]")

# An image, one character at a time: state -> character -> state, where the character "" is any
# other and the state "" is no image. Not a pattern, which would begin again with every piece.
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

    Each `_in_` or `_at_` method is a step: it labels text[start:end], returns the label and `end`,
    and sets the step that goes on from there. end == start: hold this back until more has come.
    text[start:seen] is what was held back when this step last looked.
    """

    __slots__ = (
        "_code", "_code_line", "_fence", "_held", "_image_last", "_image_state", "_step",
    )  # fmt: skip

    _step: Callable[[Labeller, str, int, int], tuple[Label, int]]

    def __init__(self) -> None:
        self._step = Labeller._at_line_start
        self._held = ""
        self._code = TEXT  # the label of the code it is in,
        self._fence = ""  # the fence that opened it,
        self._code_line = ""  # and the beginning of the line it is in
        self._image_state = ""  # of the image that is held back,
        self._image_last = ""  # and its last character, "" if a backslash escapes it

    def feed(self, text: str) -> list[tuple[Label, str]]:
        """Takes the next piece; gives what can be labelled now, adjacent text of one label joined.

        Takes time in proportion to the piece (and to what was held back, which is bounded).
        """
        if self._step is Labeller._in_text and text and _MARK.search(text) is None:
            return [(TEXT, text)]  # nearly every piece
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
        """Ends the text; gives what was held back. What is fed afterwards is a new text."""
        held, labelled = self._held, []
        if held:  # the end of a text ends its line
            labelled.append((self._step(self, held + "\n", 0, len(held))[0], held))
        self._held, self._step = "", Labeller._at_line_start
        return labelled

    def _at_line_start(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        match = _LINE.match(text, start, start + MAX_FENCE)
        if match is None:
            return self._in_text(text, start, seen)
        if match["row"]:
            return self._in_row(text, start, seen)
        end = match.end()
        too_long = end == start + MAX_FENCE
        if end == len(text) and not too_long:
            return TEXT, start
        words = [] if too_long else match["info"].split(maxsplit=1)
        self._code = Label("code", words[0] if words else "")
        self._code_line = text[start:end] if too_long else ""
        self._fence = match["fence"]
        self._step = Labeller._in_code
        return self._code, end if too_long else end + 1

    def _in_code(self, text: str, start: int, _: int) -> tuple[Label, int]:
        newline = text.find("\n", start)
        if newline < 0:
            if len(self._code_line) < MAX_FENCE:
                self._code_line += text[start : start + MAX_FENCE]
            return self._code, len(text)
        line = self._code_line + text[start:newline]
        closing = _CLOSING.fullmatch(line) if len(line) < MAX_FENCE else None
        if closing and closing[1].startswith(self._fence):
            self._step = Labeller._at_line_start
        self._code_line = ""
        return self._code, newline + 1

    def _in_row(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        newline = text.find("\n", seen)
        if newline >= 0:
            self._step = Labeller._at_line_start
            return TABLE, newline + 1
        if len(text) - start < MAX_ROW:
            self._step = Labeller._in_row
            return TABLE, start
        self._step = Labeller._in_long_row
        return TABLE, len(text)

    def _in_long_row(self, text: str, start: int, _: int) -> tuple[Label, int]:
        newline = text.find("\n", start)
        if newline < 0:
            return TABLE, len(text)
        self._step = Labeller._at_line_start
        return TABLE, newline + 1

    def _in_text(self, text: str, start: int, _: int) -> tuple[Label, int]:
        self._step = Labeller._in_text
        mark = _MARK.search(text, start)
        if mark is None:
            return TEXT, len(text)
        match mark[0]:
            case "\n":
                self._step = Labeller._at_line_start
            case "`":
                self._step = Labeller._in_span
            case "\\":
                self._step = Labeller._in_escape
            case _:
                self._step, self._image_state, self._image_last = Labeller._in_image, "start", ""
                at = mark.start()
                return (TEXT, at) if at > start else self._in_image(text, at, at)
        return TEXT, mark.end()

    def _in_escape(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        self._step = Labeller._in_text
        return (TEXT, start + 1) if text[start] in "!`\\" else self._in_text(text, start, seen)

    def _in_span(self, text: str, start: int, _: int) -> tuple[Label, int]:
        end = _SPAN_END.search(text, start)
        if end is None:
            return TEXT, len(text)
        self._step = Labeller._in_text if end[0] == "`" else Labeller._at_line_start
        return TEXT, end.end()

    def _in_image(self, text: str, start: int, seen: int) -> tuple[Label, int]:
        state, last = self._image_state, self._image_last
        bound = start + MAX_IMAGE
        at = seen
        for at in range(seen, min(len(text), bound)):
            char = text[at]
            if char == "\n" or (char == "[" and last == "!" and state != "!"):
                break  # of two images, one in the other, it is the inner one
            steps = _IMAGE[state]
            last = "" if last == "\\" else char
            state = steps.get(last, steps.get("", ""))
            if state == "done":
                self._step = Labeller._in_text
                return Label("image", image_url=_image_url(text, start, at)), at + 1
            if not state:
                break
        else:
            if len(text) < bound:
                self._image_state, self._image_last = state, last
                return TEXT, start
        self._step = Labeller._in_text
        return TEXT, min(at, start + 2)  # what follows the "![" is text like any other


def _image_url(text: str, start: int, stop: int) -> str:
    match = _URL.match(text, start, stop)
    assert match is not None  # the same grammar as _IMAGE
    return _ESCAPE.sub(r"\1", match[1] or match[2])


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row in text that is labelled table, without delimiter rows (`|--|:-:|`)."""
    rows = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        cells = [cell.strip().replace("\\|", "|") for cell in _BAR.split(line.removeprefix("|"))]
        if not cells[-1]:
            cells.pop()  # what follows the bar that ends a row
        if not all(map(_DELIMITER.fullmatch, cells)):
            rows.append(cells)
    return rows
