"""Who a token speaks for: API keys, JWTs, files that change, and what an identity may do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import config
from streaming.auth import EVERYBODY, SERVICE, TOKEN_CHARS, Auth, Identity, digest
from streaming.config import Key
from streaming.errors import CannotStart, Unauthorized
from streaming.grants import ACTIONS, USUAL, Grants
from tests.processes import ROOT
from tests.properties import property_test
from tests.tokens import SECRET, jwk, pair, token


def auth(**given: Any) -> Auth:
    return Auth(config.Auth(mode="token", **given))


def refusal(which: Auth, said: str | None) -> tuple[str, str]:
    """Code and message with which this token is refused; it does not show in them."""
    with pytest.raises(Unauthorized) as refused:
        which.identify(said)
    assert refused.value.status == 401
    assert not said or said not in refused.value.message
    assert refused.value.__context__ is None or refused.value.__suppress_context__
    return refused.value.code, refused.value.message


def coded(content: bytes) -> str:
    """A part of a JWT."""
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


HMAC = auth(jwt_secret=SECRET)


# API keys


def test_an_api_key_speaks_for_its_user() -> None:
    """Whether the configuration has it as it is, or by its digest only."""
    hashed = f"sha256:{digest('second').hex().upper()}"
    which = auth(keys=(Key("first", "ann"), Key(hashed, "bob", service=True)))
    ann, bob = which.identify("first"), which.identify("second")
    assert (ann.user, ann.service, ann.expires, ann.grants) == ("ann", False, math.inf, EVERYBODY)
    assert (bob.user, bob.service, bob.grants) == ("bob", True, SERVICE)
    assert refusal(which, hashed)[0] == refusal(which, "third")[0] == "token_invalid"
    for said in (None, ""):
        assert refusal(which, said)[0] == "token_missing"


def test_grants_of_a_key_take_the_place_of_the_usual_ones() -> None:
    grants = Grants.read({"team-*": ["subscribe"]})
    which = auth(keys=(Key("first", "ann", service=True, grants=grants),))
    ann = which.identify("first")
    assert ann.may("subscribe", "team-1") and not ann.may("publish", "team-1")
    assert not ann.may("subscribe", "lobby")


def test_a_key_that_is_there_twice_is_refused() -> None:
    """Its two users could not be told apart."""
    hashed = f"sha256:{digest('first').hex()}"
    with pytest.raises(CannotStart, match=r"auth\.keys: a key of bob is there twice") as refused:
        auth(keys=(Key("first", "ann"), Key(hashed, "bob")))
    assert "first" not in str(refused.value) and hashed not in str(refused.value)


def test_no_repr_shows_a_key() -> None:
    which = auth(keys=(Key("first", "ann"),), jwt_secret=SECRET)
    ann = which.identify("first")
    shown = repr([which, ann, vars(which)["_secret"], vars(which)["_config"]])
    assert not any(secret in shown for secret in ("first", SECRET, digest("first").hex()))


# JWTs


def test_a_jwt_speaks_for_its_subject() -> None:
    """As long as it lasts, in rooms that are shared."""
    now = time.time()
    ann = HMAC.identify(token("ann", exp=now + 60.9))
    assert ann == Identity("ann", expires=int(now + 60.9))
    assert HMAC.valid(ann, now + 59) and not HMAC.valid(ann, now + 61)


@pytest.mark.parametrize(
    ("claims", "code", "message"),
    [
        ({"exp": time.time() - 1}, "token_expired", "the token has expired"),
        ({"nbf": time.time() + 100}, "token_invalid", "the token is not valid yet"),
        ({"aud": "other"}, "token_invalid", "the token is for somebody else than this server"),
        ({"exp": None}, "token_invalid", "the token is not valid"),
        ({"exp": math.inf}, "token_invalid", "the token is not valid"),
        ({"exp": math.nan}, "token_invalid", "the token is not valid"),
        ({"exp": "tomorrow"}, "token_invalid", "the token is not valid"),
        ({"exp": 10**400}, "token_invalid", "the token is not valid"),
        ({"sub": None}, "token_invalid", "the token is not valid"),
        ({"sub": 1}, "token_invalid", "the token is not valid"),
        ({"sub": ""}, "token_invalid", "the token is not valid"),
        ({"sub": "a\n"}, "token_invalid", "the token is not valid"),
        ({"sub": "a" * 257}, "token_invalid", "the token is not valid"),
        ({"rooms": "lobby"}, "token_invalid", "the token is not valid"),
        ({"rooms": [""]}, "token_invalid", "the token is not valid"),
        ({"rooms": [1]}, "token_invalid", "the token is not valid"),
        ({"rooms": {"lobby": "publish"}}, "token_invalid", "the token is not valid"),
        ({"rooms": {"lobby": ["see"]}}, "token_invalid", "the token is not valid"),
        ({"rooms": {"lobby": [["publish"]]}}, "token_invalid", "the token is not valid"),
    ],
)
def test_claims_that_are_refused(claims: dict[str, Any], code: str, message: str) -> None:
    assert refusal(HMAC, token(**{"user": claims.pop("sub", "ann"), **claims})) == (code, message)


def test_what_was_made_in_the_future_is_taken() -> None:
    """The clock of who made it may be ahead."""
    assert HMAC.identify(token(iat=time.time() + 100)).user == "ann"


def test_audience_and_issuer_where_they_are_configured() -> None:
    """Must be there then, and be these."""
    which = auth(jwt_secret=SECRET, jwt_audience="rivulet", jwt_issuer="https://id")
    assert which.identify(token(aud=["x", "rivulet"], iss="https://id")).user == "ann"
    for claims in (
        {"aud": "rivulet"},
        {"iss": "https://id"},
        {"aud": "rivulet", "iss": "https://id/"},
        {"aud": "x", "iss": "https://id"},
        {"aud": 1, "iss": "https://id"},
    ):
        assert refusal(which, token(**claims))[0] == "token_invalid"


def test_leeway_counts_at_both_ends() -> None:
    """An identity lasts as long as its token would be taken."""
    which, now = auth(jwt_secret=SECRET, jwt_leeway=30), time.time()
    ann = which.identify(token(exp=now - 10, nbf=now + 20))
    assert which.valid(ann, now + 15) and not which.valid(ann, now + 21)
    assert refusal(which, token(exp=now - 31))[0] == "token_expired"


def test_an_unsigned_token_is_refused(tmp_path: Path) -> None:
    """However `none` is spelled, and whatever keys there are."""
    file = tmp_path / "key.pem"
    file.write_text(pair("RS256")[1])
    names: list[Any] = ["none", "None", "NONE", "nOnE", "", None, ["none"], {}]
    _, claims, signature = token().split(".")
    for name in names:
        header = coded(json.dumps({"alg": name, "typ": "JWT"}).encode())
        for said in (f"{header}.{claims}.", f"{header}.{claims}.{signature}"):
            assert refusal(HMAC, said)[0] == "token_invalid"
            assert refusal(auth(jwt_key=str(file)), said)[0] == "token_invalid"


@pytest.mark.parametrize("kind", ["RS256", "ES256"])
def test_a_public_key_is_no_secret(tmp_path: Path, kind: str) -> None:
    """A token signed with what everybody knows, as if it were the secret, is refused."""
    file = tmp_path / "key.pem"
    private, public = pair(kind)
    file.write_text(public)
    which = auth(jwt_key=str(file), jwt_secret=SECRET)
    assert which.identify(token(key=private, kind=kind)).user == "ann"
    assert which.identify(token()).user == "ann"
    head, claims, _ = token(kind="HS256").split(".")
    for secret in (public, public.strip()):
        mac = hmac.new(secret.encode(), f"{head}.{claims}".encode(), hashlib.sha256).digest()
        forged = coded(mac)
        assert refusal(which, f"{head}.{claims}.{forged}")[0] == "token_invalid"


@pytest.mark.parametrize(("kind", "other"), [("RS256", "ES256"), ("ES256", "ES384")])
def test_a_key_takes_only_its_own_algorithms(tmp_path: Path, kind: str, other: str) -> None:
    file = tmp_path / "key.pem"
    file.write_text(pair(kind)[1])
    which = auth(jwt_key=str(file))
    assert which.identify(token(key=pair(kind)[0], kind=kind)).user == "ann"
    for private, algorithm in (
        (pair(other)[0], other),
        (pair(kind, 1)[0], kind),
        (SECRET, "HS256"),
    ):
        assert refusal(which, token(key=private, kind=algorithm))[0] == "token_invalid"


def test_a_changed_token_is_refused() -> None:
    """One letter of it anywhere is enough."""
    said = token()
    for at in range(0, len(said), 7):
        changed = said[:at] + ("A" if said[at] != "A" else "B") + said[at + 1 :]
        assert refusal(HMAC, changed)[0] == "token_invalid"


def test_a_token_that_is_too_long_is_not_looked_at() -> None:
    """Nor is one without keys for it."""
    assert HMAC.identify(token(x="a" * 5000)).user == "ann"
    assert len(token(x="a" * 7000)) > TOKEN_CHARS
    assert refusal(HMAC, token(x="a" * 7000))[0] == "token_invalid"
    assert refusal(auth(keys=(Key("k", "ann"),)), token())[0] == "token_invalid"


def test_a_token_that_was_taken_expires_all_the_same() -> None:
    """It is not verified once more, and looked at each time."""
    brief = token(exp=time.time() + 1)
    assert HMAC.identify(brief) is HMAC.identify(brief)
    ends = time.monotonic() + 30
    while "token_expired" not in refusals(HMAC, brief) and time.monotonic() < ends:
        time.sleep(0.05)
    assert refusal(HMAC, brief)[0] == "token_expired"


def refusals(which: Auth, text: str) -> str:
    """The code with which a token is refused, or ""."""
    try:
        which.identify(text)
    except Unauthorized as error:
        return error.code
    return ""


# Keys in files


def write(file: Path, content: object) -> None:
    """In one step, as who cares for running readers does."""
    draft = file.with_suffix(".draft")
    draft.write_text(content if isinstance(content, str) else json.dumps(content))
    os.replace(draft, file)


def test_keys_of_a_jwks_come_and_go(tmp_path: Path) -> None:
    """Chosen by `kid`; where a token has none, whichever fits."""
    file = tmp_path / "jwks.json"
    old, new = jwk("RS256", kid="old"), jwk("ES256", kid="new", use="sig")
    write(file, {"keys": [old, {"kty": "oct", "k": "c2VjcmV0"}, {"kty": "new"}, 1]})
    which = auth(jwt_key=str(file))
    by_old, by_new = (
        token(key=pair("RS256")[0], kind="RS256", kid="old"),
        token(key=pair("ES256")[0], kind="ES256", kid="new"),
    )
    assert which.identify(by_old).user == "ann" and refusal(which, by_new)
    assert not which.refresh()
    write(file, {"keys": [jwk("RS256", 1, kid="other"), old, new]})
    assert which.refresh() and not which.refresh()
    assert which.identify(by_old).user == which.identify(by_new).user == "ann"
    assert which.identify(token(key=pair("RS256")[0], kind="RS256")).user == "ann"
    assert refusal(which, token(key=pair("RS256")[0], kind="RS256", kid="other"))
    write(file, {"keys": [new]})
    assert which.refresh()
    assert which.identify(by_new).user == "ann" and refusal(which, by_old)


def test_a_symmetric_key_in_a_jwks_is_none(tmp_path: Path) -> None:
    """Nor one for encryption, nor on a curve that is not known here, nor a private one."""
    file = tmp_path / "jwks.json"
    encrypts, private = jwk("RS256", use="enc"), jwk("RS256", private=True)
    symmetric, unknown = {"kty": "oct", "k": "c2VjcmV0"}, jwk("ES256K")
    for keys in ([], [symmetric], [encrypts], [unknown], [private], "x"):
        write(file, {"keys": keys})
        with pytest.raises(CannotStart, match=f"{file}: .*key"):
            auth(jwt_key=str(file))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "[" * 9999],
)
def test_a_file_that_is_no_key(tmp_path: Path, content: str) -> None:
    """Is refused at start, as one that is missing or has a private key is."""
    file = tmp_path / "key.pem"
    write(file, content)
    for path in (file, tmp_path / "missing", tmp_path):
        with pytest.raises(CannotStart, match=str(path)):
            auth(jwt_key=str(path))
    write(file, pair("RS256")[0])
    with pytest.raises(CannotStart, match="is neither a PEM public key nor a JWKS") as refused:
        auth(jwt_key=str(file))
    assert "PRIVATE" not in str(refused.value)


def test_api_keys_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Come and go with it. A broken one changes nothing, and is logged once."""
    file = tmp_path / "keys.toml"
    write(file, '[[keys]]\nkey = "first"\nuser = "ann"')
    which = auth(keys_file=str(file), keys=(Key("fixed", "root"),))
    ann, root, now = which.identify("first"), which.identify("fixed"), time.time()
    write(file, "[[keys]]\nkey = first-secret")
    with caplog.at_level(logging.ERROR, "rivulet.auth"):
        assert not which.refresh() and not which.refresh()
    (record,) = caplog.records
    assert vars(record)["path"] == str(file) and "first-secret" not in str(vars(record))
    assert which.valid(ann, now) and which.identify("first") == ann
    file.unlink()
    assert not which.refresh() and which.valid(ann, now)
    write(file, '[[keys]]\nkey = "second"\nuser = "ann"')
    assert which.refresh()
    assert not which.valid(ann, now) and refusal(which, "first")
    assert which.valid(which.identify("second"), now) and which.valid(root, now)


