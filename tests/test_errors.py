"""Errors and their wire form."""

from __future__ import annotations

import re

import pytest

from streaming import errors
from streaming.errors import InvalidField, RivuletError, UpstreamError

TREE = {
    "RivuletError": ("500", "internal"),
    "BadRequest": ("400", "bad_request"),
    "Unauthorized": ("401", "unauthorized"),
    "Forbidden": ("403", "forbidden"),
    "InvalidField": ("422", "invalid_field"),
    "TooLarge": ("413", "too_large"),
    "NotFound": ("404", "not_found"),
    "Gone": ("410", "gone"),
    "Conflict": ("409", "conflict"),
    "TooMany": ("429", "rate_limited"),
    "Unavailable": ("503", "unavailable"),
}


def classes() -> dict[str, type[RivuletError]]:
    found = (value for value in vars(errors).values() if isinstance(value, type))
    return {c.__name__: c for c in found if issubclass(c, RivuletError)}


def test_the_tree_in_the_docstring_is_the_code() -> None:
    """Each class stands in it once, with its status and its code or a word about it."""
    assert errors.__doc__ is not None
    lines = re.findall(r"^(?:[├└]── )?([A-Z]\w+) +(.+)$", errors.__doc__, re.MULTILINE)
    drawn = dict(lines)
    assert [name for name, _ in lines] == list(classes())
    for name, (status, code) in TREE.items():
        assert drawn[name].startswith((f"{status}  {code}", f"{status}  as given"))
    assert set(drawn) == {*TREE, "UpstreamError"}


@pytest.mark.parametrize("name", TREE)
def test_a_class_has_its_status_and_code(name: str) -> None:
    """Where nothing else is given."""
    kind = classes()[name]
    error = kind("field", "message") if kind is InvalidField else kind("message")
    assert (str(error.status), error.code) == TREE[name]
    assert error.retry_after is None


def test_the_body_has_code_message_and_request_id() -> None:
    """And `param` where a field is at fault; nothing else."""
    error = RivuletError("it broke")
    assert error.body("r1") == {"code": "internal", "message": "it broke", "request_id": "r1"}
    assert list(RivuletError("bad", param="prompt").body("r1").items()) == [
        ("code", "internal"),
        ("message", "bad"),
        ("param", "prompt"),
        ("request_id", "r1"),
    ]


def test_a_wrong_field_is_named() -> None:
    """In `param` for a program, in the message for a person; the code may say more."""
    error = InvalidField("prompt", "is required", code="missing_field")
    assert error.body() == {
        "code": "missing_field",
        "message": "prompt: is required",
        "param": "prompt",
        "request_id": "",
    }
    assert str(error) == "prompt: is required"


def test_what_is_given_goes_before_what_the_class_says() -> None:
    """Code, status and Retry-After of one error; the class keeps its own."""
    error = errors.Unavailable("later", code="overloaded", status=529, retry_after=2.5)
    assert (error.status, error.code, error.retry_after) == (529, "overloaded", 2.5)
    assert (errors.Unavailable.status, errors.Unavailable.code) == (503, "unavailable")


UPSTREAM = {
    "upstream_unreachable": (502, True),
    "connect_timeout": (504, True),
    "first_token_timeout": (504, True),
    "idle_timeout": (504, False),
    "total_timeout": (504, False),
    "upstream_rate_limited": (429, True),
    "upstream_unauthorized": (502, False),
    "upstream_rejected": (400, False),
    "upstream_failed": (502, True),
    "upstream_cut": (502, True),
    "upstream_invalid": (502, True),
    "too_long": (502, False),
}


def test_each_failure_of_a_model_call_has_a_row() -> None:
    """Its status, and whether another attempt may help: never after a refusal of the request or of
    our key, nor for what can only come after the first token.
    """
    made = {code: UpstreamError(code, "failed") for code in UpstreamError.UPSTREAM}
    assert {code: (e.status, e.retryable) for code, e in made.items()} == UPSTREAM
    assert all(error.code == code for code, error in made.items())


def test_each_timeout_has_a_code_of_its_own() -> None:
    """Connect, first token, idle, total: all four are 504."""
    timeouts = [code for code in UpstreamError.UPSTREAM if code.endswith("_timeout")]
    assert timeouts == ["connect_timeout", "first_token_timeout", "idle_timeout", "total_timeout"]
    assert {UpstreamError(code, "").status for code in timeouts} == {504}


def test_a_rejection_keeps_its_own_status() -> None:
    """Beside it what the upstream said, for OpenAI's clients."""
    error = UpstreamError(
        "upstream_rejected", "no", status=404, param="model", retry_after=3, upstream_status=404
    )
    assert (error.status, error.upstream_status, error.retry_after) == (404, 404, 3)
    assert error.body("r")["param"] == "model"


def test_an_unknown_code_is_a_mistake_of_ours() -> None:
    """A word with a typing error in it goes to no client."""
    with pytest.raises(KeyError):
        UpstreamError("upstream_cutt", "failed")
