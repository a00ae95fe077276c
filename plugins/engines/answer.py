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
        self._include_stop = request.include_stop
        self._text = TextStream(voice.tokenizer, request.stop, include_stop=request.include_stop)
        self._voice = voice
        self._echo, self._offsets = voice.echo(request, prompt) if request.echo else ("", [0] * len(prompt))
        self._said = False  # whether there has been a Delta with text
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is still to come
        self._unsent: list[Delta] = []
        self._sent = False  # whether anything has been

    @property
    def is_urgent(self) -> bool:
        """Whether what there is to say should not wait: it is the beginning of the answer, or its end."""
        return self.finished or not self._sent

    def news(self) -> Delta | None:
        """What there is to say since the last time, if anything."""
        if not self._unsent:
            return None
        deltas, self._unsent, self._sent = self._unsent, [], True
        return Delta.joined(deltas)

    def accept(self, choice: Choice, *, complete: bool = False) -> None:
        """The answer grows by a token. With a limit of 0 it does not grow, and ends.

        `complete`: nothing may follow, as a grammar says.
        """
        delta = self._grow(choice, complete)
        self.finished = delta.finish_reason is not None
        if delta.text or self.finished:
            self._unsent.append(delta)

    def _grow(self, choice: Choice, complete: bool) -> Delta:
        if self.limit == 0:
            return self._delta("", "length")
        token = choice.token
        self.tokens.append(token)
        self._count += 1
        if choice.logprob is not None:
            self._logprobs.append(self._scored(choice, len(self._echo) + self._text.length))
        may_stop = self._count > self.min_tokens
        reason: FinishReason | None = None
        stop: str | int | None = None
        if token in self.ends or token in self.stops:
            shown = self._text.push(token, may_stop=may_stop) if self._include_stop else ""
            text, reason = shown + self._text.end(may_stop=may_stop), "stop"
            stop = token if token in self.stops else None
        else:
            text = self._text.push(token, may_stop=may_stop)
            stop = self._text.stopped
            if stop is not None:
                reason = "stop"
            elif complete or self._count == self.limit:
                reason = "stop" if complete else "length"
                text += self._text.end(may_stop=may_stop)
        return self._delta(text, reason, stop)

    def _delta(self, text: str, reason: FinishReason | None, stop: str | int | None = None) -> Delta:
        """What is to be said, with all that has waited for it. Without text and reason, all goes on waiting."""
        if not text and reason is None:
            return Delta("", len(self.prompt), self._count)
        logprobs, self._logprobs = tuple(self._logprobs), []
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if self.scores_prompt and not self._said:
            prompt_logprobs = self._prompt_logprobs()
        text, self._said = text if self._said else self._echo + text, True
        return Delta(text, len(self.prompt), self._count, reason, stop, logprobs, prompt_logprobs)

    def _prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        first = self._scored(Choice(self.prompt[0]), self._offsets[0])
        assert None not in self.scores[1:], "the prompt has not been scored"
        rest = zip(self.scores[1:], self._offsets[1:], strict=True)
        return first, *(self._scored(choice, offset) for choice, offset in rest if choice is not None)

    def _scored(self, choice: Choice, offset: int) -> TokenLogprob:
        spell = self._voice.spelling
        top = tuple(TokenLogprob(token, spell(token), logprob) for token, logprob in choice.top)
        return TokenLogprob(choice.token, spell(choice.token), choice.logprob, top, offset)
