"""streaming/markup.py: text is labelled as it streams, never altered, however it is cut."""

from __future__ import annotations

import copy
import re
import time
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.markup import MAX_FENCE, MAX_IMAGE, MAX_ROW, Label, Labeller, table_rows

TEXT = Label("text")
TABLE = Label("table")

Labelled = list[tuple[Label, str]]

unhurried = settings(deadline=None)  # the machine may be busy with something else


def code(language: str = "") -> Label:
    return Label("code", language=language)


def image(url: str) -> Label:
    return Label("image", image_url=url)


def joined(labelled: Labelled) -> Labelled:
    """Adjacent text with the same label in one."""
    runs = groupby(labelled, key=lambda item: item[0])
    return [(label, "".join(text for _, text in run)) for label, run in runs]


def label(*pieces: str) -> Labelled:
    """Everything that a labeller says about these pieces."""
    labeller = Labeller()
    labelled = [item for piece in pieces for item in labeller.feed(piece)]
    return joined(labelled + labeller.close())


# Each line of the specification, as the runs that the text must be labelled in.
SPECIFICATION: dict[str, Labelled] = {
    "plain text": [(TEXT, "Hello, world!\nA | b, 3 ~ 4, `x` and a!\n\nEnd")],
    "a fence with a language": [
        (TEXT, "See:\n"),
        (code("python"), "```python title=a.py\nprint()\n```\n"),
        (TEXT, "Done"),
    ],
    "a fence of tildes without a language": [(code(), "~~~\na\n~~~\n"), (TEXT, "b")],
    "a fence may be indented by three spaces": [(code("c"), "   ```c\n  x\n ```\n"), (TEXT, "b")],
    "four spaces make no fence": [(TEXT, "    ```c\n![ b\n")],
    "a backtick in the info string makes it inline code": [(TEXT, "```x``` and\nmore ```\n")],
    "an info string after tildes may have backticks": [(code("a`b"), "~~~ a`b ~~~\nx\n")],
    "a closing fence is at least as long": [(code(), "````\n```\n~~~~\n`````  \n"), (TEXT, "b")],
    "a closing fence has no info string": [(code("a"), "```a\n```b\n``` b\n```\n"), (TEXT, "b")],
    "a closing fence is indented by three at most": [(code(), "```\n    ```\nx\n")],
    "lines may end with CR LF": [(code("js"), "```js\r\nx\r\n```\r\n"), (TEXT, "b\r\n")],
    "code that is never closed": [(code("py"), "```py\nx\n"), (code("py"), "| a |\n![a](u)")],
    "an opening line at the end is code": [(TEXT, "a\n"), (code("py"), "```py")],
    "half a fence at the end is text": [(TEXT, "a\n  ``")],
    "code follows code": [(code("a"), "```a\n```\n"), (code("b"), "```b\n```\n")],
    "a table": [
        (TEXT, "Rows:\n"),
        (TABLE, "| a | b |\n|---|---|\n  | 1 | ![x](u) |\n"),
        (TEXT, "\nDone"),
    ],
    "a row at the end without a newline": [(TABLE, "| a |\n| b")],
    "a bar within a line is text": [(TEXT, "a | b\n    | c |\n")],
    "a row may hold a fence's characters": [(TABLE, "|```|\n"), (TEXT, "x\n")],
    "a code block between two tables": [
        (TABLE, "|a|\n"),
        (code(), "```\n|b|\n```\n"),
        (TABLE, "|c|\n"),
    ],
    "images": [
        (TEXT, "A cat! "),
        (image("http://x/cat.png"), "![a cat](http://x/cat.png)"),
        (TEXT, " and "),
        (image("dog.png"), '![](dog.png "A (big) dog")'),
        (image("b c.png"), "![!](<b c.png> 't')"),
        (TEXT, "!\n"),
    ],
    "an image in a link": [(TEXT, "["), (image("u"), "![a](u)"), (TEXT, "](v)")],
    "an image at the start of a line": [(TEXT, "a\n"), (image("u"), "![a](u)"), (TEXT, "\nb")],
    "an address with brackets": [(image("wiki/A_(b)"), "![a](wiki/A_(b))"), (TEXT, ")")],
    "escapes in an image": [(image("u)\\d"), r"![a\]](u\)\d (t\)))"), (TEXT, "b")],
    "an image in an image": [(TEXT, "![a "), (image("u"), "![b](u)"), (TEXT, "](v)")],
    "no image without an address": [(TEXT, "![a]() ![a](<>) ![a] ![a][b] !(a) [a](b)")],
    "no image with a space in its address": [(TEXT, "![a](b c) ![a](b 'c' d)")],
    "no image over two lines": [(TEXT, "![a\n](b) ![a](\nb)")],
    "no image in inline code": [(TEXT, "`![a](u)` ```![a](u)``` `` `![b](u)` `` `![a](u)")],
    "inline code ends with its line": [(TEXT, "a ` b\n"), (image("u"), "![a](u)")],
    "no image after a backslash": [(TEXT, r"\![a](u) "), (image("u"), r"![a](u)")],
    "a backslash may be escaped": [(TEXT, "\\\\"), (image("u"), "![a](u)")],
    "an escaped backtick begins no code": [(TEXT, "\\`"), (image("u"), "![a](u)")],
    "a failed image is text like any other": [(TEXT, "![a `] ![b](u)` "), (image("u"), "![c](u)")],
}


