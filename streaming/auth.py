"""Who a token speaks for, and what they may do.

A token is an API key or a JWT. What an identity rests on can end while a stream of theirs runs:
`Auth.valid` says whether it still holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import orjson

from streaming import config
from streaming.errors import CannotStart, Unauthorized
from streaming.grants import ACTIONS, Grants
from streaming.schema import checked

logger = logging.getLogger("rivulet.auth")

T = TypeVar("T")

SEEN = 10_000  # JWTs that are not verified once more, each 0.1 to 1 ms from cold
TOKEN_CHARS = 8192  # of a token: one that is longer is not looked at
USER_CHARS = 128
EVERYBODY = Grants.read(["*"])
SERVICE = Grants.read({"*": ACTIONS})
# Which signatures a key can have made. The token's header only chooses among them: a public key is
# never the secret of an HS token, and `none` stands nowhere.
HS = ("HS256", "HS384", "HS512")
RS = ("RS256", "RS384", "RS512")
ES = {"secp256r1": ("ES256",), "secp384r1": ("ES384",), "secp521r1": ("ES512",)}


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody who has come in.

    service: may make the calls that speak for others. expires: unix seconds, inf where never. key:
    the digest of the API key that it rests on, or b"".
    """

    user: str
    service: bool = False
    expires: float = math.inf
    grants: Grants = EVERYBODY
    key: bytes = field(default=b"", repr=False)

    def may(self, action: str, room: str) -> bool:
        """Whether this action of grants.ACTIONS is allowed in this room. Their own conversations
        and personal room always are.
        """
        return self.owns(room) or self.grants.allow(action, room)

    def owns(self, room: str) -> bool:
        """Whether it is their personal room or a conversation of theirs."""
        own = f"conv:{quote(self.user, safe='')}"
        return room in (f"user:{self.user}", own) or room.startswith(f"{own}:")

    def dump(self) -> bytes:
        """As bytes, for another instance."""
        rules = [[pattern, list(actions)] for pattern, actions in self.grants.rules]
        expires = self.expires if math.isfinite(self.expires) else None
        return orjson.dumps([self.user, self.service, expires, rules, self.key.hex()])

    @classmethod
    def load(cls, dumped: bytes | str) -> Identity:
        """What `dump` has made."""
        user, service, expires, rules, key = orjson.loads(dumped)
        grants = Grants(tuple((pattern, tuple(actions)) for pattern, actions in rules))
        expires = math.inf if expires is None else expires
        return cls(user, service, expires, grants, bytes.fromhex(key))


class Auth:
    """The keys that tokens are held against. Raises CannotStart where a file cannot be used."""

    def __init__(self, cfg: config.Auth) -> None:
        self.open = cfg.mode == "open"
        self._config = cfg
        self._secret = [_Key(HS, cfg.jwt_secret)] if cfg.jwt_secret else []
        self._public: _File[list[_Key]] = _File(cfg.jwt_key, _public_keys, [])
        self._seen: dict[bytes, Identity] = {}  # by the digest of their JWT
        try:
            self._keys = _File(cfg.keys_file, self._with_file, self._index(()))
        except ValueError as error:
            raise CannotStart(f"auth.keys: {error}") from None

    def guest(self, user: str) -> Identity:
        """Whoever says to be this user, in open mode."""
        return Identity(user, service=True, grants=SERVICE)

    def identify(self, token: str | None) -> Identity:
        """Who this token speaks for. Raises Unauthorized, which does not repeat it."""
        if not token:
            raise Unauthorized("a token is needed", code="token_missing")
        if len(token) > TOKEN_CHARS:
            raise _invalid()
        # By digest, in whatever time that takes: what the time tells is how much of a digest was
        # right, and neither can one be steered towards another, nor turned back into its key.
        name = digest(token)
        known = self._keys.value.get(name) or self._seen.get(name)
        if known is None or known.expires <= time.time():
            known = self._by_jwt(token)
            if len(self._seen) >= SEEN:
                self._seen.clear()
            self._seen[name] = known
        return known

    def valid(self, identity: Identity, now: float) -> bool:
        """Whether it still holds at `now`: it has not expired, and its API key is there and says
        the same.
        """
        if identity.key:
            known = self._keys.value.get(identity.key)
            return known is identity or known == identity  # the first is quick, and the rule
        return now < identity.expires

    def refresh(self) -> bool:
        """Reads the files again; whether any has changed. One that cannot be used changes nothing,
        and is logged once.
        """
        changed = any([self._public.refresh(), self._keys.refresh()])
        if changed:
            self._seen.clear()
        return changed

    def _with_file(self, raw: bytes, suffix: str) -> dict[bytes, Identity]:
        try:
            document = (json if suffix == ".json" else tomllib).loads(raw.decode())
        except tomllib.TOMLDecodeError as error:
            # Where, and not why: that may repeat a name, and some names are secrets, as below.
            raise ValueError(f"is not TOML (at {str(error).rpartition('(at ')[2]}") from None
        # Not said which other names: where somebody has written `key = user` they are secrets.
        if not isinstance(document, dict) or [*document] != ["keys"]:
            raise ValueError("must have a list `keys`, and nothing else")
        if not isinstance(listed := document["keys"], list):
            raise ValueError("`keys` must be a list")
        return self._index([checked(config.Key, v, f"keys[{n}]") for n, v in enumerate(listed)])

    def _index(self, more: Sequence[config.Key]) -> dict[bytes, Identity]:
        """The API keys by digest: those of the configuration, and more. Raises ValueError."""
        found: dict[bytes, Identity] = {}
        for each in (*self._config.keys, *more):
            named = each.key.startswith("sha256:")
            key = bytes.fromhex(each.key[7:]) if named else digest(each.key)
            if key in found:
                raise ValueError(f"a key of {each.user} is there twice")
            grants = each.grants or (SERVICE if each.service else EVERYBODY)
            found[key] = Identity(each.user, each.service, grants=grants, key=key)
        return found

    def _by_jwt(self, token: str) -> Identity:
        keys = [*self._secret, *self._public.value]
        if not keys:
            raise _invalid()
        import jwt  # only who has keys for it needs it, and its cryptography

        try:
            header = jwt.get_unverified_header(token)
            algorithm, kid = header.get("alg"), header.get("kid")
            for key in keys:
                if algorithm not in key.algorithms or (kid and key.kid not in (None, kid)):
                    continue
                with suppress(jwt.InvalidSignatureError):  # it may be of another
                    claims = jwt.decode(
                        token,
                        key.key,
                        algorithms=key.algorithms,
                        audience=self._config.jwt_audience or None,
                        issuer=self._config.jwt_issuer or None,
                        leeway=self._config.jwt_leeway,
                        # When it was made says nothing on whether it holds; one that never ends is
                        # not taken.
                        options={"require": ["sub", "exp"], "verify_iat": False},
                    )
                    return self._by_claims(claims)
        except jwt.ExpiredSignatureError:
            raise Unauthorized("the token has expired", code="token_expired") from None
        except jwt.InvalidAudienceError:
            raise _invalid("the token is for somebody else than this server") from None
        except jwt.ImmatureSignatureError:
            raise _invalid("the token is not valid yet") from None
        # The last three are what numbers and depths of JSON lead to that nobody thought of.
        except (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError):
            pass
        raise _invalid()

    def _by_claims(self, claims: dict[str, Any]) -> Identity:
        user, expires = claims["sub"], int(claims["exp"]) + self._config.jwt_leeway
        if not 0 < len(user) <= USER_CHARS or not user.isprintable():
            raise ValueError("sub")
        grants = Grants.read(claims["rooms"]) if "rooms" in claims else EVERYBODY
        return Identity(user, expires=float(expires), grants=grants)


