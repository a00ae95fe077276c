"""The torch engine as its users see it, compared with transformers' own generate on small random models (fp32)."""

import asyncio
import dataclasses
import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import small_models
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from plugins import hardware
from plugins.engines import Torch, batching, layers, native, runner, scheduler
from plugins.engines.answer import Answer, Choice
from plugins.engines.attention import Step, TorchAttention
from plugins.engines.cache import Cache
from plugins.engines.compiled import Compiled
from plugins.engines.text import TextStream, Voice
from plugins.engines.torch import TorchEngine
from plugins.spec import UserError
from plugins.types import Delta, GenerateRequest, Message, ModelSource, RequestError

PROMPTS = (
    "the quick brown fox",
    "a",
    "hello world one two three four five six seven eight nine ten",
    "東京 and 🙂",
    "naïve café",
    "the weather, the sea and the mountains answers a question about the small house",
)
ENDS = [0, 2]  # <|endoftext|> and <|im_end|>, which ends a turn in the template


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def runs(base: Path) -> list[Path]:
    """Two adapters; the second has a template of its own, which ends a turn with <|endoftext|>."""
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    return [
        small_models.save_lora_run(base.parent / "first-1.5", base, seed=1),
        small_models.save_lora_run(base.parent / "second", base, seed=2, rank=8, chat_template=plain),
    ]


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[TorchEngine]:
    made = start(base, max_batch=4)
    yield made
    asyncio.run(made.close())


def start(model: Path, **options: Any) -> TorchEngine:
    spec = Torch(**({"max_batch": 4, "kv_memory": "16MiB"} | options))
    return TorchEngine(ModelSource(str(model), dtype="fp32"), spec, cpus=1)


def request(prompt: Any, **changes: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **({"temperature": 0.0, "max_tokens": 24} | changes))


async def answer(engine: TorchEngine, prompt: Any, **changes: Any) -> Delta:
    """The whole answer as one Delta."""
    deltas = [delta async for delta in engine.generate(request(prompt, **changes))]
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    return dataclasses.replace(deltas[-1], text="".join(delta.text for delta in deltas))


def run(engine: TorchEngine, *parts: Callable[[], Awaitable[Any]]) -> list[Any]:
    async def together() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*(part() for part in parts)), 60)

    return asyncio.run(together())


def no_changes(engine: TorchEngine) -> bool:
    """Whether the base is as it was before any adapter."""
    return not any(layer.changes for layer, _ in engine._batcher._runner.adapters._layers.values())


def ask(engine: TorchEngine, prompt: Any, **changes: Any) -> Delta:
    return asyncio.run(asyncio.wait_for(answer(engine, prompt, **changes), 60))


def generated(model: Path, prompt: str, adapter: Path | None = None, max_tokens: int = 24) -> str:
    """What transformers' generate answers, with PEFT where there is an adapter."""
    net: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        import peft

        net = peft.PeftModel.from_pretrained(net, str(adapter / "adapter")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False, "max_new_tokens": max_tokens, "eos_token_id": ENDS, "pad_token_id": 0}
    ids = net.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# The answers are right


def test_answers_are_those_of_transformers_whoever_shares_the_batch(base: Path, engine: TorchEngine) -> None:
    wanted = [generated(base, prompt) for prompt in PROMPTS]
    together = run(engine, *(lambda p=prompt: answer(engine, p) for prompt in PROMPTS))
    assert [delta.text for delta in together] == wanted
    assert [ask(engine, prompt).text for prompt in PROMPTS] == wanted
    assert len(set(wanted)) == len(PROMPTS)


def test_requests_join_and_leave_at_any_step(base: Path, engine: TorchEngine) -> None:
    joining = {3: (PROMPTS[0], 30), 5: (PROMPTS[1], 4), 6: (PROMPTS[2], 12), 20: (PROMPTS[3], 20)}

    async def main() -> None:
        text, asked = "", []
        async for delta in engine.generate(request("one two", max_tokens=60)):
            text += delta.text
            for due in [count for count in joining if count <= delta.completion_tokens]:
                prompt, length = joining.pop(due)
                asked.append((prompt, length, asyncio.ensure_future(answer(engine, prompt, max_tokens=length))))
        assert len(asked) == 4
        wanted = [generated(base, "one two", max_tokens=60)]
        wanted += [generated(base, prompt, max_tokens=length) for prompt, length, _ in asked]
        assert [text, *[(await task).text for _, _, task in asked]] == wanted

    asyncio.run(main())


def test_an_answer_grows_to_the_length_of_the_model(base: Path) -> None:
    engine = start(base, max_length=200)
    try:
        short, full = run(
            engine,
            lambda: answer(engine, "hello", max_tokens=3, seed=1),
            lambda: answer(engine, "the quick", max_tokens=None, temperature=1.0, seed=7),
        )
        assert (short.completion_tokens, short.finish_reason) == (3, "length")
        assert full.finish_reason == "stop" or full.prompt_tokens + full.completion_tokens == 200
    finally:
        asyncio.run(engine.close())