@pytest.mark.parametrize("name", SPECIFICATION)
def test_labels(name: str) -> None:
    """What each stretch of Markdown is, in one piece and character by character."""
    expected = joined(SPECIFICATION[name])
    text = "".join(text for _, text in expected)
    assert label(text) == expected
    assert label(*text) == expected


# What is in a feed's answer at once, and what waits for the next.
HELD = {
    "plain text goes out at once": ["one", " two", " thr"],
    "an ending newline, dash, hash or star too": ["a\n", "- b\n", "# c\n", "*"],
    "a code line goes out at once": ["```py\n", "pri", "nt()", "\n", "``", "`", "\n", "x"],
    "inline code too": ["a `", "b", "` c", "``", "`"],
    "and a bar, a tilde or backticks within a line": ["a |", " b ~", "~~", "```", "`"],
}


@pytest.mark.parametrize("name", HELD)
def test_nothing_is_delayed(name: str) -> None:
    """What can become no marker any more goes out with the piece that brought it."""
    labeller = Labeller()
    for piece in HELD[name]:
        assert "".join(text for _, text in labeller.feed(piece)) == piece


def test_held_back() -> None:
    """What could still become a marker waits, and leaves as soon as that is decided."""
    steps: list[tuple[str, Labelled]] = [
        ("Wow!", [(TEXT, "Wow")]),
        (" Look:", [(TEXT, "! Look:")]),
        ("![a", []),
        ("](", []),
        ("u", []),
        (") ok\n", [(image("u"), "![a](u)"), (TEXT, " ok\n")]),
        ("  ", []),
        ("x", [(TEXT, "  x")]),
        ("\n`", [(TEXT, "\n")]),
        ("`", []),
        ("a", [(TEXT, "``a")]),
        ("``\n| a", [(TEXT, "``\n")]),
        (" | b |", []),
        ("\n| c", [(TABLE, "| a | b |\n")]),
        ("\n```", [(TABLE, "| c\n")]),
        ("py", []),
        ("thon\n", [(code("python"), "```python\n")]),
        ("x = 1", [(code("python"), "x = 1")]),
        ("\n```", [(code("python"), "\n```")]),
        ("\n![a]", [(code("python"), "\n")]),
        ("b", [(TEXT, "![a]b")]),
    ]
    labeller = Labeller()
    for piece, expected in steps:
        assert labeller.feed(piece) == expected
    assert labeller.close() == []


def test_close_begins_anew() -> None:
    """After close the labeller is at the start of a new text; an empty piece says nothing."""
    labeller = Labeller()
    assert labeller.close() == []
    assert labeller.feed("") == []
    assert labeller.feed("```py") == []
    assert labeller.close() == [(code("py"), "```py")]
    assert labeller.feed("") == []
    assert labeller.feed("a![b") == [(TEXT, "a")]
    assert labeller.close() == [(TEXT, "![b")]
    assert labeller.feed("|a|\n") == [(TABLE, "|a|\n")]


def test_a_block_has_one_label() -> None:
    """All code of one block carries the very same label, so that comparing heads is cheap."""
    labeller = Labeller()
    labeller.feed("```py\n")
    [(first, _)], [(second, _)] = labeller.feed("a"), labeller.feed("\nb")
    assert first is second


