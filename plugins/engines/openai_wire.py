"""OpenAI's wire as a client sees it: a GenerateRequest becomes a body, what comes back becomes Deltas.

What OpenAI has no field for is called as vLLM calls it. The server's side of it is serve/protocols/openai.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from plugins.types import (
    Constraint,
    Delta,
    FinishReason,
    GenerateRequest,
    Message,
    RequestError,
    TokenLogprob,
    UnavailableError,
)

BYTES = "bytes:"  # how a token is named that is part of a character: bytes:\xe2\x80


def question(request: GenerateRequest, model: str) -> tuple[str, dict[str, Any]]:
    """The path to post `request` to, and the body. Raises RequestError for what the protocol has no way to say."""
    is_chat = bool(request.prompt) and isinstance(request.prompt[0], Message)
    # vLLM scores a prompt only in an answer that is not streamed; and where the prompt's tokens lead the answer's, how
    # many they are has to be known first.
    streams = request.prompt_logprobs is None and not (request.echo and request.logprobs is not None)
    fields = {
        "model": model,
        "stream": streams,
        "stream_options": {"include_usage": True} if streams else None,
        **(_conversation(request) if is_chat else _completion(request)),
        "max_tokens": request.max_tokens,
        "min_tokens": request.min_tokens,
        "stop": list(request.stop) or None,
        "stop_token_ids": list(request.stop_token_ids) or None,
        "include_stop_str_in_output": request.include_stop or None,
        "ignore_eos": request.ignore_eos or None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": -1 if request.top_k == 0 else request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "frequency_penalty": request.frequency_penalty or None,
        "presence_penalty": request.presence_penalty or None,
        "logit_bias": {str(token): bias for token, bias in request.logit_bias.items()} or None,
        "seed": request.seed,
        "prompt_logprobs": request.prompt_logprobs,
        **(_constraint(request.constraint) if request.constraint else {}),
    }
    path = "chat/completions" if is_chat else "completions"
    return path, {name: value for name, value in fields.items() if value is not None}


def _conversation(request: GenerateRequest) -> dict[str, Any]:
    if request.echo:
        raise RequestError("echo goes with a prompt: messages are not sent back", "echo")
    return {
        "messages": [_message(part) for part in request.prompt if isinstance(part, Message)],
        "tools": list(request.tools) or None,
        "logprobs": None if request.logprobs is None else True,
        "top_logprobs": request.logprobs,
    }


def _completion(request: GenerateRequest) -> dict[str, Any]:
    if request.tools:
        raise RequestError("tools go with messages", "tools")
    if request.max_tokens is None:
        raise RequestError("max_tokens is needed with a prompt: without it, the server takes 16", "max_tokens")
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    return {"prompt": prompt, "echo": request.echo or None, "logprobs": request.logprobs}


def _message(message: Message) -> dict[str, Any]:
    extra = dict(message.extra)
    if "tool_calls" in extra:
        extra["tool_calls"] = [_call(call) for call in extra["tool_calls"]]
    return {"role": message.role, "content": message.content, **extra}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a function, its arguments as JSON again."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


CONSTRAINTS = ("response_format", "structured_outputs")  # what a constraint, whatever its sender called it, is sent as


def _constraint(constraint: Constraint) -> dict[str, Any]:
    match constraint.kind:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            # strict: without it, a schema is a hint to OpenAI's own servers.
            named = {"name": "answer", "strict": True, "schema": _schema(constraint)}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        case "regex":
            return {"structured_outputs": {"regex": constraint.value}}
        case "choice":
            return {"structured_outputs": {"choice": list(constraint.value)}}


def _schema(constraint: Constraint) -> Any:
    assert isinstance(constraint.value, str)
    try:
        return json.loads(constraint.value)
    except json.JSONDecodeError as error:
        raise RequestError(f"{constraint.field}: a schema must be JSON ({error})", constraint.field) from error


class Answer:
    """What one answer to `request` says, chunk by chunk; a whole body is a chunk too. `server` is named in errors."""

    def __init__(self, request: GenerateRequest, server: str) -> None:
        self._request, self._server = request, server
        self._counts: tuple[int, int] | None = None  # tokens of the prompt and of the answer, once the server has said
        self._last: Delta | None = None

    def take(self, chunk: Mapping[str, Any]) -> Delta | None:
        """What `chunk` says, if it says anything. What comes with the reason for the end waits for `end`.

        Raises UnavailableError for what a Delta cannot hold.
        """
        try:
            if usage := chunk.get("usage"):
                self._counts = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in chunk.get("choices") or ():  # one: no more were asked for
                delta = self._delta(choice, choice.get("prompt_logprobs") or chunk.get("prompt_logprobs"))
                if delta.finish_reason is None:
                    return delta if delta.text or delta.logprobs else None
                self._last = delta
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnavailableError(f"{self._server} sent what is no answer of OpenAI's: {str(chunk)[:200]}") from error
        return None

    def end(self) -> Delta:
        """The last Delta, when all chunks have come. Raises UnavailableError where one is missing."""
        if self._last is None:
            raise UnavailableError(f"{self._server} ended an answer without a reason")
        if self._counts is None:
            raise UnavailableError(f"{self._server} counts no tokens: it has to heed stream_options.include_usage")
        prompt, completion = self._counts
        return replace(self._last, prompt_tokens=prompt, completion_tokens=completion)

    def _delta(self, choice: Mapping[str, Any], prompt_scores: Sequence[Mapping[str, Any] | None] | None) -> Delta:
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        for name, value in said.items():
            if value and name not in ("role", "content"):
                raise UnavailableError(
                    f"{self._server} sends {name} beside the text, which cannot be passed on: "
                    "have it leave all that the model writes in the text"
                )
        reason = choice.get("finish_reason")
        if reason is not None and reason not in get_args(FinishReason):
            raise UnavailableError(f"{self._server} ended an answer because of {reason!r}")
        text = said.get("content") or ""
        if not isinstance(text, str):
            raise TypeError("content that is not text")
        prompt, completion = self._counts or (0, 0)
        found = choice.get("logprobs")
        tokens = _tokens(found, self._request.logprobs or 0) if found else ()
        led = prompt if self._request.echo else 0  # the prompt's tokens come first
        return Delta(
            text,
            prompt,
            completion,
            reason,
            choice.get("stop_reason"),
            tokens[led:],
            self._prompt_tokens(prompt_scores or (), tokens[:led]),
        )

    def _prompt_tokens(
        self, scores: Sequence[Mapping[str, Any] | None], echoed: Sequence[TokenLogprob]
    ) -> tuple[TokenLogprob, ...]:
        """From vLLM's form: for each token, {token id: its logprob} of itself and of the likeliest.

        `echoed`: the same tokens as OpenAI's form has them, with bytes and places but without ids; or nothing.
        """
        if self._request.prompt_logprobs is None:
            return ()
        if not scores:
            raise UnavailableError(f"{self._server} did not send the prompt_logprobs that it was asked for")
        tokens = []
        first = self._request.prompt[0]
        for place, score in enumerate(scores):
            shown = echoed[place] if echoed else TokenLogprob(None, b"", None)
            spelt = {other.logprob: other.data for other in (*shown.top, shown)}  # here, a token is known by its score
            ranked = [
                TokenLogprob(
                    int(token), spelt.get(found["logprob"], (found["decoded_token"] or "").encode()), found["logprob"]
                )
                for token, found in (score or {}).items()
            ]
            own = ranked[0] if ranked else replace(shown, token=first if isinstance(first, int) else None)
            tokens.append(replace(own, top=_best(ranked, self._request.prompt_logprobs), offset=shown.offset))
        return tuple(tokens)


def _tokens(found: Mapping[str, Any], count: int) -> tuple[TokenLogprob, ...]:
    """A choice's logprobs, in a chat's form or in a completion's, each with `count` likeliest. A chat's have no places."""
    if "content" in found:
        return tuple(
            replace(_entry(entry), top=_best([_entry(other) for other in entry.get("top_logprobs") or ()], count))
            for entry in found["content"] or ()
        )
    tops = found["top_logprobs"] or [None] * len(found["tokens"])
    columns = zip(found["tokens"], found["token_logprobs"], tops, found["text_offset"], strict=True)
    return tuple(
        TokenLogprob(None, _bytes(name), logprob, _best([_named(*pair) for pair in (top or {}).items()], count), offset)
        for name, logprob, top, offset in columns
    )


def _entry(entry: Mapping[str, Any]) -> TokenLogprob:
    spelt = entry.get("bytes")
    return TokenLogprob(None, entry["token"].encode() if spelt is None else bytes(spelt), entry["logprob"])


def _named(name: str, logprob: float) -> TokenLogprob:
    return TokenLogprob(None, _bytes(name), logprob)


def _bytes(name: str) -> bytes:
    """The bytes of a token that stands under `name` in a completion."""
    if name.startswith(BYTES):
        return bytes.fromhex(name.removeprefix(BYTES).replace("\\x", ""))
    return name.encode()


def _best(tokens: Sequence[TokenLogprob], count: int) -> tuple[TokenLogprob, ...]:
    return tuple(sorted(tokens, key=lambda token: token.logprob or 0.0, reverse=True)[:count])
