"""Tokens for tests: keys made here, and JWTs signed with them."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

SECRET = "a secret of at least 32 characters".replace(" ", "-")


def bearer(text: str) -> dict[str, str]:
    """The header with this token."""
    return {"Authorization": f"Bearer {text}"}


def pair(kind: str, number: int = 0) -> tuple[str, str]:
    """Private and public key as PEM, of a kind: RS256, ES256, ES384. number: another one."""
    return _pair(kind, number)


@cache
def _pair(kind: str, number: int) -> tuple[str, str]:
    curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES256K": ec.SECP256K1()}
    key: Any
    if kind in curves:
        key = ec.generate_private_key(curves[kind])
    else:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


def jwk(kind: str, number: int = 0, private: bool = False, **more: Any) -> dict[str, Any]:
    """The public key, or the private one, as a member of a JWKS."""
    algorithm = jwt.get_algorithm_by_name(kind)
    key = algorithm.prepare_key(pair(kind, number)[0 if private else 1])
    return {**json.loads(algorithm.to_jwk(key)), **more}


def token(
    user: Any = "ann", key: str = SECRET, kind: str = "HS256", kid: str = "", **claims: Any
) -> str:
    """A JWT that lasts a minute. A claim given as None is left out."""
    said = {"sub": user, "exp": time.time() + 60, **claims}
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, key, kind, headers={"kid": kid} if kid else None)