def test_too_long_an_opening_line() -> None:
    """It is code, or its closing line would open a block; its language is unknown."""
    opening = "```py " + "x" * MAX_FENCE + "\n"
    expected = [(code(), opening + "a\n```\n"), (TEXT, "b")]
    assert label(opening + "a\n```\nb") == expected
    assert label(*opening, "a\n```\nb") == expected
    assert len(Labeller().feed(opening[:MAX_FENCE])[0][1]) == MAX_FENCE


def test_too_long_a_closing_line() -> None:
    """It closes nothing, however it is cut."""
    line = "```" + " " * MAX_FENCE + "\n"
    assert label("```\n" + line + "a") == label("```\n", *line, "a") == [(code(), f"```\n{line}a")]


def test_too_long_a_row() -> None:
    """It goes out in pieces, as table, and the next line is looked at afresh."""
    row = "|" + "x" * (2 * MAX_ROW) + "|\n"
    labeller = Labeller()
    sizes = [len(text) for piece in row for _, text in labeller.feed(piece)]
    assert sizes[0] == MAX_ROW
    assert sizes[1:] == [1] * (len(row) - MAX_ROW)
    assert labeller.feed("a") == [(TEXT, "a")]
    assert label(row + "a") == [(TABLE, row), (TEXT, "a")]


def test_too_long_an_image() -> None:
    """It is text; one that just fits is an image."""
    fits = "![a](" + "x" * (MAX_IMAGE - 6) + ")"
    assert [found.kind for found, _ in label(fits)] == ["image"]
    assert [found.kind for found, _ in label(*fits)] == ["image"]
    long = fits[:-1] + "x)"
    expected = [(TEXT, long + " "), (image("u"), "![b](u)")]
    assert label(long + " ![b](u)") == label(*long, " ![b](u)") == expected


FRAGMENTS = [
    *"`~|![]()<>\"'\\\n \taé\r\u2028",
    "``", "```", "~~~~", "![", "](", "    ", "py", "\n|", "\n```",
    "![a](u)", '![b](v "t")', "![c](<w x>)", "\n```py\n", "\n```\n", "\n~~~\n", "\n| a | b |\n",
]  # fmt: skip
markdown = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
cuts = st.lists(st.integers(0, 200), max_size=30)