def test_a_long_prompt_is_read_in_pieces_and_others_go_on(
    base: Path, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler.Scheduler, "_chunk", lambda self, decoding: 16)
    long = " ".join(PROMPTS)
    texts = run(engine, *(lambda p=prompt: answer(engine, p) for prompt in (long, *PROMPTS[:4])))
    assert [delta.text for delta in texts] == [generated(base, prompt) for prompt in (long, *PROMPTS[:4])]


def architecture(name: str) -> Any:
    small: dict[str, Any] = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    small |= {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    sliding = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "qwen2, tied": lambda: transformers.Qwen2Config(**small, tie_word_embeddings=True),
        "gpt2, learned positions": lambda: transformers.GPT2Config(
            vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, eos_token_id=0
        ),
        "mistral, window": lambda: transformers.MistralConfig(**small, sliding_window=8),
        "qwen3, some layers with a window": lambda: transformers.Qwen3Config(
            **small, use_sliding_window=True, max_window_layers=1, **sliding
        ),
        "gemma2, window and soft cap": lambda: transformers.Gemma2Config(**small, query_pre_attn_scalar=8, **sliding),
        "mixtral, experts": lambda: transformers.MixtralConfig(**small, num_local_experts=4, sliding_window=None),
        "opt, positions with an offset": lambda: transformers.OPTConfig(
            vocab_size=384,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            init_std=0.3,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        ),
        "phi, part of the head turned": lambda: transformers.PhiConfig(**small, partial_rotary_factor=0.5),
        "gemma3, norms of its own": lambda: transformers.Gemma3TextConfig(**small, query_pre_attn_scalar=8, **sliding),
        "bloom": lambda: transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: transformers.MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=4),
    }[name]()


ARCHITECTURES = [
    "qwen2, tied",
    "gpt2, learned positions",
    "mistral, window",
    "qwen3, some layers with a window",
    "gemma2, window and soft cap",
    "mixtral, experts",
    "opt, positions with an offset",
    "phi, part of the head turned",
    "gemma3, norms of its own",
]