def digest(token: str) -> bytes:
    """As which an API key is kept."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _invalid(message: str = "the token is not valid") -> Unauthorized:
    return Unauthorized(message, code="token_invalid")


@dataclass(frozen=True, slots=True)
class _Key:
    """What verifies tokens. kid: its name, where it has one."""

    algorithms: Sequence[str]
    key: Any = field(repr=False)
    kid: str | None = None


def _public_keys(raw: bytes, suffix: str) -> list[_Key]:
    """The keys of a JWKS, or the one of a PEM file. Raises ValueError."""
    import jwt
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if not raw.lstrip().startswith(b"{"):
        try:
            key = load_pem_public_key(raw)
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError("is neither a PEM public key nor a JWKS") from None
        if isinstance(key, RSAPublicKey):
            return [_Key(RS, key)]
        if isinstance(key, EllipticCurvePublicKey) and key.curve.name in ES:
            return [_Key(ES[key.curve.name], key)]
        raise ValueError("is neither an RSA key nor one on P-256, P-384 or P-521")
    try:
        found = jwt.PyJWKSet.from_json(raw.decode()).keys
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError("is no JWKS with a key that can be used") from None
    usable = (*RS, *(name for names in ES.values() for name in names))
    keys = [
        _Key((each.algorithm_name,), each.key, each.key_id)
        for each in found
        if each.algorithm_name in usable
        and each.public_key_use != "enc"
        and isinstance(each.key, RSAPublicKey | EllipticCurvePublicKey)
    ]
    if not keys:
        raise ValueError("has no public RSA or EC key for signatures")
    return keys


class _File(Generic[T]):
    """What a file says. value: as of when it could last be used; `none` where there is no path.

    Its content is compared, not its time: two changes may have the same. Raises CannotStart.
    """

    def __init__(self, path: str, read: Callable[[bytes, str], T], none: T) -> None:
        self._path = path
        self._read = read
        self._raw: bytes | None = None
        self._said = ""
        self.value = none
        self.refresh()
        if self._said:
            raise CannotStart(f"{path}: {self._said}")

    def refresh(self) -> bool:
        """Reads it again; whether it says something else."""
        if not self._path:
            return False
        try:
            raw = Path(self._path).read_bytes()
            if raw == self._raw and not self._said:
                return False
            self.value = self._read(raw, Path(self._path).suffix)
        except (OSError, ValueError, RecursionError) as error:
            said = error.strerror if isinstance(error, OSError) else str(error)
            if said != self._said:
                logger.error("file not used", extra={"path": self._path, "reason": said})
            self._said = said or "cannot be read"
            return False
        self._raw, self._said = raw, ""
        return True
