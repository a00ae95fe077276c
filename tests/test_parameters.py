"""Every parameter of a request to the torch engine: what it does to the answer, against references written out here."""

import asyncio
import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers

from plugins.engines import Torch, grammar, sampling
from plugins.engines.sampling import Sampler, Sampling, choose
from plugins.engines.sequence import Sequence
from plugins.engines.text import Spelling, Voice
from plugins.engines.torch import TorchEngine
from plugins.types import Constraint, Delta, GenerateRequest, Message, ModelSource, RequestError

PROMPT = "the quick brown fox"
EOS = 0
CHOICE = Constraint("choice", ("yes", "no", "perhaps 東京"), "guided_choice")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog", "naïve 🙂"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = Constraint("json_schema", json.dumps(PERSON), "guided_json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[TorchEngine]:
    made = start(base)
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def net(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def start(model: Path) -> TorchEngine:
    return TorchEngine(ModelSource(str(model), dtype="fp32"), Torch(kv_memory="16MiB"), cpus=1)


def request(prompt: Any = PROMPT, **changes: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **({"temperature": 0.0, "max_tokens": 24} | changes))


async def deltas(engine: TorchEngine, asked: GenerateRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(asked)]


def ask(engine: TorchEngine, prompt: Any = PROMPT, **changes: Any) -> Delta:
    return Delta.joined(asyncio.run(asyncio.wait_for(deltas(engine, request(prompt, **changes)), 60)))


def ask_all(engine: TorchEngine, *asked: GenerateRequest) -> list[Delta]:
    async def together() -> list[list[Delta]]:
        return await asyncio.wait_for(asyncio.gather(*(deltas(engine, one) for one in asked)), 60)

    return [Delta.joined(said) for said in asyncio.run(together())]


def ids(said: Delta) -> list[int]:
    return [token.token for token in said.logprobs]


def prompt_ids(prompt: str = PROMPT) -> list[int]:
    return list(small_models.tokenizer()(prompt)["input_ids"])


# Which token comes next


def reference(logits: list[float], way: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """Logits after bias and penalties, a token at a time."""
    said = Counter(answer)
    changed = []
    for token, value in enumerate(logits):
        value += way.logit_bias.get(token, 0.0)
        if token in prompt or token in said:
            value = value / way.repetition_penalty if value > 0 else value * way.repetition_penalty
        changed.append(value - way.frequency_penalty * said[token] - way.presence_penalty * (said[token] > 0))
    return changed


def shares(logits: list[float], way: Sampling) -> list[float]:
    """Probabilities after temperature, min_p, top_k and top_p."""
    exponentials = [math.exp(value / way.temperature) for value in logits]
    found = [value / sum(exponentials) for value in exponentials]
    found = [value if value >= way.min_p * max(found) else 0.0 for value in found]
    if way.top_k:
        found = [value if value >= sorted(found)[-way.top_k] else 0.0 for value in found]
    total = sum(found)
    found = [value if sum(other for other in found if other > value) < way.top_p * total else 0.0 for value in found]
    return [value / sum(found) for value in found]


def test_penalties_and_bias_are_those_of_the_reference_in_a_mixed_batch() -> None:
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 20, generator=chance) * 2
    ways, samplers, wanted = [], [], []
    for row in range(64):
        numbers = torch.rand(3, generator=chance).tolist()
        way = Sampling(
            temperature=0.0,
            repetition_penalty=0.5 + 2 * numbers[0] if row % 2 else 1,
            frequency_penalty=4 * numbers[1] - 2 if row % 3 else 0,
            presence_penalty=4 * numbers[2] - 2 if row % 5 else 0,
            logit_bias={row % 20: 2.5, 3: -100} if row % 4 == 0 else {},
        )
        prompt, answer = (torch.randint(0, 20, (6,), generator=chance).tolist() for _ in range(2))
        sampler = Sampler(way, prompt=prompt)
        for token in answer:
            sampler.take(token)
        ways.append(way)
        samplers.append(sampler)
        values = reference(logits[row].tolist(), way, prompt, answer)
        wanted.append(values.index(max(values)))
    before = logits.clone()
    assert [choice.token for choice in choose(logits, samplers)] == wanted
    assert wanted != logits.argmax(-1).tolist()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.1, "top_k": 6, "top_p": 0.9, "temperature": 1.5},
    ],
)
@pytest.mark.parametrize("patience", [0, 8])  # with and without sorting
def test_draws_follow_the_distribution_of_the_reference(
    changes: dict[str, Any], patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PATIENCE", patience)
    logits, draws = [1.9, 2.0, 0.3, -1.0, 1.2, 0.9, -4.0, 0.31, -0.5, 1.0], 8000
    way = Sampling(**changes)
    samplers = [Sampler(dataclasses.replace(way, seed=seed)) for seed in range(draws)]
    drawn = Counter(choice.token for choice in choose(torch.tensor([logits] * draws), samplers))
    expected = {token: share * draws for token, share in enumerate(shares(logits, way)) if share}
    assert drawn.keys() <= expected.keys()
    chi_square = sum((drawn[token] - count) ** 2 / count for token, count in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1


@pytest.mark.parametrize("patience", [0, 1, 8])
def test_a_nucleus_of_thousands_is_as_exact_as_a_small_one(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PATIENCE", patience)
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(1)) / 2
    probabilities, order = logits.double().softmax(-1).sort(descending=True)
    inside = int((probabilities.cumsum(0) - probabilities < 0.6).sum())
    assert inside > 1000
    allowed = set(order[:inside].tolist())
    samplers = [Sampler(Sampling(top_p=0.6, seed=seed)) for seed in range(400)]
    drawn = {choice.token for choice in choose(logits.expand(400, -1), samplers)}
    assert drawn <= allowed
    assert drawn & set(order[inside - 300 : inside].tolist())


def test_looking_among_the_likeliest_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(5)
    logits = torch.randn(300, 3000, generator=chance) * torch.rand(300, 1, generator=chance) * 8
    logits[::7] = logits[::7].round()  # many tokens of one weight
    numbers = torch.rand(300, 3, generator=chance)
    ways = [
        Sampling(
            seed=row,
            top_k=int(4000 * share**6) if row % 2 else 0,
            top_p=top if row % 3 else 1,
            min_p=least**6 if row % 5 < 2 else 0,
        )
        for row, (share, top, least) in enumerate(numbers.tolist())
    ]
    drawn = []
    for few in (64, 0, 1000):
        monkeypatch.setattr(sampling, "FEW", few)
        drawn.append(choose(logits, [Sampler(way) for way in ways]))
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != choose(logits, [Sampler(Sampling(seed=way.seed)) for way in ways])


def test_a_row_is_drawn_the_same_alone_and_in_company_to_the_bit() -> None:
    chance = torch.Generator().manual_seed(2)
    logits = (torch.randn(12, 5000, generator=chance) * 3).bfloat16()
    ways = [
        Sampling(
            seed=row, temperature=0.5 + row / 8, top_k=(0, 7, 900)[row % 3], top_p=(1, 0.9)[row % 2], min_p=row / 100
        )
        for row in range(12)
    ]
    together = [Sampler(way) for way in ways]
    alone = [Sampler(way) for way in ways]
    for _ in range(20):
        tokens = [choice.token for choice in choose(logits, together)]
        assert [choose(logits[row : row + 1], [alone[row]])[0].token for row in range(12)] == tokens
        logits = logits.roll(1, 0) * 0.95


def test_logprobs_are_of_the_models_own_distribution_whatever_is_done_to_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    ways = [
        Sampling(temperature=2.0, top_k=1, logprobs=0),
        Sampling(temperature=0.0, logit_bias={7: 100}, repetition_penalty=2.0, logprobs=4),
        Sampling(temperature=0.0),
    ]
    first, second, third = choose(logits, [Sampler(way, prompt=[1, 7]) for way in ways])
    wanted = logits.log_softmax(-1)
    assert (first.logprob, first.top) == (pytest.approx(wanted[0].max().item()), ())
    assert (second.token, second.logprob) == (7, pytest.approx(wanted[1, 7].item()))
    assert [token for token, _ in second.top] == wanted[1].topk(4).indices.tolist()
    assert [value for _, value in second.top] == pytest.approx(wanted[1].topk(4).values.tolist())
    assert (third.logprob, third.top) == (None, ())


# The same in the engine


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.7},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"logit_bias": {20: 3.0, 30: -100.0}},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {20: 1.0}},
    ],
)
def test_penalties_and_bias_steer_the_whole_answer(engine: TorchEngine, net: Any, changes: dict[str, Any]) -> None:
    way = Sampling(**changes)
    prompt, answer = prompt_ids(), []
    for _ in range(24):
        logits = net(torch.tensor([prompt + answer])).logits[0, -1]
        values = reference(logits.tolist(), way, prompt, answer)
        answer.append(values.index(max(values)))
    said = ask(engine, logprobs=0, **changes)
    assert ids(said) == answer[: len(ids(said))]
    assert said.finish_reason == ("stop" if ids(said)[-1] in (0, 2) else "length")
    assert ids(said) != ids(ask(engine, logprobs=0))


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}])
def test_the_narrowest_choice_is_the_greedy_one(engine: TorchEngine, changes: dict[str, Any]) -> None:
    greedy = ask(engine).text
    assert ask(engine, **({"temperature": 1.5, "seed": 1} | changes)).text == greedy
    assert ask(engine, temperature=1.5, seed=1).text != greedy