def test_an_identity_ends_with_what_its_key_says(tmp_path: Path) -> None:
    """A key that speaks for another, or gives other grants, is another."""
    file = tmp_path / "keys.json"
    write(file, {"keys": [{"key": "first", "user": "ann", "grants": ["a"]}]})
    which = auth(keys_file=str(file))
    ann = which.identify("first")
    write(file, {"keys": [{"key": "first", "user": "ann", "grants": ["b"]}]})
    assert which.valid(ann, 0) and which.refresh() and not which.valid(ann, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"first-secret": "ann"}, "must have a list `keys`, and nothing else"),
        ([], "must have a list `keys`, and nothing else"),
        ({"keys": {"first-secret": "ann"}}, "`keys` must be a list"),
        ({"keys": ["first-secret"]}, "keys[0]: must be a table"),
        ({"keys": [{"key": "first-secret"}]}, "keys[0].user: is missing"),
        ({"keys": [{"key": "k", "user": "ann"}] * 2}, "a key of ann is there twice"),
        ("", "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_file_that_has_no_api_keys(tmp_path: Path, content: object, reason: str) -> None:
    """Is refused, and what could be a key in it not repeated."""
    file = tmp_path / "keys.json"
    write(file, content)
    with pytest.raises(CannotStart) as refused:
        auth(keys_file=str(file))
    assert str(refused.value) in (f"{file}: {reason}", f"auth.keys: {reason}")


@pytest.mark.parametrize(
    "text", ["keys = first-secret", "k = {first-secret = 1, first-secret = 2}"]
)
def test_a_file_of_keys_that_is_no_toml_is_not_quoted(tmp_path: Path, text: str) -> None:
    """It is said where."""
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(CannotStart, match=r"keys.toml: is not TOML \(at line 1, column \d+\)$"):
        auth(keys_file=str(file))


# What an identity may do

USERS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9)
ROOMS = st.one_of(
    st.text("abc:*-", max_size=9),
    st.builds("{}:{}".format, st.sampled_from(["conv", "user"]), st.text("abc:*", max_size=9)),
)
PATTERNS = st.text("abc:*-", min_size=1, max_size=9) | ROOMS.filter(bool)


