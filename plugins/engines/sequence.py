"""One request under way: its tokens so far, how the next is chosen, what text there is, and who waits for it."""

import asyncio

from plugins.engines.sampling import Choice, Sampler
from plugins.engines.text import TextStream, Voice
from plugins.types import Delta, FinishReason, GenerateRequest


class Sequence:
    """One request under way. The worker thread owns it; the event loop only sets `abandoned`, and reads the mailbox.

    `adapter` is the decoder's key; `limit` is in tokens of answer.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        prompt: list[int],
        limit: int,
        adapter: str,
        voice: Voice,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.prompt, self.adapter = prompt, adapter
        self.tokens = list(prompt)  # and the answer so far
        self.sampler = Sampler(request)
        self.mailbox = Mailbox(loop)
        self.scores_prompt = False
        self.abandoned = False  # nobody waits for it any more
        self._limit, self._count = limit, 0
        self._ends = voice.ends
        self._text = TextStream(voice.tokenizer, request.stop)

    @property
    def token(self) -> int:
        """The latest of the answer."""
        return self.tokens[-1]

    def accept(self, choice: Choice) -> Delta:
        """The answer grows by a token: what there is to say now."""
        token = choice.token
        self.tokens.append(token)
        self._count += 1
        reason: FinishReason | None = None
        if token in self._ends:
            text, reason = self._text.end(), "stop"
        else:
            text = self._text.push(token)
            if self._text.stopped:
                reason = "stop"
            elif self._count == self._limit:
                text, reason = text + self._text.end(), "length"
        return Delta(text, len(self.prompt), self._count, reason)


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
        last = deltas[-1]
        return Delta("".join(d.text for d in deltas), last.prompt_tokens, last.completion_tokens, last.finish_reason)
