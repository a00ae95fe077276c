"""One request under way in the batch: an answer, how its next token is chosen, and who waits for it."""

import asyncio
from contextlib import suppress

import torch

from plugins.engines.answer import Answer, Choice
from plugins.engines.sampling import Sampler, Sampling, score
from plugins.engines.text import Voice
from plugins.types import Delta, GenerateRequest, RequestError


class Sequence(Answer):
    """One request under way. The worker thread owns it; the event loop only sets `abandoned`, and reads the mailbox.

    `adapter` is the decoder's key; `limit` and `min_tokens` are in tokens of answer. `scores_prompt`: `score_prompt` has to
    be called for the whole prompt, in any pieces, before the first `take`.
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
        super().__init__(request, prompt=prompt, limit=limit, min_tokens=min_tokens, voice=voice)
        self.adapter = adapter
        self.mailbox = Mailbox(loop)
        self.abandoned = False  # nobody waits for it any more
        self.sampler = Sampler(
            sampling,
            prompt=prompt,
            grammar=voice.grammars.matcher(request.constraint) if request.constraint is not None else None,
            forbidden=self.ends | self.stops,
            min_tokens=min_tokens,
        )
        self._scores_wanted = request.prompt_logprobs or 0

    def score_prompt(self, start: int, logits: torch.Tensor) -> None:
        """Note how likely the prompt is. Row i of `logits` [n, vocab] comes after its token `start` + i.

        A piece may come again, with the same result; the row after the last token scores nothing.
        """
        tokens = self.prompt[start + 1 : start + 1 + len(logits)]
        found = score(logits[: len(tokens)], tokens, [self._scores_wanted] * len(tokens))
        self.scores[start + 1 : start + 1 + len(found)] = found

    def take(self, choice: Choice) -> None:
        """The answer goes on with what the sampler chose."""
        if self.limit:
            try:
                self.sampler.take(choice.token)
            except RequestError as error:
                self._fail(error)
                return
        self.accept(choice, complete=self.sampler.complete)

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
