"""OpenAI's HTTP bodies <-> GenerateRequest and Delta (https://platform.openai.com/docs/api-reference)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plugins.types import Delta, GenerateRequest, Message, RequestError

Kind = Literal["chat.completion", "text_completion"]

# Fields of OpenAI's that change nothing about the text: taken and left alone.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Fields that would change the text, with the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False, 0),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: str
    content: str | list[TextPart]

    def message(self) -> Message:
        parts = self.content
        return Message(self.role, parts if isinstance(parts, str) else "".join(part.text for part in parts))


class Body(BaseModel):
    """What both kinds of completion take. top_k is vLLM's addition to the protocol."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that would change the answer and that nothing here heeds."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in HARMLESS and value not in NEUTRAL.get(name, ()):
                raise RequestError(f"{name} is not supported here; leave it out", name)

    def requests(
        self, prompt: str | tuple[int, ...] | tuple[Message, ...], adapter: str | None, max_tokens: int | None
    ) -> list[GenerateRequest]:
        """`n` requests for one prompt; with a seed, each gets one of its own."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return [
            GenerateRequest(
                prompt=prompt,
                adapter=adapter,
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=max(self.top_k, 0),
                seed=None if self.seed is None else self.seed + choice,
                stop=tuple(stop for stop in stops if stop),
            )
            for choice in range(self.n)
        ]


class ChatBody(Body):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def generate_requests(self, adapter: str | None) -> list[GenerateRequest]:
        prompt = tuple(message.message() for message in self.messages)
        return self.requests(prompt, adapter, self.max_completion_tokens or self.max_tokens)


class CompletionBody(Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)

    def generate_requests(self, adapter: str | None) -> list[GenerateRequest]:
        prompts: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int)):
            prompts = list(self.prompt)
        if not prompts:
            raise RequestError("prompt is an empty list", "prompt")
        ready = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
        return [request for prompt in ready for request in self.requests(prompt, adapter, self.max_tokens)]


@dataclass(frozen=True)
class Answer:
    """What every body of one answer repeats."""

    id: str
    kind: Kind
    model: str
    created: int  # seconds since 1970
    n: int = 1  # choices of one prompt

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, texts: Iterable[str], lasts: Iterable[Delta]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from the text and the last Delta of each choice."""
        lasts = list(lasts)
        choices = [self._choice(index, text, last) for index, (text, last) in enumerate(zip(texts, lasts, strict=True))]
        return self._head(self.kind) | {"choices": choices, "usage": usage(lasts, self.n)}

    def _choice(self, index: int, text: str, last: Delta) -> dict[str, Any]:
        said: Mapping[str, Any] = {"text": text}
        if self.kind == "chat.completion":
            said = {"message": {"role": "assistant", "content": text}}
        return {"index": index, **said, "logprobs": None, "finish_reason": last.finish_reason}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The chunk before the text of a streamed choice: a chat says whose turn it is."""
        if self.kind != "chat.completion":
            return None
        return self._chunk([{"index": choice, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def chunk(self, choice: int, delta: Delta) -> dict[str, Any]:
        said: Mapping[str, Any] = {"text": delta.text}
        if self.kind == "chat.completion":
            said = {"delta": {"content": delta.text} if delta.text else {}}
        return self._chunk([{"index": choice, **said, "logprobs": None, "finish_reason": delta.finish_reason}])

    def closing(self, lasts: Iterable[Delta]) -> dict[str, Any]:
        """The chunk with the usage, after all choices, for those who asked with stream_options.include_usage."""
        return self._chunk([]) | {"usage": usage(list(lasts), self.n)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else "text_completion"
        return self._head(kind) | {"choices": choices}


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
