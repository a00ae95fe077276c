"""One request under way: its tokens so far, how the next is chosen, what text there is, and who waits for it."""

import asyncio
from contextlib import suppress

import torch

from plugins.engines.sampling import Choice, Sampler, Sampling, score
from plugins.engines.text import TextStream, Voice
from plugins.types import Delta, FinishReason, GenerateRequest, RequestError, TokenLogprob


class Sequence:
    """One request under way. The worker thread owns it; the event loop only sets `abandoned`, and reads the mailbox.

    `adapter` is the decoder's key; `limit` and `min_tokens` are in tokens of answer. `scores_prompt`: `score_prompt` has to
    be called for the whole prompt, in any pieces, before the first `accept`.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        prompt: list[int],
        sampling: Sampling,
        limit: int,
        min_tokens: int,
        adapter: str,
        voice: Voice,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Raises RequestError for a constraint that cannot be held."""
        self.prompt, self.adapter = prompt, adapter
        self.tokens = list(prompt)  # and the answer so far
        self.mailbox = Mailbox(loop)
        self.abandoned = False  # nobody waits for it any more
        self.scores_prompt = request.prompt_logprobs is not None
        self._ends: frozenset[int] = frozenset() if request.ignore_eos else voice.ends
        self._stops = frozenset(request.stop_token_ids)
        self.sampler = Sampler(
            sampling,
            prompt=prompt,
            grammar=voice.grammars.matcher(request.constraint) if request.constraint is not None else None,
            forbidden=self._ends | self._stops,
            min_tokens=min_tokens,
        )
        self._limit, self._min_tokens, self._count = limit, min_tokens, 0
        self._include_stop = request.include_stop
        self._text = TextStream(voice.tokenizer, request.stop, include_stop=request.include_stop)
        self._voice = voice
        self._scores_wanted = request.prompt_logprobs or 0
        self._scores: list[Choice | None] = [None] * len(prompt)  # nothing predicts the first token
        self._echo, self._offsets = voice.echo(request, prompt) if request.echo else ("", [0] * len(prompt))
        self._said = False  # whether there has been a Delta with text
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is still to come
        self._unsent: list[Delta] = []
        self._sent = False  # whether anything has been
        self.finished = False

    def score_prompt(self, start: int, logits: torch.Tensor) -> None:
        """Note how likely the prompt is. Row i of `logits` [n, vocab] comes after its token `start` + i.

        A piece may come again, with the same result; the row after the last token scores nothing.
        """
        tokens = self.prompt[start + 1 : start + 1 + len(logits)]
        found = score(logits[: len(tokens)], tokens, [self._scores_wanted] * len(tokens))
        self._scores[start + 1 : start + 1 + len(found)] = found

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

    def accept(self, choice: Choice) -> None:
        """The answer grows by a token. With a limit of 0 it does not grow, and ends."""
        delta = self._grow(choice)
        self.finished = delta.finish_reason is not None
        if delta.text or self.finished:
            self._unsent.append(delta)

    def _grow(self, choice: Choice) -> Delta:
        if self._limit == 0:
            return self._delta("", "length")
        token = choice.token
        self.tokens.append(token)
        self._count += 1
        if choice.logprob is not None:
            self._logprobs.append(self._scored(choice, len(self._echo) + self._text.length))
        try:
            self.sampler.take(token)
        except RequestError as error:
            self._fail(error)
            return self._delta("", None)
        may_stop = self._count > self._min_tokens
        reason: FinishReason | None = None
        stop: str | int | None = None
        if token in self._ends or token in self._stops:
            shown = self._text.push(token, may_stop=may_stop) if self._include_stop else ""
            text, reason = shown + self._text.end(may_stop=may_stop), "stop"
            stop = token if token in self._stops else None
        else:
            text = self._text.push(token, may_stop=may_stop)
            stop = self._text.stopped
            if stop is not None:
                reason = "stop"
            elif self.sampler.complete or self._count == self._limit:
                reason = "stop" if self.sampler.complete else "length"
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
        assert None not in self._scores[1:], "the prompt has not been scored"
        rest = zip(self._scores[1:], self._offsets[1:], strict=True)
        return first, *(self._scored(choice, offset) for choice, offset in rest if choice is not None)

    def _scored(self, choice: Choice, offset: int) -> TokenLogprob:
        spell = self._voice.spelling
        top = tuple(TokenLogprob(token, spell(token), logprob) for token, logprob in choice.top)
        return TokenLogprob(choice.token, spell(choice.token), choice.logprob, top, offset)

    def _fail(self, error: Exception) -> None:
        """End this request alone: who waits gets the error, and the batch lets go of it at its next step."""
        self.abandoned = True
        with suppress(RuntimeError):  # the event loop is closed, and nobody waits
            self.mailbox.loop.call_soon_threadsafe(self.mailbox.put, error)


class Mailbox:
    """What the worker thread has said to one consumer; touched on the consumer's event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, news: Delta | Exception) -> None:
        if isinstance(news, Delta):
            self._deltas.append(news)
        else:
            self._error = news
        self._filled.set()

    async def take(self) -> Delta:
        """All that has come since the last time, as one Delta: a slow consumer gets longer pieces, never a backlog."""
        await self._filled.wait()
        self._filled.clear()
        if self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, []
        return Delta.joined(deltas)
