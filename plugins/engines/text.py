"""The text side of an engine: a prompt becomes tokens, tokens become an answer that can be streamed.

No torch here: any engine that counts in tokens may use it.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from plugins.engines.grammar import Grammars
from plugins.model_files import has_tokenizer
from plugins.pretrained import load
from plugins.spec import UserError
from plugins.template import Tokenizer, conversation_text, end_of_turn
from plugins.types import GenerateRequest, Message, ModelSource, RequestError

CUT = "\ufffd"  # what a decoder puts where the bytes of a character are not all there
WINDOW = 16  # tokens decoded again with new ones, at most: enough for the context that a decoder wants


class Spelling:
    """The bytes of each token by itself, which a decoder joins: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._names = tokenizer.convert_ids_to_tokens
        self._added = {number: str(token).encode() for number, token in tokenizer.added_tokens_decoder.items()}
        kinds = _decoder(tokenizer) or ""
        self._byte_level, self._bytes, self._words = (kind in kinds for kind in ("ByteLevel", "ByteFallback", "▁"))

    def __call__(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        name: str = self._names(token) or ""  # a model may have more rows than its tokenizer has tokens
        if self._byte_level:
            return bytes(BYTE_OF[character] for character in name)
        if self._bytes and len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        return (name.replace("▁", " ") if self._words else name).encode()


def _decoder(tokenizer: Any) -> str | None:
    """What it is made of, as JSON; None where that is code of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return backend.decoder.__getstate__().decode() if backend.decoder is not None else ""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way of writing bytes (Radford et al., 2019): printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


@dataclass(frozen=True)
class Voice:
    """How a model, or an adapter of it, is spoken to: its tokenizer with the chat template, and what ends an answer."""

    tokenizer: Tokenizer
    ends: frozenset[int]
    eos: tuple[int, ...] = ()  # those of them that the model's generation config says

    @classmethod
    def of(cls, tokenizer: Tokenizer, eos: int | list[int] | None) -> "Voice":
        """`eos`: the end tokens of the model's generation config; the tokenizer's and the template's are added."""
        said = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        ends = {tokenizer.eos_token_id, *said}
        if tokenizer.chat_template is not None:
            # A template that refuses a plain exchange says nothing about its end.
            with suppress(TemplateError):
                ends.add(end_of_turn(tokenizer))
        return cls(tokenizer, frozenset(token for token in ends if token is not None), said)

    def of_run(self, run: Path, source: ModelSource, tokens: int) -> "Voice":
        """The voice of the adapter in run directory `run`, of this base: its own tokenizer's, where it has brought one.

        Raises UserError for one with more tokens than the base, which has `tokens`.
        """
        if not has_tokenizer(run):
            return self
        from transformers import AutoTokenizer  # heavy, and who has a base voice has it already

        tokenizer = load(AutoTokenizer, replace(source, path=str(run.absolute()), revision=None))
        if len(tokenizer) > tokens:
            raise UserError(f"run {run} does not fit the base: it has {len(tokenizer)} tokens, the base {tokens}")
        return Voice.of(tokenizer, list(self.eos))

    @cached_property
    def grammars(self) -> Grammars:
        """The constraints on answers in this voice; made when the first is asked for, which takes a while."""
        return Grammars(self.tokenizer, self.ends)

    @cached_property
    def takes_back(self) -> bool:
        """Whether a token may change the text before it: bytes that follow each other are read as a whole, and none of them
        is a character any more once one comes that fits nowhere.
        """
        decoder = _decoder(self.tokenizer)
        return decoder is None or "ByteFallback" in decoder

    @cached_property
    def spelling(self) -> Spelling:
        return Spelling(self.tokenizer)

    def read(self, request: GenerateRequest, vocabulary: int) -> list[int]:
        """The prompt as token ids below `vocabulary`. Raises RequestError for one that is empty or cannot be read."""
        field = prompt_field(request)
        ids = self._tokens(request)
        if not ids:
            raise RequestError(f"{field} is empty", field)
        if wrong := next((token for token in ids if not 0 <= token < vocabulary), None):
            raise RequestError(f"{field}: {wrong} is not a token of this model (0 to {vocabulary - 1})", field)
        return ids

    def echo(self, request: GenerateRequest, ids: list[int]) -> tuple[str, list[int]]:
        """The prompt, of token `ids`, as text, and where in it each token begins, in characters.

        Text is as it was sent, without the tokens that the tokenizer puts before it; those begin where the text does.
        """
        if isinstance(request.prompt, str):
            found = self.tokenizer(request.prompt, return_offsets_mapping=True)["offset_mapping"]
            return request.prompt, [start for start, _ in found]
        text, offsets = TextStream(self.tokenizer, special=True), []
        pieces = []
        for token in ids:
            offsets.append(text.length)
            pieces.append(text.push(token))
        return "".join([*pieces, text.end()]), offsets

    def _tokens(self, request: GenerateRequest) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        messages = [part for part in prompt if isinstance(part, Message)]
        if messages:
            # The template has written the special tokens already.
            text = self._conversation(messages, request.tools)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [part for part in prompt if isinstance(part, int)]

    def _conversation(self, messages: list[Message], tools: tuple[Mapping[str, Any], ...]) -> str:
        if self.tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: send plain text to /v1/completions", "messages")
        try:
            text = conversation_text(self.tokenizer, messages, ask=True, tools=tools)
            if tools and text == conversation_text(self.tokenizer, messages, ask=True):
                raise RequestError("the chat template of this model takes no tools", "tools")
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error
        return text


def prompt_field(request: GenerateRequest) -> str:
    """What the sender calls the prompt."""
    return "messages" if request.prompt and isinstance(request.prompt[0], Message) else "prompt"


class TextStream:
    """Tokens in, text out as soon as it is certain.

    The pieces, joined, are what the tokenizer makes of all tokens at once (special tokens left out, unless `special`;
    spaces as they are), up to the first stop string, or up to its end with `include_stop`. Held back: characters whose
    bytes have not all come, and what may begin a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, include_stop: bool = False, special: bool = False
    ) -> None:
        self.stopped: str | None = None  # the stop string that was met
        self.length = 0  # characters so far, held or given out
        self._tokenizer, self._stop, self._include_stop, self._special = tokenizer, stop, include_stop, special
        self._window: list[int] = []  # the latest tokens
        self._taken = 0  # characters of the window's text that have been taken out
        self._whole = 0  # tokens of the window at the end of which no character was cut
        self._held = ""  # taken, but it may begin a stop string

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """As `add` and `certain`."""
        self.add(token)
        return self.certain(may_stop=may_stop)

    def add(self, token: int) -> None:
        """`token` has come; its text is made later."""
        self._window.append(token)

    def certain(self, *, may_stop: bool = True) -> str:
        """The text that has become certain; `stopped` is set where a stop string was met.

        Text that comes while it may not stop is no part of a stop string.
        """
        text = self._decode()
        certain = text.rstrip(CUT)
        new, self._taken = certain[self._taken :], max(self._taken, len(certain))
        if len(certain) == len(text):
            self._slide()
        self.length += len(new)
        return self._release(new, may_stop)

    def end(self, *, may_stop: bool = True) -> str:
        """All that is left: nothing more will come."""
        rest = self._release(self._decode()[self._taken :], may_stop)
        rest, self._held = rest + self._held, ""
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._window, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
        )

    def _slide(self) -> None:
        """Drop old tokens from a window that has grown long, at a place between two characters."""
        if len(self._window) > WINDOW:
            full, self._window = self._window, self._window[self._whole :]
            text = self._decode()
            # A window must begin with text: decoders strip the space of the first word, and special tokens have none.
            if text and not text.endswith(CUT):
                self._taken = len(text)
            else:
                self._window = full
        self._whole = len(self._window)

    def _release(self, new: str, may_stop: bool) -> str:
        """Add `new` to what is held, and give out what cannot be part of a stop string."""
        text = self._held + new
        if self.stopped or not self._stop or not may_stop:
            self._held = ""
            return "" if self.stopped else text
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, self.stopped = min(found)
            self._held = ""
            return text[: place + len(self.stopped) if self._include_stop else place]
        keep = next(n for n in range(min(len(text), max(map(len, self._stop)) - 1), -1, -1) if self._may_begin(text, n))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_begin(self, text: str, count: int) -> bool:
        """Whether the last `count` characters of `text` are the beginning of a stop string."""
        return count == 0 or any(stop.startswith(text[-count:]) for stop in self._stop)