def cut(text: str, at: list[int]) -> list[str]:
    """`text` in pieces, some of them perhaps empty."""
    places = [0, *sorted(min(place, len(text)) for place in at), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


@unhurried
@given(markdown | st.text(), cuts)
def test_text_is_kept_and_pieces_do_not_matter(text: str, at: list[int]) -> None:
    """What comes out is what went in, with labels that do not depend on how it was cut."""
    whole = label(text)
    assert "".join(text for _, text in whole) == text
    assert label(*cut(text, at)) == whole
    assert label(*text) == whole


@unhurried
@given(markdown, cuts)
def test_each_answer_is_joined(text: str, at: list[int]) -> None:
    """One feed gives no empty text and never the same label twice in a row."""
    labeller = Labeller()
    for piece in cut(text, at):
        labelled = labeller.feed(piece)
        assert joined(labelled) == labelled
        assert all(text for _, text in labelled)


@unhurried
@given(markdown, cuts)
def test_table_deltas_are_whole_rows(text: str, at: list[int]) -> None:
    """Text labelled table is made of whole lines, but for the last of all."""
    labeller = Labeller()
    for piece in cut(text, at):
        for found, part in labeller.feed(piece):
            assert found != TABLE or (part.endswith("\n") and part.lstrip(" ").startswith("|"))


COMPLETIONS = ["```\n", "``\n", "`\n", "~~\n", "~\n", "\n", "[a](u)", "a](u)", "](u)", "(u)", "u)"]
COMPLETIONS += ["a](u)", "au)", ")", ")u)", "))", "a>)", ">)", '")', "')", "a'))"]


@unhurried
@given(markdown)
def test_only_what_could_become_a_marker_is_held(text: str) -> None:
    """There is an end to whatever is held back that makes it something else than text."""
    labeller = Labeller()
    held = len(text) - sum(len(part) for _, part in labeller.feed(text))
    if held:
        answers = [copy.copy(labeller).feed(completion) for completion in COMPLETIONS]
        assert any(answer and answer[0][0] != TEXT for answer in answers), text[-held:]


LINES = ["|", "![", "![a](", "![a](u '", "```", "~~~", "```\n```", "\\", "`", "!", "x"]


@unhurried
@given(st.sampled_from(LINES), st.sampled_from(FRAGMENTS), st.integers(1, 50))
def test_held_back_is_bounded(begin: str, fill: str, size: int) -> None:
    """A line that never ends is not held for ever."""
    labeller, held = Labeller(), 0
    text = begin + fill * (6000 // len(fill))
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        held += len(piece) - sum(len(part) for _, part in labeller.feed(piece))
        assert held <= max(MAX_FENCE, MAX_ROW, MAX_IMAGE)


@pytest.mark.parametrize("begin", LINES)
@pytest.mark.parametrize(
    "fill", ["x", "!", "![", "`", "`\n", "``` ", "\n|", "\\", "![a](b ", "](", " "]
)
def test_time_is_linear(begin: str, fill: str) -> None:
    """No text makes it slow, by the character or all at once. (Were a held line looked at again
    with each character, or a chunk with each marker in it, this would take minutes.)
    """
    text = begin + fill * (100_000 // len(fill))
    began = time.process_time()
    label(text)
    label(*text[:20_000])
    assert time.process_time() - began < 5


_ADDRESS = r"(?:\\.|(?!!\[)[^ \t\n()\\])"
_TITLES = r""""(?:\\.|(?!!\[)[^"\\])*"|'(?:\\.|(?!!\[)[^'\\])*'|\((?:\\.|(?!!\[)[^()\\])*\)"""
_INLINE = re.compile(
    r"(?P<image>!\[(?:\\.|[^][\\])*\]\([ \t]*"
    rf"(?:<(?P<angle>(?:\\.|(?!!\[)[^<>\\])+)>[ \t]*|(?![<(]){_ADDRESS}"
    rf"(?:{_ADDRESS}|\((?:{_ADDRESS})*\))*(?:[ \t]+|(?=\))))"
    rf"(?:(?:{_TITLES})[ \t]*)?\))"
    r"|\\[!`\\]|`[^`]*(?:`|$)|.",
    re.DOTALL,
)


def reference(text: str) -> list[str]:
    """The kind of each character of a whole text, found the plain way: line by line."""
    kinds: list[str] = []
    fence = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        opening = re.match(r" {0,3}(`{3,}(?=[^`\n]*$)|~{3,})", line)
        if fence:
            kinds += ["code"] * len(line)
            closing = re.fullmatch(r" {0,3}(`{3,}|~{3,})[ \t\r]*\n", line)
            if closing and closing[1][0] == fence[0] and len(closing[1]) >= len(fence):
                fence = ""
        elif opening:
            fence = opening[1]
            kinds += ["code"] * len(line)
        elif re.match(r" {0,3}\|", line):
            kinds += ["table"] * len(line)
        else:
            body = line.removesuffix("\n")
            for match in _INLINE.finditer(body):
                kinds += ["image" if match["image"] else "text"] * len(match[0])
            kinds += ["text"] * (len(line) - len(body))
    return kinds


@unhurried
@given(markdown)
def test_agrees_with_the_plain_way(text: str) -> None:
    """A second, slower reading of the whole text finds the same."""
    assert [found.kind for found, part in label(text) for _ in part] == reference(text)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("| a | b |\n|---|:--:|\n| 1 | 2 |\n", [["a", "b"], ["1", "2"]]),
        ("|a|b\n| - | -: |\n", [["a", "b"]]),
        ("  | a |  | `x` |\r\n", [["a", "", "`x`"]]),
        (r"| a \| b | c\|", [["a | b", "c|"]]),
        ("| é\u2028x |", [["é\u2028x"]]),
        ("| a | - |\n||\n|\n\n", [["a", "-"], [""]]),
        ("", []),
    ],
)
def test_table_rows(text: str, rows: list[list[str]]) -> None:
    r"""Cells without blanks around, `\|` as `|`, no delimiter rows; the last bar may be missing."""
    assert table_rows(text) == rows


@unhurried
@given(st.lists(st.lists(st.text("ab|é 1", min_size=1).map(str.strip), min_size=1), max_size=5))
def test_table_rows_reads_what_was_written(rows: list[list[str]]) -> None:
    """Cells written as a Markdown table come back."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    text = "".join(f"| {' | '.join(row)} |\n" for row in escaped)
    assert label(text) == ([(TABLE, text)] if text else [])
    assert table_rows(text) == rows
