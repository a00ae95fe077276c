"""An engine of your own: transformers' generate, greedy, a request at a time. `plugins/engines` has the whole contract."""

import asyncio
from dataclasses import dataclass

from plugins.template import conversation_text
from plugins.types import Delta
from serve import ModelSource, ServeConfig, ServedModel


class OneAtATime:
    """transformers' own generate, greedy, a request at a time, no adapters."""

    def __init__(self, source):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(source.path)
        self.model = AutoModelForCausalLM.from_pretrained(source.path)
        self.turn = asyncio.Lock()

    async def generate(self, request):
        text = (
            request.prompt
            if isinstance(request.prompt, str)
            else conversation_text(self.tokenizer, request.prompt, ask=True)
        )
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        async with self.turn:  # in a thread: the event loop of the replica never blocks
            ids = await asyncio.to_thread(
                self.model.generate, **inputs, do_sample=False, max_new_tokens=request.max_tokens or 64
            )
        prompt, answer = inputs["input_ids"].shape[1], ids[0, inputs["input_ids"].shape[1] :]
        yield Delta(self.tokenizer.decode(answer, skip_special_tokens=True), prompt, len(answer), "stop")

    async def load_adapter(self, name, run):
        raise NotImplementedError

    async def unload_adapter(self, name):
        raise NotImplementedError

    async def close(self): ...
    def check(self): ...  # raise when it can no longer serve: the replica is then replaced


@dataclass(frozen=True)
class Plain:
    def start(self, source, cpus, gpus):
        return OneAtATime(source)


config = ServeConfig(models=(ServedModel(id="plain", source=ModelSource("scripts/demo_base/model"), engine=Plain()),))