def test_seeded_answers_are_the_same_alone_and_in_company(engine: TorchEngine) -> None:
    asked = [
        request(temperature=1.3, seed=1, top_p=0.95),
        request(temperature=1.3, seed=2, top_k=50, repetition_penalty=1.3),
        request("hello", temperature=0.8, seed=3, logprobs=3),
        request("one two", temperature=1.5, seed=4, constraint=SCHEMA, max_tokens=100),
        request("naïve café", temperature=1.0, seed=5, min_p=0.1, logit_bias={40: 5.0}),
    ]
    alone = [ask_all(engine, one)[0] for one in asked]
    assert [said.text for said in ask_all(engine, *asked)] == [said.text for said in alone]
    assert len({said.text for said in alone}) == len(asked)


def test_the_models_generation_config_gives_defaults_and_a_request_that_names_a_value_wins(
    base: Path, tmp_path: Path, engine: TorchEngine
) -> None:
    def open_request(**changes: Any) -> GenerateRequest:
        return GenerateRequest(prompt=PROMPT, seed=3, **changes)

    def answers(asked: list[GenerateRequest], **said: Any) -> list[Delta]:
        model = shutil.copytree(base, tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, **said}))
        engine = start(model)
        try:
            return ask_all(engine, *asked)
        finally:
            asyncio.run(engine.close())

    greedy = ask(engine, max_tokens=12).text
    named = open_request(max_tokens=12, temperature=1.0, top_k=0)
    free, short, hot = answers(
        [open_request(max_tokens=12), open_request(), named], do_sample=True, temperature=1.4, top_k=1, max_new_tokens=5
    )
    assert free.text == greedy
    assert short.completion_tokens == 5
    assert hot.text == ask_all(engine, named)[0].text != greedy
    unread, penalised = answers(
        [open_request(max_tokens=12), request(max_tokens=12)], temperature=1.4, top_k=1, repetition_penalty=1.8
    )
    asked = open_request(max_tokens=12, temperature=1.0, repetition_penalty=1.8)
    assert unread.text == ask_all(engine, asked)[0].text  # the values to draw with need do_sample
    assert penalised.text == ask(engine, max_tokens=12, repetition_penalty=1.8).text != greedy