@property_test
@given(pattern=PATTERNS, room=ROOMS)
def test_a_pattern_means_what_it_says(pattern: str, room: str) -> None:
    """`*` is any text, all else itself; a personal room's prefix has to be spelled."""
    expression = ".*".join(map(re.escape, pattern.split("*")))
    meant = re.fullmatch(expression, room, re.DOTALL) is not None
    for prefix in ("conv:", "user:"):
        meant = meant and (pattern.startswith(prefix) or not room.startswith(prefix))
    grants = Grants.read([pattern])
    assert {action for action in ACTIONS if grants.allow(action, room)} == set(
        USUAL if meant else ()
    )


@property_test
@given(owner=USERS, other=USERS, id=st.text("ab:", max_size=5), action=st.sampled_from(ACTIONS))
def test_rooms_that_belong_to_somebody(owner: str, other: str, id: str, action: str) -> None:
    """Are theirs, and nobody else's, not a service's either."""
    rooms = f"user:{owner}", f"conv:{quote(owner, safe='')}:{id}"
    for room in rooms:
        assert Identity(owner, grants=Grants(())).may(action, room)
        for grants in (EVERYBODY, SERVICE):
            assert Identity(other, grants=grants).may(action, room) is (other == owner)
    assert Identity(other, grants=Grants.read({f"{rooms[0]}*": [action]})).may(action, rooms[0])


