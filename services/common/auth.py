"""Who may call what: bearer tokens (JWT, HS256) and one rule per RPC (promise R28).

A call without a rule is refused, so a new RPC is closed until someone decides its scope. Public and internal tokens have
different audiences: a public token never opens a worker. Only liveness (grpc.health.v1) is open, and says one word.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import jwt
from google.protobuf import descriptor_pool

from winnow.config import AuthConfig, home
from winnow.errors import ConfigError, Forbidden, Unauthenticated

PUBLIC = "winnow"
INTERNAL = "winnow-internal"
PUBLIC_SCOPES = ("generate", "rank", "read")
INTERNAL_SCOPE = "internal"
MIN_SECRET_CHARS = 32


@dataclass(frozen=True)
class Rule:
    """What a call needs: any one of `scopes`, for `audience` ("" = the audience of the server it is served by)."""

    scopes: frozenset[str] = frozenset()
    audience: str = ""
    is_open: bool = False


def _public(scope: str) -> Rule:
    return Rule(frozenset({scope, "admin"}), PUBLIC)


_INTERNAL = Rule(frozenset({INTERNAL_SCOPE}), INTERNAL)
_OPEN = Rule(is_open=True)
_REFLECTION = Rule(frozenset({"read", "admin", INTERNAL_SCOPE}))

RULES: Mapping[str, Rule] = {
    "/winnow.v1.Winnow/Generate": _public("generate"),
    "/winnow.v1.Winnow/Rank": _public("rank"),
    "/winnow.v1.Winnow/GetCapabilities": _public("read"),
    "/winnow.v1.Winnow/ListMethods": _public("read"),
    "/winnow.v1.Winnow/ListModels": _public("read"),
    "/winnow.v1.Winnow/OpenSession": _public("generate"),
    "/winnow.v1.Winnow/ListSessions": _public("read"),
    "/winnow.v1.Winnow/CloseSession": _public("generate"),
    "/winnow.v1.Winnow/Cancel": _public("generate"),
    "/winnow.v1.Winnow/GetStatus": _public("read"),
    "/winnow.v1.Worker/Hello": _INTERNAL,
    "/winnow.v1.Worker/Load": _INTERNAL,
    "/winnow.v1.Prefill/Prefill": _INTERNAL,
    "/winnow.v1.Prefill/Rank": _INTERNAL,
    "/winnow.v1.Segments/Fetch": _INTERNAL,
    "/winnow.v1.Segments/Renew": _INTERNAL,
    "/winnow.v1.Segments/Release": _INTERNAL,
    "/winnow.v1.Retrieval/Open": _INTERNAL,
    "/winnow.v1.Retrieval/Attend": _INTERNAL,
    "/winnow.v1.Retrieval/Close": _INTERNAL,
    "/winnow.v1.Draft/Score": _INTERNAL,
    "/winnow.v1.Decode/Decode": _INTERNAL,
    "/grpc.health.v1.Health/Check": _OPEN,
    "/grpc.health.v1.Health/Watch": _OPEN,
    "/grpc.health.v1.Health/List": Rule(frozenset({"read", "admin", INTERNAL_SCOPE})),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _REFLECTION,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _REFLECTION,
}


@dataclass(frozen=True)
class Principal:
    """Who is calling. With auth off everybody is `ANYONE`."""

    tenant: str
    scopes: frozenset[str]


ANYONE = Principal("default", frozenset({*PUBLIC_SCOPES, "admin", INTERNAL_SCOPE}))
_principal: ContextVar[Principal] = ContextVar("winnow_principal", default=ANYONE)


def current_principal() -> Principal:
    """The caller of the RPC being served."""
    return _principal.get()


@contextlib.contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    token = _principal.set(principal)
    try:
        yield
    finally:
        _principal.reset(token)


def mint(
    secret: str,
    *,
    audience: str = PUBLIC,
    scopes: Iterable[str] = PUBLIC_SCOPES,
    tenant: str = "default",
    ttl_s: float = 86400.0,
) -> str:
    """A signed token. `audience`: PUBLIC or INTERNAL; `ttl_s`: seconds until it expires."""
    now = time.time()
    claims = {"aud": audience, "sub": tenant, "scope": " ".join(scopes), "iat": int(now), "exp": now + ttl_s}
    return jwt.encode(claims, secret, algorithm="HS256")


def verify(token: str, secret: str, audience: str) -> Principal:
    """The caller a token speaks for.

    Raises:
        Unauthenticated: malformed, expired, wrong signature, another algorithm (none included) or another audience.
            The message says which, never what was in it.
    """
    try:
        claims = jwt.decode(
            token, secret, algorithms=["HS256"], audience=audience, options={"require": ["exp", "aud", "sub"]}
        )  # PyJWT compares signatures in constant time
    except jwt.ExpiredSignatureError:
        raise Unauthenticated("token: expired; ask for a new one") from None
    except jwt.InvalidAudienceError:
        raise Unauthenticated(f"token: for another audience than {audience!r}") from None
    except jwt.PyJWTError:
        raise Unauthenticated("token: malformed or not signed by this server") from None
    scope = claims.get("scope", "")
    if not isinstance(scope, str) or not isinstance(claims["sub"], str) or not claims["sub"]:
        raise Unauthenticated("token: its claims have the wrong form")
    return Principal(claims["sub"], frozenset(scope.split()))


@dataclass(frozen=True)
class Authenticator:
    """Checks every call of one server. `secret` "" = auth off (loopback only; `build_server` sees to that)."""

    secret: str
    audience: str
    rules: Mapping[str, Rule]

    def check(self, rpc: str, metadata: Mapping[str, str]) -> Principal:
        """The caller of `rpc` (full name, "/package.Service/Method").

        Raises:
            Unauthenticated: no token or a bad one.
            Forbidden: a good token without the scope, or an RPC without a rule.
        """
        rule = self.rules.get(rpc)
        if rule is None:
            raise Forbidden("this call has no access rule and is closed")
        if rule.is_open:
            return Principal("", frozenset())
        if not self.secret:
            return ANYONE
        kind, _, token = metadata.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthenticated("authorization: this call needs 'Bearer <token>'; set WINNOW_TOKEN or pass token=")
        principal = verify(token.strip(), self.secret, rule.audience or self.audience)
        if not rule.scopes & principal.scopes:
            raise Forbidden(f"this call needs one of the scopes {', '.join(sorted(rule.scopes))}")
        return principal


def methods_of(services: Iterable[str]) -> list[str]:
    """Full names of every RPC of the services named, from their descriptors."""
    pool = descriptor_pool.Default()
    return [f"/{name}/{m.name}" for name in services for m in pool.FindServiceByName(name).methods]


def require_rules(services: Iterable[str], rules: Mapping[str, Rule] = RULES) -> None:
    """Refuse to serve an RPC nobody wrote a rule for.

    Raises:
        ConfigError: names the calls without a rule.
    """
    missing = [rpc for rpc in methods_of(services) if rpc not in rules]
    if missing:
        raise ConfigError(f"auth: no access rule for {', '.join(missing)}; add one to winnow.services.common.auth.RULES")


def resolve_secret(config: AuthConfig, run_dir: Path | None = None) -> str:
    """The signing secret: from the configuration, else one made once and kept in the run folder (mode 0600).

    Returns "" when auth is off.

    Raises:
        ConfigError: shorter than 32 characters.
    """
    if not config.enabled:
        return ""
    secret = config.secret or _kept_secret(run_dir or home() / "run")
    if len(secret) < MIN_SECRET_CHARS:
        raise ConfigError(f"auth.secret: {len(secret)} characters, at least {MIN_SECRET_CHARS} are needed")
    return secret


def _kept_secret(run_dir: Path) -> str:
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir / "secret"
    fresh = run_dir / f"secret.{os.getpid()}.{secrets.token_hex(4)}"
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(48))
    try:
        os.link(fresh, path)  # atomic: of several processes starting at once one wins and all read its secret
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text().strip()
