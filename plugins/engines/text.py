"""The text side of an engine: a prompt becomes tokens, tokens become an answer that can be streamed.

No torch here: any engine that counts in tokens may use it.
"""

from contextlib import suppress
from dataclasses import dataclass

from jinja2 import TemplateError

from plugins.template import Tokenizer, conversation_text, end_of_turn
from plugins.types import GenerateRequest, Message, RequestError

CUT = "\ufffd"  # what a decoder puts where the bytes of a character are not all there
WINDOW = 16  # tokens decoded again for each new one: enough for the context that a decoder wants


@dataclass(frozen=True)
class Voice:
    """How a model, or an adapter of it, is spoken to: its tokenizer with the chat template, and what ends an answer."""

    tokenizer: Tokenizer
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, eos: int | list[int] | None) -> "Voice":
        """`eos`: the end tokens of the model's generation config; the tokenizer's and the template's are added."""
        ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        if tokenizer.chat_template is not None:
            # A template that refuses a plain exchange says nothing about its end.
            with suppress(TemplateError):
                ends.add(end_of_turn(tokenizer))
        return cls(tokenizer, frozenset(token for token in ends if token is not None))

    def read(self, request: GenerateRequest, vocabulary: int) -> list[int]:
        """The prompt as token ids below `vocabulary`. Raises RequestError for one that is empty or cannot be read."""
        field = prompt_field(request)
        ids = self._tokens(request.prompt)
        if not ids:
            raise RequestError(f"{field} is empty", field)
        if wrong := next((token for token in ids if not 0 <= token < vocabulary), None):
            raise RequestError(f"{field}: {wrong} is not a token of this model (0 to {vocabulary - 1})", field)
        return ids

    def _tokens(self, prompt: str | tuple[int, ...] | tuple[Message, ...]) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        messages = [part for part in prompt if isinstance(part, Message)]
        if messages:
            # The template has written the special tokens already.
            return list(self.tokenizer(self._conversation(messages), add_special_tokens=False)["input_ids"])
        return [part for part in prompt if isinstance(part, int)]

    def _conversation(self, messages: list[Message]) -> str:
        if self.tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: send plain text to /v1/completions", "messages")
        try:
            return conversation_text(self.tokenizer, messages, ask=True)
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error


def prompt_field(request: GenerateRequest) -> str:
    """What the sender calls the prompt."""
    return "messages" if request.prompt and isinstance(request.prompt[0], Message) else "prompt"


class TextStream:
    """Tokens in, text out as soon as it is certain.

    The pieces, joined, are what the tokenizer makes of all tokens at once (special tokens left out, spaces as they
    are), up to the first stop string. Held back: characters whose bytes have not all come, and what may begin a stop
    string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._window: list[int] = []  # the latest tokens
        self._taken = 0  # characters of the window's text that have been taken out
        self._whole = 0  # tokens of the window at the end of which no character was cut
        self._held = ""  # taken, but it may begin a stop string

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; `stopped` is set where a stop string was met."""
        self._window.append(token)
        text = self._decode()
        certain = text.rstrip(CUT)
        new, self._taken = certain[self._taken :], max(self._taken, len(certain))
        if len(certain) == len(text):
            self._slide()
        return self._release(new)

    def end(self) -> str:
        """All that is left: nothing more will come."""
        rest = self._release(self._decode()[self._taken :])
        rest, self._held = rest + self._held, ""
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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

    def _release(self, new: str) -> str:
        """Add `new` to what is held, and give out what cannot be part of a stop string."""
        text = self._held + new
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = next(n for n in range(min(len(text), max(map(len, self._stop)) - 1), -1, -1) if self._may_begin(text, n))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_begin(self, text: str, count: int) -> bool:
        """Whether the last `count` characters of `text` are the beginning of a stop string."""
        return count == 0 or any(stop.startswith(text[-count:]) for stop in self._stop)