def test_what_may_be_done_in_shared_rooms() -> None:
    """By who has no grants everything but to moderate; by a service that too."""
    guest, service = Identity("ann"), Auth(config.Auth()).guest("ann")
    assert [action for action in ACTIONS if guest.may(action, "lobby")] == [*USUAL]
    assert [action for action in ACTIONS if service.may(action, "lobby")] == [*ACTIONS]
    for room in ("conv", "user", "conversation:x"):
        assert guest.may("publish", room)
    bound = HMAC.identify(token(rooms=["team-*", "lobby"]))
    assert bound.may("generate", "team-1") and not bound.may("subscribe", "other")
    bound = HMAC.identify(token(rooms={"*": ["subscribe"], "team": ["moderate", "publish"]}))
    assert bound.may("subscribe", "team") and bound.may("moderate", "team")
    assert not bound.may("publish", "other")


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    grants, begun = Grants.read(["*a" * 2000 + "b"]), time.monotonic()
    assert not grants.allow("publish", "a" * 128 + "c")
    assert time.monotonic() - begun < 1


@property_test
@given(
    user=USERS,
    service=st.booleans(),
    expires=st.integers(0, 2**53).map(float) | st.just(math.inf),
    rules=st.dictionaries(PATTERNS, st.lists(st.sampled_from(ACTIONS))),
    key=st.binary(max_size=32),
)
def test_an_identity_goes_to_other_instances(
    user: str, service: bool, expires: float, rules: dict[str, list[str]], key: bytes
) -> None:
    """And is the same there."""
    identity = Identity(user, service, expires, Grants.read(rules), key)
    assert Identity.load(identity.dump()) == identity


