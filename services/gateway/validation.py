"""Every field's limits, checked before any work: what is wrong is named together with the limit and the way out (R24)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from winnow.errors import ContextTooLong, InvalidRequest, UnknownName, Unsupported
from winnow.proto.v1 import common_pb2, winnow_pb2
from winnow.registry import Capabilities, Registry, parse_spec
from winnow.telemetry import is_request_id
from winnow.types import Document, Message, MethodChoice, Sampling
from winnow.wire import documents_from_proto, sampling_from_proto
from winnow.workers.model.spec import ModelSpec

MAX_NAME_CHARS = 64
MAX_PARAMS = 32
MAX_PARAM_CHARS = 256
MAX_MESSAGES = 1024
MAX_DOCUMENTS = 4096
MAX_DOC_ID_CHARS = 512
MAX_DOC_BYTES = 1 << 20
MAX_QUERY_CHARS = 32768
MAX_ANSWER_PREFIX_CHARS = 4096
ROLES = ("system", "user", "assistant")
MAX_IDLE_S = 86400.0
DEFAULT_IDLE_S = 600.0


@dataclass(frozen=True)
class Served:
    """The model behind this gateway. `dtype`: "fp32", "fp16" or "bf16"."""

    name: str
    spec: ModelSpec
    dtype: str
    fingerprint: str


@dataclass(frozen=True)
class Chosen:
    """A checked method: as it travels, and an instance whose capabilities and plans can be asked."""

    choice: MethodChoice
    instance: Any

    @property
    def caps(self) -> Capabilities:
        caps: Capabilities = self.instance.caps
        return caps


def check_model(name: str, served: Served) -> None:
    if name and name != served.name:
        _length("model", name, 0, 512)
        raise UnknownName(f"model: no {name!r} here; this server serves {served.name!r}")


def check_request_id(request_id: str) -> None:
    if request_id and not is_request_id(request_id):
        raise InvalidRequest("request_id must be 1 to 64 of [A-Za-z0-9_.-]; leave it empty for a drawn one")


def check_generate(request: winnow_pb2.GenerateRequest, has_template: bool) -> Sampling:
    """Fields of a Generate request that need neither tokenizer nor registry; returns its sampling.

    Raises:
        InvalidRequest: names the field.
    """
    check_request_id(request.request_id)
    given = [name for name in ("prompt", "messages", "question") if len(getattr(request, name)) > 0]
    if request.session_id:
        _length("session_id", request.session_id, 1, MAX_NAME_CHARS)
        if given != ["question"]:
            raise InvalidRequest("question: a request with session_id needs a question, and neither prompt nor messages")
        if request.HasField("prefill") and request.prefill.name:
            raise InvalidRequest("prefill: the session's text was read with the session's own method; leave it out")
        if request.HasField("reducer") and request.reducer.name:
            raise InvalidRequest("reducer: a session keeps its whole text; leave it out, or send prompt or messages instead")
    elif len(given) != 1:
        named = " and ".join(given) or "none of them (an empty prompt counts as none)"
        raise InvalidRequest(f"exactly one of prompt, messages, question must be given, got {named}")
    elif given == ["question"]:
        raise InvalidRequest("question: needs session_id; open a session first, or send prompt or messages")
    if len(request.messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages: at most {MAX_MESSAGES}, got {len(request.messages)}")
    for i, message in enumerate(request.messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"messages[{i}].role must be one of {', '.join(ROLES)}, got {message.role!r:.24}")
    if request.messages and not request.messages[-1].content.strip():
        raise InvalidRequest("messages: the last one is empty; say what is asked")
    if request.messages and not has_template:
        raise Unsupported("messages: this model has no chat template; send prompt instead")
    _length("answer_prefix", request.answer_prefix, 0, MAX_ANSWER_PREFIX_CHARS)
    if request.answer_prefix and given == ["prompt"]:
        raise InvalidRequest("answer_prefix: goes with messages or question; put it at the end of the prompt instead")
    return sampling_from_proto(request.sampling)


def messages_of(request: winnow_pb2.GenerateRequest) -> list[Message]:
    return [Message(m.role, m.content) for m in request.messages]


def check_context(prompt_tokens: int, max_tokens: int, limit: int) -> None:
    """Prompt and answer fit the model.

    Raises:
        ContextTooLong: names both numbers and the limit.
    """
    if prompt_tokens + max_tokens > limit:
        raise ContextTooLong(
            f"prompt has {prompt_tokens} tokens and sampling.max_tokens is {max_tokens}: together "
            f"{prompt_tokens + max_tokens}, the model's context is {limit}; shorten the text or lower max_tokens"
        )


def check_rank(request: winnow_pb2.RankRequest) -> list[Document]:
    """The documents of a Rank request. Raises InvalidRequest naming the field."""
    check_request_id(request.request_id)
    _length("query", request.query, 1, MAX_QUERY_CHARS)
    if not 1 <= len(request.documents) <= MAX_DOCUMENTS:
        raise InvalidRequest(
            f"documents: 1 to {MAX_DOCUMENTS} are ranked at once, got {len(request.documents)}; for more use `winnow rank-batch`"
        )
    seen: dict[str, int] = {}
    for i, document in enumerate(request.documents):
        _length(f"documents[{i}].doc_id", document.doc_id, 1, MAX_DOC_ID_CHARS)
        n_bytes = len(document.text.encode())
        if n_bytes > MAX_DOC_BYTES:
            raise InvalidRequest(f"documents[{i}].text: {n_bytes} bytes, at most {MAX_DOC_BYTES}; split the document")
        if document.doc_id in seen:
            raise InvalidRequest(f"documents[{i}].doc_id is the same as documents[{seen[document.doc_id]}]'s; ids must be unique")
        seen[document.doc_id] = i
    if request.top_n < 0:
        raise InvalidRequest(f"top_n must be 0 (all) or more, got {request.top_n}")
    return documents_from_proto(request.documents)


def check_idle_timeout(seconds: float) -> float:
    """Idle time of a session; 0 is the default."""
    if seconds == 0:
        return DEFAULT_IDLE_S
    if math.isnan(seconds) or not 1 <= seconds <= MAX_IDLE_S:
        raise InvalidRequest(f"idle_timeout_s must be in [1, {MAX_IDLE_S:.0f}] or 0 for {DEFAULT_IDLE_S:.0f}, got {seconds}")
    return seconds


def choose(slot: str, registry: Registry[Any], message: common_pb2.Method, default: str, served: Served) -> Chosen:
    """The method a request asks for, checked against the model.

    Raises:
        InvalidRequest: name or parameters break a limit, or a parameter does not fit.
        UnknownName: no such method.
        Unsupported: the method cannot work with this model.
    """
    _length(f"{slot}.name", message.name, 0, MAX_NAME_CHARS)
    if len(message.params) > MAX_PARAMS:
        raise InvalidRequest(f"{slot}.params: at most {MAX_PARAMS}, got {len(message.params)}")
    for key, value in message.params.items():
        _length(f"{slot}.params: each name's length", key, 1, MAX_NAME_CHARS)
        _length(f"{slot}.params[{key}]", value, 0, MAX_PARAM_CHARS)
    if message.name:
        choice = MethodChoice(message.name, dict(message.params))
    elif message.params:
        raise InvalidRequest(f"{slot}.params: given without {slot}.name; name the method they belong to")
    else:
        choice = MethodChoice(*parse_spec(default))
    instance = registry.create(choice.name, choice.params)
    check_capabilities(slot, choice.name, instance.caps, served, registry)
    return Chosen(choice, instance)


def check_capabilities(slot: str, name: str, caps: Capabilities, served: Served, registry: Registry[Any]) -> None:
    """Raises Unsupported naming what does not fit and what would."""
    why = unfit(caps, served)
    if why:
        able = [e.name for e in registry if e.cls is not None and not unfit(e.cls.caps, served)]
        raise Unsupported(f"{slot}: {name} cannot work with {served.name}: {why}; pick one of {', '.join(able) or 'none'}")


def unfit(caps: Capabilities, served: Served) -> str:
    """Why a method cannot work with the model; "" = it can."""
    spec = served.spec
    heads = "mha" if spec.n_q_heads == spec.n_kv_heads else "gqa"
    if caps.families and spec.family not in caps.families:
        return f"it knows the families {', '.join(sorted(caps.families))}, not {spec.family}"
    if heads not in caps.heads:
        return f"it needs {' or '.join(sorted(caps.heads))} heads, the model has {heads}"
    if served.dtype not in caps.dtypes:
        return f"it needs {' or '.join(sorted(caps.dtypes))}, the model runs in {served.dtype}"
    if spec.windowed and not caps.sliding_window:
        return "the model has sliding-window layers"
    if spec.softcapped and not caps.softcap:
        return "the model caps its attention logits"
    return ""


def _length(name: str, value: Sequence[Any] | str, low: int, high: int) -> None:
    if not low <= len(value) <= high:
        raise InvalidRequest(f"{name} must be {low} to {high} characters, got {len(value)}")