# Where an answer ends


def test_min_tokens_forbids_every_end_until_it_is_reached(engine: TorchEngine) -> None:
    greedy = ask(engine, logprobs=0)
    for ending in (
        {"logit_bias": {EOS: 100.0}},
        {"logit_bias": {77: 100.0}, "stop_token_ids": (77,)},
        {"logit_bias": {77: 100.0}, "stop": (small_models.tokenizer().decode([77]),)},
    ):
        early, late = ask(engine, **ending), ask(engine, min_tokens=6, **ending)
        assert (early.completion_tokens, early.finish_reason) == (1, "stop")
        assert (late.completion_tokens, late.finish_reason) == (7, "stop")
    unbothered = ask(engine, min_tokens=24, logprobs=0)
    assert ids(unbothered)[: len(ids(greedy))] == ids(greedy)
    assert unbothered.completion_tokens == 24


def test_ignore_eos_goes_on_after_the_end(engine: TorchEngine) -> None:
    forced = {"logit_bias": {EOS: 100.0}, "max_tokens": 5}
    assert ask(engine, **forced).completion_tokens == 1
    said = ask(engine, ignore_eos=True, logprobs=0, **forced)
    assert (ids(said), said.finish_reason, said.text) == ([EOS] * 5, "length", "")


def test_stop_token_ids_end_the_answer_and_say_which(engine: TorchEngine) -> None:
    whole = ask(engine, logprobs=0)
    third = ids(whole)[2]
    place = ids(whole).index(third)
    said = ask(engine, stop_token_ids=(third,))
    assert (said.finish_reason, said.stop_reason, said.completion_tokens) == ("stop", third, place + 1)
    tokenizer = small_models.tokenizer()
    assert said.text == tokenizer.decode(ids(whole)[:place])
    assert ask(engine, stop_token_ids=(third,), include_stop=True).text == tokenizer.decode(ids(whole)[: place + 1])