@pytest.mark.parametrize("kernels", ["native", pytest.param("torch's", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(tmp_path: Path, name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels != "native":
        monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(
        scheduler.Scheduler, "_chunk", lambda self, decoding: 12
    )  # the longest of the prompts comes in several pieces
    model = small_models.save_model(tmp_path / "model", architecture(name))
    engine = start(model)
    try:
        texts = run(engine, *(lambda p=prompt: answer(engine, p) for prompt in PROMPTS[1:5]))
        assert [delta.text for delta in texts] == [generated(model, prompt) for prompt in PROMPTS[1:5]]
    finally:
        asyncio.run(engine.close())


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3, some layers with a window"])
def test_an_answer_is_the_same_to_the_bit_in_any_company_and_any_pieces(
    base: Path, tmp_path: Path, name: str, dtype: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities too: alone, in a batch, with its beginning cached, its prompt read in pieces, beside an adapter.

    Not the last in bf16: layers that some adapter changes round what they add once more.
    """
    if dtype == "bf16" and hardware.has_bf16(torch.device("cpu")) and not native_operators().has_tiles:
        pytest.skip("oneDNN multiplies bf16 on this CPU, in an order that depends on the company")
    model = base if name == "llama" else small_models.save_model(tmp_path / "model", architecture(name))
    spec = Torch(max_batch=4, kv_memory="16MiB")
    engine = TorchEngine(ModelSource(str(model), dtype=dtype), spec, cpus=1)

    async def whole(prompt: str, **changes: Any) -> Delta:
        return Delta.joined([delta async for delta in engine.generate(request(prompt, logprobs=3, **changes))])

    long = " ".join(PROMPTS)[:120]
    asked = [lambda p=p: whole(p, prompt_logprobs=2) for p in (long, *PROMPTS[:3])]
    try:
        alone = [run(engine, one)[0] for one in asked]
        assert all(len(delta.logprobs) == 24 for delta in alone)
        for chunk in (1, 5, 64):
            monkeypatch.setattr(scheduler.Scheduler, "_chunk", lambda self, decoding, chunk=chunk: chunk)
            together = run(engine, *asked, *(lambda p=p: whole(p, temperature=1.0) for p in PROMPTS))
            assert together[: len(asked)] == alone
        hits = engine._batcher._scheduler.cache.hits
        assert run(engine, lambda: whole(long))[0].logprobs == alone[0].logprobs
        assert engine._batcher._scheduler.cache.hits > hits
        if dtype == "bf16":
            return
        asyncio.run(engine.load_adapter("other", small_models.save_lora_run(tmp_path / "other", model)))
        beside = [lambda p=p: whole(p, adapter="other") for p in PROMPTS[:2]]
        assert run(engine, asked[0], *beside, asked[1])[:: len(beside) + 1] == [alone[0], alone[1]]
    finally:
        asyncio.run(engine.close())


def native_operators() -> native.Native:
    made = native.load()
    assert made is not None
    return made


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_an_architecture_that_a_batch_would_get_wrong_is_refused(tmp_path: Path, name: str) -> None:
    model = small_models.save_model(tmp_path / "model", architecture(name))
    with pytest.raises(UserError, match="the torch engine cannot serve"):
        start(model)


# Streaming, waiting, leaving


def test_text_comes_as_it_is_made(engine: TorchEngine) -> None:
    async def main() -> list[Delta]:
        return [delta async for delta in engine.generate(request("the quick brown fox", max_tokens=200))]

    deltas = asyncio.run(main())
    counts = [delta.completion_tokens for delta in deltas]
    assert counts == sorted(counts)
    assert len(deltas) > 2
    assert counts[0] < 50  # at once, not with the next ones
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert {delta.prompt_tokens for delta in deltas} == {
        len(small_models.tokenizer()("the quick brown fox")["input_ids"])
    }


def test_a_slow_consumer_gets_longer_pieces(engine: TorchEngine) -> None:
    async def main() -> list[Delta]:
        deltas = []
        async for delta in engine.generate(request("the quick brown fox", max_tokens=40)):
            deltas.append(delta)
            if len(deltas) == 1:
                await answer(engine, "hello world", max_tokens=60)  # takes longer than the rest of this one
        return deltas

    deltas = asyncio.run(main())
    assert len(deltas) == 2
    assert "".join(delta.text for delta in deltas) == ask(engine, "the quick brown fox", max_tokens=40).text


def test_more_requests_than_rows_wait_their_turn(base: Path) -> None:
    engine = start(base, max_batch=2)
    finished: list[int] = []

    async def one(index: int) -> None:
        await answer(engine, PROMPTS[index], max_tokens=8, ignore_eos=True)  # each takes as long as the others
        finished.append(index)

    try:
        texts = run(engine, *(lambda p=p: answer(engine, p, max_tokens=8) for p in PROMPTS))
        assert [delta.text for delta in texts] == [generated(base, prompt, max_tokens=8) for prompt in PROMPTS]
        run(engine, *(lambda i=i: one(i) for i in range(6)))
        assert set(finished[:2]) == {0, 1}
        assert set(finished[4:]) == {4, 5}
    finally:
        asyncio.run(engine.close())


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_a_consumer_that_goes_away_frees_its_place(base: Path, how: str) -> None:
    engine = start(base, max_batch=1)

    async def main() -> tuple[Delta, list[Any]]:
        stream = engine.generate(request("the quick brown fox", max_tokens=None, temperature=1.5, seed=3))
        first = await anext(stream)
        if how == "aclose":
            await stream.aclose()
        else:
            task = asyncio.ensure_future(_drain(stream))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        waited = await asyncio.wait_for(answer(engine, "hello", max_tokens=2), 20)
        assert waited.completion_tokens == 2
        return first, engine._batcher._scheduler.sequences()

    try:
        first, under_way = asyncio.run(main())
        assert first.finish_reason is None
        assert under_way == []
    finally:
        asyncio.run(engine.close())


async def _drain(stream: AsyncIterator[Delta]) -> None:
    async for _ in stream:
        pass


def test_the_event_loop_goes_on_while_the_model_computes(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does not end until the event loop has done something: it would wait for ever if it blocked the loop."""
    ticked, step = threading.Event(), runner.Runner.run

    async def main() -> Delta:
        loop, stepping = asyncio.get_running_loop(), asyncio.Event()

        def slow(self: Any, pieces: Any) -> Any:
            loop.call_soon_threadsafe(stepping.set)
            assert ticked.wait(20)
            return step(self, pieces)

        monkeypatch.setattr(runner.Runner, "run", slow)
        running = asyncio.ensure_future(answer(engine, "hello", max_tokens=3))
        await stepping.wait()
        ticked.set()
        return await running

    assert asyncio.run(main()).completion_tokens == 3


# Choosing tokens


def test_the_same_seed_gives_the_same_text_alone_and_in_company(engine: TorchEngine) -> None:
    options = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 11}
    alone = ask(engine, PROMPTS[0], **options).text
    company = [lambda: answer(engine, PROMPTS[0], **options)]
    company += [lambda i=i: answer(engine, PROMPTS[i], temperature=0.3 * i, seed=i) for i in range(1, 5)]
    assert run(engine, *company)[0].text == alone
    assert ask(engine, PROMPTS[0], **(options | {"seed": 12})).text != alone


def test_without_a_seed_texts_differ(engine: TorchEngine) -> None:
    texts = run(engine, *(lambda: answer(engine, "hello", temperature=1.5) for _ in range(3)))
    assert len({delta.text for delta in texts}) > 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-7}, {"temperature": 0.001}])
def test_the_narrowest_choice_is_the_greedy_one(engine: TorchEngine, options: dict[str, Any]) -> None:
    assert ask(engine, PROMPTS[0], **({"temperature": 0.7} | options)).text == ask(engine, PROMPTS[0]).text


# Where an answer ends


def test_an_end_token_is_counted_and_not_shown(base: Path, tmp_path: Path) -> None:
    whole = ask_once(base, "the quick brown fox", max_tokens=12)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    changed = shutil.copytree(base, tmp_path / "changed")
    third = _greedy_ids(base, "the quick brown fox", 3)[2]
    transformers.GenerationConfig(eos_token_id=[third, 383]).save_pretrained(changed)
    ended = ask_once(changed, "the quick brown fox", max_tokens=12)
    assert (ended.finish_reason, ended.completion_tokens) == ("stop", 3)
    assert whole.text.startswith(ended.text)
    assert ended.text == tokenizer.decode(_greedy_ids(base, "the quick brown fox", 2))


def _greedy_ids(model: Path, prompt: str, count: int) -> list[int]:
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    inputs = transformers.AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt", return_token_type_ids=False)
    out = net.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def ask_once(model: Path, prompt: Any, **changes: Any) -> Delta:
    engine = start(model)
    try:
        return ask(engine, prompt, **changes)
    finally:
        asyncio.run(engine.close())


def test_a_turn_ends_where_the_template_ends_it(engine: TorchEngine) -> None:
    assert set(ENDS) <= engine._base.voice.ends


def test_stop_strings_cut_the_text_and_are_never_seen(engine: TorchEngine) -> None:
    whole = ask(engine, PROMPTS[0], max_tokens=30).text
    for start_, length in ((5, 1), (9, 4), (12, 7)):
        stop = whole[start_ : start_ + length]

        async def main(stop: str = stop) -> list[Delta]:
            return [d async for d in engine.generate(request(PROMPTS[0], max_tokens=30, stop=("never", stop)))]

        deltas = asyncio.run(main())
        assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
        assert deltas[-1].finish_reason == "stop"
        assert deltas[-1].completion_tokens <= 30


def test_a_stop_string_that_does_not_come_changes_nothing(engine: TorchEngine) -> None:
    whole = ask(engine, PROMPTS[0], max_tokens=30)
    assert ask(engine, PROMPTS[0], max_tokens=30, stop=(whole.text[-2:] + "zzz", "yyyy")) == whole


# Tokens to text


def byte_fallback_tokenizer() -> Any:
    """Like Llama 2's: a word begins with ▁, bytes stand for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "s", "!"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.end()]


def test_pieces_of_byte_level_text_join_to_the_whole() -> None:
    tokenizer = small_models.tokenizer()
    text = "hello 東京🙂👨‍👩‍👧 naïve the quick brown fox\n\n  café " * 5
    ids = tokenizer(text)["input_ids"]
    got = pieces(tokenizer, [1, *ids, 2])
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)
    assert got[1]  # from the first token on


def test_pieces_of_any_tokens_join_to_what_the_tokenizer_makes_of_them_all() -> None:
    tokenizer = small_models.tokenizer()
    for seed in range(20):
        ids = torch.randint(0, 384, (80,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_fallback_tokenizer, small_models.tokenizer, transformers.ByT5Tokenizer])
def test_the_text_does_not_depend_on_how_often_it_is_sent(make: Callable[[], Any]) -> None:
    tokenizer = make()
    vocabulary = tokenizer.get_vocab()
    cut = [vocabulary[f"<0x{byte:02X}>"] for byte in "🙂🙂東東".encode()[:-1] if "<0x00>" in vocabulary]
    random = torch.Generator().manual_seed(0)
    mixed = [torch.randint(3, 260, (40,), generator=random).tolist() for _ in range(20)]
    for ids in [*mixed, [5, *cut]]:
        texts = set()
        for often in (1, 2, 5, len(ids)):
            request = GenerateRequest(prompt="hello")
            grown = Answer(request, prompt=[1], limit=len(ids), min_tokens=0, voice=Voice(tokenizer, frozenset()))
            text = ""
            for count, token in enumerate(ids, start=1):
                grown.accept(Choice(token))
                if count % often == 0 or grown.finished:
                    text += news.text if (news := grown.news()) else ""
            texts.add(text)
        assert len(texts) == 1


def test_pieces_of_sentencepiece_text_keep_their_spaces() -> None:
    tokenizer = byte_fallback_tokenizer()
    token = tokenizer.get_vocab()
    euro = [token[f"<0x{byte:02X}>"] for byte in "€🙂東".encode()]
    ids = [
        token["▁"],
        *[token["▁hello"], token["▁world"], token["s"], token["!"], *euro, token["▁"]] * 8,
        token["</s>"],
    ]
    got = pieces(tokenizer, [token["<s>"], *ids])
    assert "".join(got) == tokenizer.decode(ids, skip_special_tokens=True) == (" hello worlds!€🙂東 " * 8)
    assert not any("\ufffd" in piece for piece in got)


def test_text_is_not_decoded_again_from_its_beginning() -> None:
    class Counting:
        def __init__(self) -> None:
            self.real, self.tokens = small_models.tokenizer(), 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.tokens += len(ids)
            return self.real.decode(ids, **options)

    counting = Counting()
    ids = counting.real("the quick brown fox 東京 " * 100)["input_ids"]
    pieces(counting, ids)
    assert counting.tokens < 20 * len(ids)


def test_a_stop_string_is_found_across_pieces() -> None:
    tokenizer = small_models.tokenizer()
    ids = tokenizer("one two ###END three")["input_ids"]
    assert "".join(pieces(tokenizer, ids, ("###END",))) == "one two "
    assert "".join(pieces(tokenizer, tokenizer("one ##")["input_ids"], ("###END",))) == "one ##"
    assert "".join(pieces(tokenizer, tokenizer("aab aac")["input_ids"], ("aac", "b a"))) == "aa"


# Adapters


def test_adapters_answer_side_by_side(base: Path, runs: list[Path], engine: TorchEngine) -> None:
    async def main() -> list[Delta]:
        long = asyncio.ensure_future(answer(engine, PROMPTS[2], max_tokens=60))
        await engine.load_adapter("first-1.5", runs[0])  # while the base is answering
        await engine.load_adapter("second", runs[1])
        asks = [(PROMPTS[0], None), (PROMPTS[0], "first-1.5"), (PROMPTS[0], "second"), (PROMPTS[4], "first-1.5")]
        texts = await asyncio.gather(*(answer(engine, prompt, adapter=name) for prompt, name in asks))
        return [*texts, await long]

    texts = [delta.text for delta in asyncio.run(main())]
    assert texts == [
        generated(base, PROMPTS[0]),
        generated(base, PROMPTS[0], runs[0]),
        generated(base, PROMPTS[0], runs[1]),
        generated(base, PROMPTS[4], runs[0]),
        generated(base, PROMPTS[2], max_tokens=60),
    ]
    assert len(set(texts)) == 5

    asyncio.run(engine.unload_adapter("first-1.5"))
    with pytest.raises(RequestError, match=r"no adapter 'first-1.5'.*second"):
        ask(engine, "hello", adapter="first-1.5")
    assert ask(engine, PROMPTS[0], adapter="second").text == texts[2]
    asyncio.run(engine.unload_adapter("second"))
    assert ask(engine, PROMPTS[0]).text == texts[0]
    assert no_changes(engine)


def test_an_adapter_may_replace_whole_modules(base: Path, engine: TorchEngine, tmp_path: Path) -> None:
    run_ = small_models.save_lora_run(tmp_path / "run", base, modules_to_save=["lm_head"])
    before = ask(engine, PROMPTS[0]).text
    asyncio.run(engine.load_adapter("head", run_))
    both = run(engine, *(lambda n=name: answer(engine, PROMPTS[0], adapter=n) for name in (None, "head")))
    assert [delta.text for delta in both] == [before, generated(base, PROMPTS[0], run_)]
    asyncio.run(engine.unload_adapter("head"))
    assert ask(engine, PROMPTS[0]).text == before


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 40}}])
def test_kinds_of_lora(base: Path, engine: TorchEngine, tmp_path: Path, kind: dict[str, Any]) -> None:
    run_ = small_models.save_lora_run(tmp_path / "run", base, **kind)
    asyncio.run(engine.load_adapter("kind", run_))
    try:
        assert ask(engine, PROMPTS[0], adapter="kind").text == generated(base, PROMPTS[0], run_)
    finally:
        asyncio.run(engine.unload_adapter("kind"))


def test_memory_for_keys_and_values_is_bounded_and_changes_no_answer(base: Path) -> None:
    wanted = [generated(base, prompt, max_tokens=60) for prompt in PROMPTS]
    engine = start(base, max_batch=8, kv_memory="0.0625MiB")  # 128 tokens: two of these answers at a time
    try:
        cache = engine._batcher._scheduler.cache
        assert cache.budget == 128
        together = run(engine, *(lambda p=prompt: answer(engine, p, max_tokens=60) for prompt in PROMPTS))
        assert [delta.text for delta in together] == wanted
        assert cache.allocated <= 128
        with pytest.raises(RequestError, match=r"max_tokens = 200: at most .* takes 128 of prompt and answer together"):
            ask(engine, "hello", max_tokens=200)
    finally:
        asyncio.run(engine.close())


@pytest.mark.parametrize("written", ["", "0%", "120%", "2 GB", "lots"])
def test_memory_that_cannot_be_read_is_refused(written: str) -> None:
    with pytest.raises(UserError, match=r"Torch.kv_memory = .*25%"):
        Torch(kv_memory=written)


def test_a_shared_beginning_is_computed_once_and_changes_no_answer(base: Path, engine: TorchEngine) -> None:
    shared = " ".join(PROMPTS)
    prompts = [f"{shared} {end}" for end in ("fox", "sea", "house")]
    wanted = [generated(base, prompt) for prompt in prompts]
    cache = engine._batcher._scheduler.cache
    before = cache.hits
    together = run(engine, *(lambda p=prompt: answer(engine, p) for prompt in prompts))
    assert [delta.text for delta in together] == wanted
    assert cache.hits - before >= 2 * 64
    assert [ask(engine, prompt).text for prompt in prompts] == wanted


def test_a_request_that_runs_out_of_memory_fails_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(base)
    compute = runner.Runner.run

    def full(self: Any, pieces: Any) -> Any:
        if len(pieces) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return compute(self, pieces)

    monkeypatch.setattr(runner.Runner, "run", full)

    async def main() -> list[Any]:
        asks = (answer(engine, prompt, max_tokens=50) for prompt in PROMPTS[:4])
        return await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 20)

    try:
        *first, third, fourth = asyncio.run(main())
        assert [delta.text for delta in first] == [generated(base, prompt, max_tokens=50) for prompt in PROMPTS[:2]]
        assert all("not enough memory" in str(error) for error in (third, fourth))
        engine.check()
        assert ask(engine, "hello").text == generated(base, "hello")
    finally:
        asyncio.run(engine.close())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_where_there_is_no_memory_for_a_row_the_request_fails_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = start(base)
    zeros = runner.Tables._zeros

    def full(self: Any, *shape: int) -> Any:
        if shape[-2] > 64:  # tokens of a row
            raise error
        return zeros(self, *shape)

    monkeypatch.setattr(runner.Tables, "_zeros", full)

    async def main() -> list[Any]:
        asks = [
            answer(engine, "hello " * 60),
            answer(engine, "hello"),
            answer(engine, "one", max_tokens=80, ignore_eos=True),
        ]
        return await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 20)

    try:
        grown, short, long = asyncio.run(main())
        assert short.text == generated(base, "hello")
        assert all("not enough memory" in str(failed) for failed in (long, grown))
        engine.check()
        assert ask(engine, "hello").text == generated(base, "hello")
    finally:
        asyncio.run(engine.close())


def test_8_bit_weights_hardly_change_the_answers(base: Path, engine: TorchEngine) -> None:
    small = start(base, weights="int8")
    try:
        ids = torch.tensor([7, 9, 30, 41, 55, 60])
        exact, rounded = (_logits(made, ids) for made in (engine, small))
        assert 0 < ((exact - rounded).norm() / exact.norm()) < 0.05
    finally:
        asyncio.run(small.close())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 192), (33, 50), (7, 8)])
def test_8_bit_products_are_close_for_any_number_of_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    made = layers.product(weight, bias, "int8")
    x = torch.randn(2, 20, shape[1], dtype=dtype)
    exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    for count in (1, 2, 3, 20):
        found, wanted = made(x[:, :count]), exact[:, :count]
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        assert ((found.float() - wanted).norm() / wanted.norm()) < 0.02


def _logits(engine: TorchEngine, ids: torch.Tensor) -> torch.Tensor:
    made = engine._batcher._runner
    cache = Cache(made.tables, budget=64, longest=64)
    place = cache.place(len(ids))
    assert place is not None
    probe = runner._Probe(ids.tolist())
    return made.run([scheduler.Piece(scheduler.Running(probe, place), len(ids))])[0]


def test_more_adapters_than_fit_are_read_again_when_asked_for(base: Path, runs: list[Path]) -> None:
    engine = start(base, max_adapters=1)
    try:
        for name, run_ in zip(("first", "second"), runs, strict=True):
            asyncio.run(engine.load_adapter(name, run_))
        wanted = [generated(base, PROMPTS[0], run_) for run_ in runs]
        for _ in range(2):
            assert [ask(engine, PROMPTS[0], adapter=name).text for name in ("first", "second")] == wanted
            keys = {key for layer, _ in engine._batcher._runner.adapters._layers.values() for key in layer.changes}
            assert len(keys) == 1
        together = run(engine, *(lambda n=name: answer(engine, PROMPTS[0], adapter=n) for name in ("first", "second")))
        assert [delta.text for delta in together] == wanted
        shutil.move(runs[0], runs[0].with_name("gone"))
        try:
            ask(engine, PROMPTS[0], adapter="second")  # the first is no longer in memory
            with pytest.raises(RequestError, match=r"adapter 'first' cannot be read again: .*no such directory"):
                ask(engine, PROMPTS[0], adapter="first")
        finally:
            shutil.move(runs[0].with_name("gone"), runs[0])
    finally:
        asyncio.run(engine.close())


def test_an_adapter_speaks_with_the_template_of_its_run(runs: list[Path], engine: TorchEngine) -> None:
    chat = (Message("user", "hello"),)
    asyncio.run(engine.load_adapter("first", runs[0]))
    asyncio.run(engine.load_adapter("second", runs[1]))
    try:
        tokenizer = small_models.tokenizer()
        chatml = tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert ask(engine, chat).prompt_tokens == len(chatml)
        assert ask(engine, chat).text == ask(engine, tuple(chatml)).text
        assert ask(engine, chat, adapter="first") == ask(engine, tuple(chatml), adapter="first")
        plain = tuple(tokenizer("user: hello<|endoftext|>")["input_ids"])
        assert ask(engine, chat, adapter="second") == ask(engine, plain, adapter="second")
        assert engine._adapters["second"].voice.ends == {0}
    finally:
        asyncio.run(engine.unload_adapter("first"))
        asyncio.run(engine.unload_adapter("second"))


def test_answers_under_way_keep_their_adapter(base: Path, runs: list[Path], engine: TorchEngine) -> None:
    async def main() -> tuple[str, str]:
        await engine.load_adapter("it", runs[0])
        stream = engine.generate(request(PROMPTS[0], adapter="it", max_tokens=40))
        text = (await anext(stream)).text
        await engine.load_adapter("it", runs[1])  # a newer run under the same name
        new = await answer(engine, PROMPTS[0], adapter="it")
        await engine.unload_adapter("it")
        return text + "".join([delta.text async for delta in stream]), new.text

    assert asyncio.run(main()) == (
        generated(base, PROMPTS[0], runs[0], max_tokens=40),
        generated(base, PROMPTS[0], runs[1]),
    )
    ask(engine, "hello", max_tokens=1)
    assert not engine._batcher._retired


def test_an_adapter_that_cannot_be_served_is_refused_and_leaves_no_trace(
    base: Path, runs: list[Path], engine: TorchEngine, tmp_path: Path
) -> None:
    before = ask(engine, PROMPTS[0]).text
    other = small_models.save_model(tmp_path / "wide", small_models.llama_config(hidden_size=96))
    deep = small_models.save_model(tmp_path / "deep", small_models.llama_config(num_hidden_layers=3))
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "empty" / "adapter").mkdir(parents=True)
    headless = shutil.copytree(runs[0], tmp_path / "headless")
    (headless / "adapter" / "adapter_model.safetensors").unlink()
    half = shutil.copytree(runs[0], tmp_path / "half")  # of its targets, the second is nothing for LoRA
    config = json.loads((half / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "input_layernorm"]
    (half / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused = {
        tmp_path / "nowhere": "no such directory",
        tmp_path / "full": "full finetune, not an adapter",
        tmp_path / "unfinished": "has no adapter/",
        tmp_path / "empty": "no adapter_config.json",
        headless: "cannot be read",
        small_models.save_lora_run(tmp_path / "w", other): "does not fit the base: size mismatch",
        small_models.save_lora_run(tmp_path / "d", deep): r"does not fit the base.*layers\.2",
        half: "does not fit the base",
    }
    for directory, words in refused.items():
        with pytest.raises(UserError, match=words) as caught:
            asyncio.run(engine.load_adapter("x", directory))
        assert "\n" not in str(caught.value)
    assert ask(engine, PROMPTS[0]).text == before
    assert no_changes(engine)
    with pytest.raises(UserError, match="no adapter 'x'"):
        asyncio.run(engine.unload_adapter("x"))


# Requests that cannot be served


@pytest.mark.parametrize(
    ("prompt", "changes", "param", "words"),
    [
        ("", {}, "prompt", "empty"),
        ((), {}, "prompt", "empty"),
        ((5, 99999), {}, "prompt", "99999 is not a token of this model"),
        ("word " * 300, {}, "prompt", r"too long: \d+ tokens of prompt, and this model takes 256"),
        ((Message("user", "word " * 300),), {}, "messages", r"too long: \d+ tokens"),
        ((5,) * 10, {"max_tokens": 250}, "max_tokens", "at most 246"),
        ("hello", {"max_tokens": 0}, "max_tokens", "at least 1"),
        ("hello", {"adapter": "nobody"}, "model", "no adapter 'nobody'"),
        ("hello", {"temperature": -1.0}, "temperature", "at least 0"),
        ("hello", {"top_p": 0.0}, "top_p", "above 0"),
        ("hello", {"stop": ("",)}, "stop", "empty"),
    ],
)
def test_a_request_that_cannot_be_served_is_told_why(
    engine: TorchEngine, prompt: Any, changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ask(engine, prompt, **changes)
    assert caught.value.param == param
    assert ask(engine, "hello", max_tokens=1).completion_tokens == 1


def test_a_chat_needs_a_template_that_takes_it(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('only robots may speak') }}")
    with pytest.raises(RequestError, match="only robots may speak") as caught:
        ask_once(model, (Message("user", "hi"),))
    assert caught.value.param == "messages"
    (model / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match=r"no chat template.*/v1/completions"):
        ask_once(model, (Message("user", "hi"),))


# Failure and the end


def test_a_failure_reaches_everyone_who_waits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(base, max_batch=2)
    steps = iter(range(3))
    step = runner.Runner.run

    def breaks(self: Any, pieces: Any) -> Any:
        if next(steps, None) is None:
            raise ValueError("something broke")
        return step(self, pieces)

    monkeypatch.setattr(runner.Runner, "run", breaks)

    async def main() -> list[Any]:
        asks = (answer(engine, prompt, max_tokens=50) for prompt in PROMPTS[:4])
        return await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 20)

    for error in asyncio.run(main()):
        assert isinstance(error, RuntimeError)
        assert isinstance(error.__cause__, ValueError)
    with pytest.raises(RuntimeError, match="something broke"):
        engine.check()
    with pytest.raises(RuntimeError, match="something broke"):
        ask(engine, "hello")
    asyncio.run(engine.close())


def test_close_ends_what_runs(base: Path) -> None:
    engine = start(base, max_batch=1)
    engine.check()

    async def main() -> list[Any]:
        asks = [asyncio.ensure_future(answer(engine, p, max_tokens=None, temperature=1.5)) for p in PROMPTS[:3]]
        stream = engine.generate(request("hello", max_tokens=1))
        await asyncio.sleep(0.05)
        await engine.close()
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await anext(stream)
        return await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 20)

    results = asyncio.run(main())
    assert any(isinstance(result, RuntimeError) for result in results)
    assert not engine._batcher._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        engine.check()


def test_consumers_whose_event_loop_is_gone_do_not_harm_the_others(base: Path) -> None:
    engine = start(base, max_batch=1)
    loop = asyncio.new_event_loop()
    stream = engine.generate(request("hello", max_tokens=None, temperature=1.5))
    loop.run_until_complete(anext(stream))
    loop.close()
    try:
        assert ask(engine, "hello", max_tokens=2).completion_tokens == 2
        engine.check()
    finally:
        asyncio.run(engine.close())


# Compiled


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llama", "qwen2, tied", "gpt2, learned positions"])
def test_compiled_answers_are_the_same_and_nothing_is_compiled_once_it_is_ready(tmp_path: Path, name: str) -> None:
    model = small_models.save_model(tmp_path / "model", None if name == "llama" else architecture(name))
    adapter = small_models.save_lora_run(tmp_path / "adapter", model)
    engine = start(model, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        asyncio.run(engine.load_adapter("adapter", adapter))
        wanted = [generated(model, prompt) for prompt in PROMPTS]
        changed = [generated(model, prompt, adapter) for prompt in PROMPTS]
        assert [ask(engine, prompt).text for prompt in PROMPTS] == wanted
        assert [ask(engine, prompt, adapter="adapter").text for prompt in PROMPTS] == changed
        both = [text for pair in zip(wanted, changed, strict=True) for text in pair]
        mixed = [lambda p=p, a=a: answer(engine, p, adapter=a) for p in PROMPTS for a in (None, "adapter")]
        assert [delta.text for delta in run(engine, *mixed)] == both
        long, scored = "hello world " * 15, ask(engine, PROMPTS[0], prompt_logprobs=0, max_tokens=1)
        assert ask(engine, long).text == generated(model, long)
        assert len(scored.prompt_logprobs) == scored.prompt_tokens
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    finally:
        asyncio.run(engine.close())


@pytest.mark.engine
def test_compiled_beside_another_each_engine_has_its_own_model(base: Path, tmp_path: Path) -> None:
    other = small_models.save_model(tmp_path / "other", seed=5)
    engines = [start(model, compile=True) for model in (base, other)]
    try:
        wanted = [generated(model, "hello") for model in (base, other)]
        assert [ask(engine, "hello").text for engine in engines] == wanted
        layers = [weakref.ref(engine._batcher._runner.adapters._layers["lm_head"][0]) for engine in engines]
    finally:
        for engine in engines:
            asyncio.run(engine.close())
    del engine, engines
    gc.collect()
    assert [layer() for layer in layers] == [None, None]  # closed, they leave nothing in memory


def test_a_forward_that_asks_what_its_tensors_hold_is_not_compiled() -> None:
    def curious(ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return ids if ids.sum() > 3 else -ids

    attention = TorchAttention(())
    step = Step(torch.arange(3), torch.arange(3), attention, torch.arange(2))
    with pytest.raises(UserError, match=r"^Torch.compile = True: this model cannot be compiled: [^\n]+$"):
        Compiled(curious, (), torch.device("cpu")).warm_up([step])


@pytest.mark.engine
def test_compiled_without_a_compiler_is_one_line(base: Path, tmp_path: Path) -> None:
    program = (
        "from plugins.engines import Torch\nfrom plugins.types import ModelSource\n"
        f"Torch(compile=True).start(ModelSource({str(base)!r}, dtype='fp32'), cpus=1)"
    )
    env = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("CXX", None)
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert ended.stderr.splitlines()[-1] == (
        "plugins.spec.UserError: Torch.compile = True: needs a C++ compiler (g++) on each node"
    )


# At the door


def test_what_is_not_a_model_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    weightless = shutil.copytree(base, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    mute = shutil.copytree(base, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    unconfigured = shutil.copytree(base, tmp_path / "unconfigured")
    (unconfigured / "config.json").unlink()
    refused = {
        str(tmp_path / "nowhere"): "no such directory",
        str(empty): "no config.json",
        str(unconfigured): "no config.json",
        str(weightless): "no weights",
        str(mute): "no tokenizer",
        "nobody/no-such-model": "cannot be loaded",
    }
    for path, words in refused.items():
        with pytest.raises(UserError, match=words) as caught:
            Torch().start(ModelSource(path, dtype="fp32"), cpus=1)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"max_length = 300: this model was made for at most 256"):
        start(base, max_length=300)


def test_the_mailbox_holds_nothing_back() -> None:
    async def main() -> None:
        mailbox = batching.Mailbox(asyncio.get_running_loop())
        for count, text in enumerate("abc", 1):
            mailbox.put(Delta(text, 7, count))
        assert await mailbox.take() == Delta("abc", 7, 3)
        mailbox.put(Delta("d", 7, 4, "stop"))
        assert await mailbox.take() == Delta("d", 7, 4, "stop")

    asyncio.run(main())