# Anything at all

PARTS = st.one_of(
    st.text(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["alg", "kid", "crit", "b64", "typ", "sub", "exp", "rooms"]), inner
            )
        ),
        max_leaves=6,
    ).map(lambda value: coded(json.dumps(value).encode())),
)


@property_test
@given(said=st.text() | st.lists(PARTS, min_size=1, max_size=4).map(".".join))
def test_any_token_is_taken_or_refused(said: str) -> None:
    """Never another exception."""
    for which in (HMAC, auth(keys=(Key("k", "ann"),)), auth(jwt_secret=SECRET, jwt_leeway=9)):
        with pytest.raises(Unauthorized):
            which.identify(said)


@property_test
@given(
    claims=st.fixed_dictionaries(
        {"sub": USERS | st.integers(), "exp": st.floats() | st.integers() | st.text()},
        optional={
            "rooms": st.lists(PATTERNS | st.none())
            | st.dictionaries(PATTERNS, st.lists(st.sampled_from(ACTIONS) | st.integers())),
            "nbf": st.floats() | st.text(),
            "aud": st.text() | st.integers() | st.lists(st.text()),
            "iss": st.text(),
        },
    )
)
def test_any_signed_claims_are_taken_or_refused(claims: dict[str, Any]) -> None:
    """Never another exception; who is taken has a name and an end."""
    try:
        identity = HMAC.identify(jwt.encode(claims, SECRET, "HS256"))
    except Unauthorized:
        return
    assert identity.user == claims["sub"] and time.time() - 60 < identity.expires < math.inf


@pytest.mark.parametrize("nested", ["[" * 4000, '{"a":' * 1500, '{"alg":' + "9" * 5000 + "}"])
def test_a_token_that_is_deep_or_large_inside(nested: str) -> None:
    head = coded(nested.encode())
    assert refusal(HMAC, f"{head}.{head[:1000]}.AAAA"[:TOKEN_CHARS])[0] == "token_invalid"


def test_who_has_no_keys_for_jwts_does_not_load_their_library() -> None:
    """It takes 70 ms and megabytes."""
    code = (
        "import sys; from streaming import auth, config as c;"
        "auth.Auth(c.Auth(mode='token', keys=(c.Key('k', 'ann'),))).identify('k');"
        "sys.exit(any(name in sys.modules for name in ('jwt', 'cryptography')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