def test_a_stop_string_is_named_and_stays_when_asked_for(engine: TorchEngine) -> None:
    whole = ask(engine).text
    stop = whole[5:9]
    said = ask(engine, stop=("never", stop))
    assert (said.text, said.finish_reason, said.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
    kept = ask(engine, stop=("never", stop), include_stop=True)
    assert kept.text == whole[: whole.index(stop) + len(stop)]
    assert ask(engine).stop_reason is None


# What comes beside the answer


def own_logprobs(net: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocab]: the model's own log-probabilities after each of `tokens`."""
    with torch.no_grad():
        return net(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_logprobs_of_an_answer_are_the_models_own(engine: TorchEngine, net: Any) -> None:
    for prompt in (PROMPT, "東京 and 🙂"):
        said = ask(engine, prompt, logprobs=3, temperature=1.4, seed=5, top_k=40, frequency_penalty=1.0)
        before = prompt_ids(prompt)
        own = own_logprobs(net, before + ids(said))[len(before) - 1 : -1]
        assert said.completion_tokens == len(said.logprobs) == len(own)
        for token, row in zip(said.logprobs, own, strict=True):
            assert token.logprob == pytest.approx(row[token.token].item(), abs=1e-4)
            assert [other.token for other in token.top] == row.topk(3).indices.tolist()
            assert [other.logprob for other in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        shown = b"".join(token.data for token in said.logprobs if token.token > 2)
        assert shown.decode(errors="replace") == said.text
        assert said.logprobs[0].offset == 0


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_echo_gives_the_prompt_with_the_models_own_logprobs(
    engine: TorchEngine, net: Any, as_tokens: bool, max_tokens: int
) -> None:
    text = "naïve café, 東京 and <|im_start|> the quick"
    tokens = prompt_ids(text)
    prompt: Any = tuple(tokens) if as_tokens else text
    said = ask(engine, prompt, echo=True, logprobs=2, prompt_logprobs=2, max_tokens=max_tokens)
    plain = ask(engine, prompt, max_tokens=max(max_tokens, 1))
    assert said.text == text + (plain.text if max_tokens else "")
    assert (said.prompt_tokens, said.completion_tokens) == (len(tokens), max_tokens)
    assert [token.token for token in said.prompt_logprobs] == tokens
    assert (said.prompt_logprobs[0].logprob, said.prompt_logprobs[0].top) == (None, ())
    own = own_logprobs(net, tokens)
    for token, row in zip(said.prompt_logprobs[1:], own, strict=False):
        assert token.logprob == pytest.approx(row[token.token].item(), abs=1e-4)
        assert [other.token for other in token.top] == row.topk(2).indices.tolist()
    offsets = [token.offset for token in (*said.prompt_logprobs, *said.logprobs)]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for token in said.prompt_logprobs:
        if "\ufffd" not in (word := token.data.decode(errors="replace")):
            assert said.text.startswith(word, token.offset)
    if max_tokens:
        assert said.logprobs[0].offset == len(text)


def test_a_prompt_may_be_scored_in_any_pieces_beside_others(engine: TorchEngine, base: Path) -> None:
    tokens = prompt_ids("the weather, the sea and the mountains")
    company = [request(), request("hello", prompt_logprobs=1), request(tuple(tokens), prompt_logprobs=1, max_tokens=1)]
    *_, hello, scored = ask_all(engine, *company)
    assert [token.token for token in hello.prompt_logprobs] == prompt_ids("hello")
    assert scored.text == ask(engine, tuple(tokens), max_tokens=1).text  # without echo, the prompt is not in the text

    voice = Voice.of(small_models.tokenizer(), None)

    async def pieces(size: int) -> Delta:
        asked = request(tuple(tokens), prompt_logprobs=2, max_tokens=0)
        sequence = Sequence(
            asked, prompt=tokens, sampling=Sampling.of(asked, {}), limit=0, min_tokens=0, adapter="", voice=voice,
            loop=asyncio.get_running_loop(),
        )  # fmt: skip
        logits = torch.randn(len(tokens), 384, generator=torch.Generator().manual_seed(0))
        for begin in (*range(0, len(tokens), size), 0):  # a piece may come again
            sequence.score_prompt(begin, logits[begin : begin + size])
        sequence.take(choose(logits[-1:], [sequence.sampler])[0])
        news = sequence.news()
        assert news is not None
        return news

    whole = asyncio.run(pieces(len(tokens)))
    assert len(whole.prompt_logprobs) == len(tokens)
    assert all(asyncio.run(pieces(size)) == whole for size in (1, 3))


@pytest.mark.parametrize("vocabulary", [384, 300])  # a multiple of what is looked through at a time, and none
def test_of_the_likeliest_the_first_is_chosen(vocabulary: int) -> None:
    sampler = Sampler(Sampling(temperature=0), prompt=[], grammar=None, forbidden=frozenset(), min_tokens=0)
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(-1).tolist()
    for place in (299, 140, 7):  # the later come first
        logits[0, place] = 9
        expected[0] = place
        assert [choice.token for choice in choose(logits, [sampler] * 5)] == expected


def test_a_stream_says_what_a_whole_answer_says(engine: TorchEngine) -> None:
    asked = request(
        "東京", temperature=1.5, seed=8, logprobs=1, stop=("zzz",), echo=True, prompt_logprobs=0, max_tokens=60
    )
    pieces = asyncio.run(deltas(engine, asked))
    assert len(pieces) > 1
    joined = Delta.joined(pieces)
    assert joined == ask_all(engine, asked)[0]
    assert len(joined.logprobs) == joined.completion_tokens
    assert len(joined.prompt_logprobs) == joined.prompt_tokens


def byte_fallback_tokenizer() -> Any:
    """Like Llama 2's: a space is ▁, bytes stand for what is not in the vocabulary."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁hello",
        "yes",
        "{",
        '"',
        "东",
        "é",
        "1",
    ]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("tokenizer", [small_models.tokenizer(), byte_fallback_tokenizer()])
def test_a_tokens_bytes_are_what_the_decoder_joins(tokenizer: Any) -> None:
    spell = Spelling(tokenizer)
    text = 'yes naïve 東京 🙂 {"a": [1, 2]}\n\thello é东 ' * 2
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(spell, tokens)).decode() == text
    assert spell(tokenizer.eos_token_id).decode() == tokenizer.eos_token
    assert spell(9999) == b""  # a row of the model that the tokenizer does not know


# Constraints


def follows_schema(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["name", "age", "kind", "tags"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 12
        and found["age"] in range(131)
        and found["kind"] in PERSON["properties"]["kind"]["enum"]  # type: ignore[index]
        and len(found["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in found["tags"])
    )


def test_a_constrained_answer_always_matches(engine: TorchEngine) -> None:
    regex = Constraint("regex", r"[A-Z][a-z]{2,5}-\d{3}( 東京)?", "guided_regex")
    seeds = range(12)
    asked = [
        request(temperature=1.5, seed=seed, constraint=one, max_tokens=200)
        for one in (SCHEMA, regex, CHOICE)
        for seed in seeds
    ]
    said = ask_all(engine, *asked)
    assert {one.finish_reason for one in said} == {"stop"}
    schema, expression, choice = (said[start : start + len(seeds)] for start in range(0, len(said), len(seeds)))
    assert all(follows_schema(one.text) for one in schema)
    assert all(re.fullmatch(regex.value, one.text) for one in expression)
    assert {one.text for one in choice} <= set(CHOICE.value)
    assert min(len({one.text for one in kind}) for kind in (schema, expression, choice)) > 1


def test_any_json_object_is_one_unless_it_is_cut(engine: TorchEngine) -> None:
    constraint = Constraint("json_object", "", "response_format")
    asked = [request(temperature=1.5, seed=seed, constraint=constraint, max_tokens=150) for seed in range(12)]
    ended = [said for said in ask_all(engine, *asked) if said.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(said.text), dict) for said in ended)
    cut = ask(engine, constraint=SCHEMA, max_tokens=3)
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 3)


def test_logprobs_under_a_constraint_stay_the_models_own(engine: TorchEngine, net: Any) -> None:
    said = ask(engine, constraint=SCHEMA, temperature=1.5, seed=1, max_tokens=200, logprobs=0)
    assert follows_schema(said.text)
    own = own_logprobs(net, prompt_ids() + ids(said))[len(prompt_ids()) - 1 : -1]
    wanted = [row[token].item() for row, token in zip(own, ids(said), strict=True)]
    assert [token.logprob for token in said.logprobs] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("texts", [('a "quoted" \\ one', "line\nbreak"), ("é", "e", ""), ("日本", "日")])
def test_choices_may_hold_any_characters(engine: TorchEngine, texts: tuple[str, ...]) -> None:
    asked = [
        request(temperature=2.0, seed=seed, constraint=Constraint("choice", texts, "guided_choice"))
        for seed in range(8)
    ]
    assert {said.text for said in ask_all(engine, *asked)} <= set(texts)


def test_other_tokenizers_hold_constraints_too_also_one_of_an_adapters_own(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    byte_fallback_tokenizer().save_pretrained(model)
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    run = small_models.save_lora_run(tmp_path / "run", base, chat_template=small_models.CHATML)
    engine = start(model)
    try:
        asyncio.run(engine.load_adapter("own", run))
        asked = [
            request((5, 6, 7), temperature=1.5, seed=seed, constraint=one, adapter=adapter, max_tokens=200)
            for seed in range(4)
            for one in (SCHEMA, CHOICE)
            for adapter in (None, "own")
        ]
        said = ask_all(engine, *asked)
    finally:
        asyncio.run(engine.close())
    for one, answer in zip(asked, said, strict=True):
        assert answer.finish_reason == "stop"
        assert follows_schema(answer.text) if one.constraint == SCHEMA else answer.text in CHOICE.value


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json_schema", '{"type": "nothing"}', "guided_json"), "nothing"),
        (Constraint("json_schema", "{not json", "response_format"), "response_format: "),
        (Constraint("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "guided_json"), "guided_json: "),
        (Constraint("json_schema", '{"$ref": "#/nowhere"}', "structured_outputs"), "nowhere"),
        (Constraint("regex", "a(b", "guided_regex"), "guided_regex: "),
        (Constraint("regex", "(a{1000}){1000}{1000}", "guided_regex"), "too many expressions"),
    ],
)
def test_a_constraint_that_cannot_be_held_is_refused(engine: TorchEngine, constraint: Constraint, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as caught:
        ask(engine, constraint=constraint)
    assert caught.value.param == constraint.field
    assert "\n" not in str(caught.value)
    assert ask(engine, constraint=CHOICE).text in CHOICE.value


def test_a_grammar_that_fails_on_the_way_ends_its_own_request_alone(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = grammar.Matcher.take
    taken = iter(range(3))

    def fails(self: grammar.Matcher, token: int) -> None:
        take(self, token)
        if next(taken, None) is None:
            raise RequestError("guided_json: too complex", "guided_json")

    monkeypatch.setattr(grammar.Matcher, "take", fails)

    async def main() -> list[Any]:
        asked = (request(constraint=SCHEMA), request("hello"), request("one two"))
        return await asyncio.wait_for(
            asyncio.gather(*(deltas(engine, one) for one in asked), return_exceptions=True), 60
        )

    failed, *others = asyncio.run(main())
    assert isinstance(failed, RequestError)
    assert [Delta.joined(said).text for said in others] == [ask(engine, "hello").text, ask(engine, "one two").text]
    assert engine._batcher._scheduler.sequences() == []


# Tools


def test_tools_and_their_calls_reach_the_template(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments.place }}{% endfor %}<|im_end|>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "sea"}}}
    messages = (
        Message("user", "hello"),
        Message("assistant", "", {"tool_calls": [call]}),
        Message("tool", "sun", {"tool_call_id": "1"}),
    )
    text = "weather;user: hello<|im_end|>assistant: sea<|im_end|>tool: sun<|im_end|>"
    tools = ({"type": "function", "function": {"name": "weather"}},)
    engine = start(model)
    try:
        said = ask(engine, messages, tools=tools, echo=True, max_tokens=4)
        assert said.text.startswith(text)
        assert said.prompt_tokens == len(prompt_ids(text))
        (model / "chat_template.jinja").unlink()
    finally:
        asyncio.run(engine.close())


def test_a_template_that_takes_no_tools_is_not_asked_in_vain(engine: TorchEngine) -> None:
    with pytest.raises(RequestError, match="takes no tools") as caught:
        ask(engine, (Message("user", "hello"),), tools=({"type": "function", "function": {"name": "weather"}},))
    assert caught.value.param == "tools"


# At the door


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "at least 0"),
        ({"min_tokens": -1}, "min_tokens", "at least 0"),
        ({"min_tokens": 25}, "min_tokens", "at most max_tokens, which is 24"),
        ({"min_tokens": 255, "max_tokens": None}, "min_tokens", "this model takes 256"),
        ({"temperature": math.nan}, "temperature", "at least 0"),
        ({"temperature": math.inf}, "temperature", "at least 0"),
        ({"top_p": 1.1}, "top_p", "at most 1"),
        ({"top_k": -1}, "top_k", "at least 0"),
        ({"min_p": 1.5}, "min_p", "from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "from -2 to 2"),
        ({"presence_penalty": -2.5}, "presence_penalty", "from -2 to 2"),
        ({"logit_bias": {5: 101.0}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {384: 1.0}}, "logit_bias", "0 to 383"),
        ({"stop_token_ids": (384,)}, "stop_token_ids", "0 to 383"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 20"),
        ({"constraint": SCHEMA, "ignore_eos": True}, "ignore_eos", "cannot be combined with guided_json"),
        ({"constraint": CHOICE, "min_tokens": 3}, "min_tokens", "cannot be combined with guided_choice"),
    ],
)
def test_a_value_that_no_answer_can_heed_is_refused(
    engine: TorchEngine, changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ask(engine, **changes)
    assert caught.value.param == param
