"""One answer as it grows: from the tokens that an engine chooses to what its reader gets. No torch here."""

from dataclasses import dataclass

from plugins.engines.text import TextStream, Voice
from plugins.types import Delta, FinishReason, GenerateRequest, TokenLogprob

# Seconds between two messages of one answer: for a few answers, for each of many, and at most.
PAUSE, PAUSE_EACH, LONGEST_PAUSE = 0.04, 0.01, 0.2


def pause(answers: int) -> float:
    """Seconds between two messages of an answer that is made beside others, `answers` in all: each takes a core's time."""
    return min(LONGEST_PAUSE, max(PAUSE, PAUSE_EACH * answers))


@dataclass(frozen=True)
class Choice:
    """A token, and where it was asked for its log-probability, and the likeliest tokens with theirs, the best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Answer:
    """The answer to `request`, whose prompt is of token ids `prompt`, in a model's or adapter's `voice`.

    It has `limit` tokens at most; before `min_tokens`, no stop string ends it. `scores`: how likely each token of the
    prompt is, to be filled in before the first `accept` where the request asks for it; nothing predicts the first.
    """

    def __init__(
        self, request: GenerateRequest, *, prompt: list[int], limit: int, min_tokens: int, voice: Voice
    ) -> None:
        self.prompt = prompt
        self.tokens = list(prompt)  # and the answer so far
        self.scores_prompt = request.prompt_logprobs is not None
        self.scores: list[Choice | None] = [None] * len(prompt)
        self.ends: frozenset[int] = frozenset() if request.ignore_eos else voice.ends
        self.stops = frozenset(request.stop_token_ids)
        self.limit, self.min_tokens = limit, min_tokens
        self.finished = False
        self._count = 0
        self._reason: FinishReason | None = None
        self._stop: str | int | None = None  # what the request named, and the answer ended with
        self._include_stop = request.include_stop
        self._text = TextStream(voice.tokenizer, request.stop, include_stop=request.include_stop)
        # Text is made where it is sent, of several tokens at once, unless it may end the answer, is counted by the token, or
        # would then be another.
        self._by_token = bool(request.stop) or request.logprobs is not None or voice.takes_back
        self._voice = voice
        self._echo, self._offsets = voice.echo(request, prompt) if request.echo else ("", [0] * len(prompt))
        self._said = False  # whether there has been a Delta
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is still to come
        self._unsent: tuple[str, list[TokenLogprob]] = "", []

    @property
    def is_urgent(self) -> bool:
        """Whether what there is to say should not wait: it is the beginning of the answer, or its end."""
        return self.finished or not self._said

    def news(self) -> Delta | None:
        """What there is to say since the last time, if anything."""
        if not (self._by_token or self.finished):
            self._say(self._text.certain())
        (text, logprobs), self._unsent = self._unsent, ("", [])
        if not (text or self.finished):
            return None
        first, self._said = not self._said, True
        return Delta(
            self._echo + text if first else text,
            len(self.prompt),
            self._count,
            self._reason,
            self._stop,
            tuple(logprobs),
            self._prompt_logprobs() if first and self.scores_prompt else (),
        )

    def accept(self, choice: Choice, *, complete: bool = False) -> None:
        """The answer grows by a token. With a limit of 0 it does not grow, and ends.

        `complete`: nothing may follow, as a grammar says.
        """
        if self.limit == 0:
            self._end("length")
            return
        token = choice.token
        self.tokens.append(token)
        self._count += 1
        if choice.logprob is not None:
            self._logprobs.append(self._scored(choice, len(self._echo) + self._text.length))
        may_stop = self._count > self.min_tokens
        is_end = token in self.ends or token in self.stops
        if not is_end or self._include_stop:
            self._text.add(token)
            if self._by_token:
                self._say(self._text.certain(may_stop=may_stop))
        if is_end:
            self._end("stop", token if token in self.stops else None, may_stop=may_stop)
        elif self._text.stopped is not None:
            self._end("stop", self._text.stopped)
        elif complete or self._count == self.limit:
            self._end("stop" if complete else "length", may_stop=may_stop)

    def _end(self, reason: FinishReason, stop: str | int | None = None, *, may_stop: bool = True) -> None:
        self.finished, self._reason, self._stop = True, reason, stop
        self._say(self._text.end(may_stop=may_stop))

    def _say(self, text: str) -> None:
        """Have `text` sent, with the log-probabilities that have waited for a text, or for the end."""
        if text or self.finished:
            said, logprobs = self._unsent
            self._unsent, self._logprobs = (said + text, logprobs + self._logprobs), []

    def _prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        first = self._scored(Choice(self.prompt[0]), self._offsets[0])
        assert None not in self.scores[1:], "the prompt has not been scored"
        rest = zip(self.scores[1:], self._offsets[1:], strict=True)
        return first, *(self._scored(choice, offset) for choice, offset in rest if choice is not None)

    def _scored(self, choice: Choice, offset: int) -> TokenLogprob:
        spell = self._voice.spelling
        top = tuple(TokenLogprob(token, spell(token), logprob) for token, logprob in choice.top)
        return TokenLogprob(choice.token, spell(choice.token), choice.logprob, top, offset)
