"""The values that finetuning, serving, the plug-ins and the web page hand to each other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from plugins.spec import NOT_EMPTY, UserError, short_spec

Row = Mapping[str, Any]
FinishReason = Literal["stop", "length"]


@short_spec
class ModelSource:
    """A base model: a directory, or a hub id with an optional revision (branch, tag or commit).

    `dtype` is what it computes in. "auto" is bf16 where the processor multiplies bf16 natively, else fp32.
    """

    path: Annotated[str, NOT_EMPTY]
    revision: str | None = None
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether `path` means a directory: it is one, or it is written as one (starts with / . or ~)."""
        return self.path.startswith(("/", ".", "~")) or Path(self.path).exists() or self.path.count("/") > 1


@dataclass(frozen=True)
class Message:
    """A turn of a conversation. `extra`: what else a chat template may read of it: tool_calls, name, tool_call_id."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Example:
    """One tokenised row. `labels` has the length of `input_ids`; IGNORE where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each a whole tokenised row with labels on the answer: `chosen` is to be preferred."""

    chosen: Example
    rejected: Example


IGNORE = -100  # the index that torch's cross entropy leaves out


@dataclass(frozen=True)
class Constraint:
    """What the whole answer has to match: a JSON schema, any JSON object, a regular expression, one of several texts.

    `field` is what the sender called it.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    value: str | tuple[str, ...]  # the schema as JSON, the expression, the texts; "" for json_object
    field: str


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One request for text, whole and immutable: nothing else about a request is kept anywhere.

    `prompt` is text, token ids, or messages for the chat template, which gets `tools` (in OpenAI's form) too.
    Where a field may be None, None means as the model's own generation_config has it, or else that it changes nothing.
    `max_tokens` None means, where that says nothing either, up to the engine's length. 0, to only read the prompt, goes
    with `echo` or `prompt_logprobs`.
    """

    prompt: str | tuple[int, ...] | tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    adapter: str | None = None
    # Where the answer ends
    max_tokens: int | None = None
    min_tokens: int | None = None  # till then, no end, no stop token and no stop string
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the stop string, or stop token, stays in the text
    ignore_eos: bool = False
    constraint: Constraint | None = None
    # How tokens are chosen
    temperature: float | None = None  # 0: the likeliest
    top_p: float | None = None
    top_k: int | None = None  # 0: all
    min_p: float | None = None  # as a share of the likeliest token's probability
    repetition_penalty: float | None = None  # of tokens in the prompt and the answer
    frequency_penalty: float = 0.0  # of tokens in the answer
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    # What comes beside the answer
    logprobs: int | None = None  # this many of the likeliest tokens, besides the token itself
    prompt_logprobs: int | None = None
    echo: bool = False  # the text begins with the prompt


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and its log-probability in the model's own distribution: before any bias, penalty or temperature."""

    token: int | None  # None: only the server that has the model knows it
    data: bytes  # UTF-8 in most cases; part of a character in some
    logprob: float | None  # None: the first token of a prompt, which nothing predicts
    top: tuple["TokenLogprob", ...] = ()  # the likeliest in its place, the best first
    offset: int = 0  # where in the answer's text it begins, in characters; an echoed prompt is part of that text


@dataclass(frozen=True)
class Delta:
    """New text of an answer. The last one carries the reason for the end; counts are of the answer so far.

    `stop_reason`: the stop string or stop token that ended it. `logprobs`: of the tokens that came since the last Delta,
    where they were asked for; `prompt_logprobs`: of the prompt, in the first.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @staticmethod
    def joined(deltas: "Sequence[Delta]") -> "Delta":
        """One Delta that says what `deltas`, one or more that follow each other, say."""
        if len(deltas) == 1:
            return deltas[0]
        return replace(
            deltas[-1],
            text="".join(delta.text for delta in deltas),
            logprobs=tuple(token for delta in deltas for token in delta.logprobs),
            prompt_logprobs=tuple(token for delta in deltas for token in delta.prompt_logprobs),
        )


class RequestError(UserError):
    """A request that the engine cannot serve as asked (too long, say). `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message


class UnavailableError(RuntimeError):
    """What the engine depends on cannot answer, whatever the request.

    `retry_after_s`: when it may answer again; None: not before somebody mends it.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.message, self.retry_after_s = message, retry_after_s

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """run.json of a finished run: the contract between training, serving and the web page.

    It is written last; a run directory without it is unfinished.
    """

    name: str
    base: str
    revision: str | None
    method: Literal["lora", "full"]
    created: str  # ISO 8601, UTC
    seconds: float
    steps: int
    metrics: dict[str, float]
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    FILE: ClassVar[str] = "run.json"

    @classmethod
    def read(cls, run: Path) -> "RunManifest | None":
        """The manifest of run directory `run`; None where the run is unfinished. Keys of later versions are ignored."""
        try:
            found = json.loads((run / cls.FILE).read_text())
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, NotADirectoryError) as error:
            raise UserError(f"{run / cls.FILE} is damaged: {error}") from error
        if not isinstance(found, dict) or not {"name", "base", "method"} <= found.keys():
            raise UserError(f"{run / cls.FILE} is not of a run")
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    def write(self, run: Path) -> None:
        """Write run.json into `run`, whole or not at all."""
        partial = run / f".{self.FILE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(run / self.FILE)

    def weights(self, run: Path) -> Path:
        """Where the trained weights lie: `adapter/` (PEFT's format) or `model/`."""
        return run / ("adapter" if self.method == "lora" else "model")
