"""OpenAI's HTTP bodies <-> GenerateRequest and Delta (https://platform.openai.com/docs/api-reference).

What OpenAI's protocol has no field for is called as vLLM calls it.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plugins.types import Constraint, Delta, GenerateRequest, Message, RequestError, TokenLogprob

Kind = Literal["chat.completion", "text_completion"]

# Fields of OpenAI's that change nothing about the text: taken and left alone.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Fields that would change the text, with the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
LEAST_LOGPROB = -9999.0  # JSON has no -inf


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Function(BaseModel):
    """A function that is called, or one that may be."""

    model_config = ConfigDict(extra="allow")

    name: str


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class Call(Function):
    arguments: str | dict[str, Any] = "{}"


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Call

    def in_template(self) -> dict[str, Any]:
        """As templates take it: the arguments as an object, which OpenAI sends as JSON."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            arguments = _decoded(arguments or "{}", "messages", "the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise RequestError("messages: the arguments of a tool call must be an object", "messages")
        call = self.model_dump()
        return call | {"function": call["function"] | {"arguments": arguments}}


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None

    def message(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise RequestError(f"messages: one of role {self.role!r} has no content", "messages")
        parts = self.content or ""
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if self.tool_calls:
            extra["tool_calls"] = [call.in_template() for call in self.tool_calls]
        return Message(self.role, parts if isinstance(parts, str) else "".join(part.text for part in parts), extra)


class NamedSchema(BaseModel):
    """OpenAI's json_schema. Every schema is held to, so `strict` makes no difference."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class AnyText(BaseModel):
    type: Literal["text"]


class JsonObject(BaseModel):
    type: Literal["json_object"]


class JsonSchema(BaseModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(BaseModel):
    """vLLM's: one of them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    json_object: bool | None = None


class Body(BaseModel):
    """What both kinds of completion take. A field that is null is as good as left out."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=16)
    # Where the answer ends
    min_tokens: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    # How tokens are chosen
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = None
    prompt_logprobs: int | None = Field(None, ge=0)
    # What the answer has to match
    response_format: Annotated[AnyText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, found: Any) -> Any:
        return {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else found

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that would change the answer and that nothing here heeds."""
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS and value not in NEUTRAL.get(name, ()):
                raise RequestError(f"{name} is not supported here; leave it out", name)

    def constraint(self) -> Constraint | None:
        """What the answer has to match. Raises RequestError for two at once."""
        found = [*self._response_format(), *self._guided(), *self._structured()]
        if len(found) > 1:
            raise RequestError(f"{found[1].field} cannot be combined with {found[0].field}", found[1].field)
        return found[0] if found else None

    def _response_format(self) -> Iterable[Constraint]:
        if isinstance(self.response_format, JsonObject):
            yield Constraint("json_object", "", "response_format")
        if isinstance(self.response_format, JsonSchema):
            schema = json.dumps(self.response_format.json_schema.schema_)
            yield Constraint("json_schema", schema, "response_format")

    def _guided(self) -> Iterable[Constraint]:
        if self.guided_json is not None:
            yield Constraint("json_schema", _schema(self.guided_json, "guided_json"), "guided_json")
        if self.guided_regex is not None:
            yield Constraint("regex", self.guided_regex, "guided_regex")
        if self.guided_choice is not None:
            yield Constraint("choice", tuple(self.guided_choice), "guided_choice")

    def _structured(self) -> Iterable[Constraint]:
        wanted, field = self.structured_outputs, "structured_outputs"
        if wanted is None:
            return
        if wanted.json_ is not None:
            yield Constraint("json_schema", _schema(wanted.json_, field), field)
        if wanted.regex is not None:
            yield Constraint("regex", wanted.regex, field)
        if wanted.choice is not None:
            yield Constraint("choice", tuple(wanted.choice), field)
        if wanted.json_object:
            yield Constraint("json_object", "", field)

    def requests(
        self,
        prompt: str | tuple[int, ...] | tuple[Message, ...],
        adapter: str | None,
        max_tokens: int | None,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None,
        echo: bool = False,
        tools: tuple[dict[str, Any], ...] = (),
    ) -> list[GenerateRequest]:
        """`n` requests for one prompt; with a seed, each gets one of its own."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        constraint = self.constraint()
        return [
            GenerateRequest(
                prompt=prompt,
                tools=tools,
                adapter=adapter,
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                stop=tuple(stop for stop in stops if stop),
                stop_token_ids=tuple(self.stop_token_ids),
                include_stop=self.include_stop_str_in_output,
                ignore_eos=self.ignore_eos,
                constraint=constraint,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=None if self.top_k is None else max(self.top_k, 0),
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                logit_bias=self.logit_bias,
                seed=None if self.seed is None else self.seed + choice,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                echo=echo,
            )
            for choice in range(self.n)
        ]


class ChatBody(Body):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Tool] = []
    tool_choice: Any = "auto"

    def answer(self) -> "Answer":
        """The head of the answer to this body."""
        return Answer(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            kind="chat.completion",
            model=self.model,
            created=int(time.time()),
            n=self.n,
            prompt_logprobs=self.prompt_logprobs is not None,
        )

    def generate_requests(self, adapter: str | None) -> list[GenerateRequest]:
        if self.tool_choice not in ("none", "auto"):
            raise RequestError(
                f"tool_choice = {self.tool_choice!r} is not supported here; auto and none are", "tool_choice"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", "top_logprobs")
        return self.requests(
            tuple(message.message() for message in self.messages),
            adapter,
            self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            tools=tuple(tool.model_dump() for tool in self.tools) if self.tool_choice == "auto" else (),
        )


class CompletionBody(Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs(cls, found: Any) -> Any:
        # A chat says false; clients that have been written for chats say it here too.
        if isinstance(found, dict) and found.get("logprobs") is False:
            return {name: value for name, value in found.items() if name != "logprobs"}
        return found

    def answer(self) -> "Answer":
        """The head of the answer to this body."""
        return Answer(
            id=f"cmpl-{uuid.uuid4().hex}",
            kind="text_completion",
            model=self.model,
            created=int(time.time()),
            n=self.n,
            echoes_logprobs=self.echo and self.logprobs is not None,
            prompt_logprobs=self.prompt_logprobs is not None,
        )

    def generate_requests(self, adapter: str | None) -> list[GenerateRequest]:
        prompts: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int)):
            prompts = list(self.prompt)
        if not prompts:
            raise RequestError("prompt is an empty list", "prompt")
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        scored = max((count for count in wanted if count is not None), default=None)
        return [
            request
            for prompt in prompts
            for request in self.requests(
                prompt if isinstance(prompt, str) else tuple(prompt),
                adapter,
                self.max_tokens,
                logprobs=self.logprobs,
                prompt_logprobs=scored,
                echo=self.echo,
            )
        ]


def _schema(found: str | dict[str, Any], field: str) -> str:
    return found if isinstance(found, str) else json.dumps(found)


def _decoded(text: str, field: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise RequestError(f"{field}: {what} must be JSON ({wrong})", field) from error


@dataclass(frozen=True)
class Answer:
    """What every body of one answer repeats.

    `echoes_logprobs`: the prompt's tokens come first in the logprobs; `prompt_logprobs`: they come by themselves.
    """

    id: str
    kind: Kind
    model: str
    created: int  # seconds since 1970
    n: int = 1  # choices of one prompt
    echoes_logprobs: bool = False
    prompt_logprobs: bool = False

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all that was said in each choice."""
        choices = []
        for index, said in enumerate(answers):
            text: Mapping[str, Any] = {"text": said.text}
            if self.kind == "chat.completion":
                text = {"message": {"role": "assistant", "content": said.text}}
            choices.append(self._choice(index, text, said))
        return self._head(self.kind) | {"choices": choices, "usage": usage(answers, self.n)}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The chunk before the text of a streamed choice: a chat says whose turn it is."""
        if self.kind != "chat.completion":
            return None
        return self._chunk([{"index": choice, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def chunk(self, choice: int, delta: Delta) -> dict[str, Any]:
        text: Mapping[str, Any] = {"text": delta.text}
        if self.kind == "chat.completion":
            text = {"delta": {"content": delta.text} if delta.text else {}}
        return self._chunk([self._choice(choice, text, delta)])

    def closing(self, lasts: Iterable[Delta]) -> dict[str, Any]:
        """The chunk with the usage, after all choices, for those who asked with stream_options.include_usage."""
        return self._chunk([]) | {"usage": usage(list(lasts), self.n)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else "text_completion"
        return self._head(kind) | {"choices": choices}

    def _choice(self, index: int, text: Mapping[str, Any], said: Delta) -> dict[str, Any]:
        tokens = [*(said.prompt_logprobs if self.echoes_logprobs else ()), *said.logprobs]
        logprobs = _chat_logprobs if self.kind == "chat.completion" else _completion_logprobs
        choice = {
            "index": index,
            **text,
            "logprobs": logprobs(tokens) if tokens else None,
            "finish_reason": said.finish_reason,
            "stop_reason": said.stop_reason,
        }
        if self.prompt_logprobs and said.prompt_logprobs:
            choice["prompt_logprobs"] = _prompt_logprobs(said.prompt_logprobs)
        return choice


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: TokenLogprob) -> dict[str, Any]:
        return {
            "token": token.data.decode(errors="replace"),
            "logprob": _number(token),
            "bytes": list(token.data),
        }

    return {"content": [entry(token) | {"top_logprobs": [entry(other) for other in token.top]} for token in tokens]}


def _completion_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [_number(token) for token in tokens],
        "top_logprobs": [
            # Tokens may have one name: the first, likelier one keeps it. The token itself is always there.
            {_name(other): _number(other) for other in reversed((*token.top, token))}
            if token.logprob is not None
            else None
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def _prompt_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token, {token id: its logprob} of the likeliest and of itself."""

    def entry(token: TokenLogprob, rank: int | None) -> dict[str, Any]:
        return {"logprob": _number(token), "rank": rank, "decoded_token": token.data.decode(errors="replace")}

    return [
        {str(token.token): entry(token, None)}
        | {str(other.token): entry(other, rank) for rank, other in enumerate(token.top, 1)}
        if token.logprob is not None
        else None
        for token in tokens
    ]


def _number(token: TokenLogprob) -> float | None:
    return None if token.logprob is None else max(token.logprob, LEAST_LOGPROB)


def _name(token: TokenLogprob) -> str:
    """The token as a text that stands for it alone: part of a character as OpenAI writes it, bytes:\\xe2\\x80."""
    try:
        return token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def usage(lasts: Sequence[Delta], n: int) -> dict[str, int]:
    """Token counts over all choices; a prompt counts once for its n choices."""
    prompt = sum(delta.prompt_tokens for delta in lasts[::n])
    completion = sum(delta.completion_tokens for delta in lasts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def model_list(models: Iterable[str], created: int) -> dict[str, Any]:
    rows = [{"id": model, "object": "model", "created": created, "owned_by": "manta"} for model in models]
    return {"object": "list", "data": rows}


def error(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error envelope."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
