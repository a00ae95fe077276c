"""Embeddings: encoders in sentence-transformers' layout against a reference written by hand, and OpenAI's endpoint."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import safetensors.torch
import torch
import transformers
from small_models import CORPUS, llama_config, save_model
from test_cluster import Shell, free_port, kill, until
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from plugins.engines import Embedder, Torch
from plugins.engines.embeddings import EncoderEngine
from plugins.spec import UserError
from plugins.types import ModelSource, RequestError
from serve import ServeConfig, ServedModel
from serve.ingress import api

SIZE = 32
TEXTS = [
    "fox", "the quick brown fox", " ".join(CORPUS), "a language model answers", "one two three four five six", "sea",
    "the weather, the sea and the mountains", "naïve café", " hello world\n", "HELLO World", "x" * 40, "dog " * 30,
]  # fmt: skip


def encoder_tokenizer() -> Any:
    """WordPiece with <s> and </s> around a text; padding is token 1, where MPNet and RoBERTa have it."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(CORPUS * 4, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>"
    )


def config(kind: type = transformers.BertConfig, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 300, "hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 202, "initializer_range": 0.3, "pad_token_id": 1,
    }  # fmt: skip
    return kind(**(sizes | changes))


def t5_config() -> Any:
    return transformers.T5Config(
        vocab_size=300, d_model=SIZE, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1, initializer_factor=2.0
    )


def pooled(*modes: str) -> dict[str, Any]:
    """Settings of a Pooling as sentence-transformers up to 5.3 writes them."""
    flags = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": SIZE} | {f"pooling_mode_{flag}": flag in modes for flag in flags}


def save_encoder(
    folder: Path,
    encoder: Any = None,
    *,
    parts: Sequence[tuple[str, dict[str, Any]]] | None = (("Pooling", pooled("mean_tokens")), ("Normalize", {})),
    reading: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
) -> Path:
    """A random encoder in sentence-transformers' layout; `parts` None: without that layout."""
    torch.manual_seed(0)
    encoder = config() if encoder is None else encoder
    is_t5 = isinstance(encoder, transformers.T5Config)
    (transformers.T5EncoderModel(encoder) if is_t5 else transformers.AutoModel.from_config(encoder)).save_pretrained(
        folder
    )
    encoder_tokenizer().save_pretrained(folder)
    if parts is None:
        return folder
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, settings) in enumerate(parts, start=1):
        path = f"{index}_{kind}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
        if settings:
            (folder / path / "config.json").write_text(json.dumps(settings))
        if kind == "Dense":
            linear = torch.nn.Linear(settings["in_features"], settings["out_features"], bias=settings["bias"])
            weights = {f"linear.{name}": weight for name, weight in linear.state_dict().items()}
            safetensors.torch.save_file(weights, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 200} | (reading or {})))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts or {}))
    return folder


class Reference:
    """The hidden states of one text alone, without padding, and what is made of them; written from the definitions."""

    def __init__(self, folder: Path) -> None:
        is_t5 = "t5" in json.loads((folder / "config.json").read_text())["model_type"]
        loader = transformers.T5EncoderModel if is_t5 else transformers.AutoModel
        self.model = loader.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def hidden(self, ids: Sequence[int]) -> np.ndarray:
        """[tokens, size]"""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].double().numpy()

    def embedding(self, text: str) -> np.ndarray:
        mean = self.hidden(self.ids(text)).mean(axis=0)
        return mean / np.sqrt((mean**2).sum())


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[EncoderEngine]:
    made = Embedder(**options).start_embedder(ModelSource(str(folder), dtype="fp32"), cpus=1)
    assert isinstance(made, EncoderEngine)
    yield made
    asyncio.run(made.close())


def embed(folder: Path, texts: Sequence[str | Sequence[int]], **options: Any) -> np.ndarray:
    with engine(folder, **options) as made:
        return asyncio.run(made.embed(texts)).vectors


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(
    "encoder",
    [
        config(), config(transformers.MPNetConfig), config(transformers.XLMRobertaConfig),
        config(transformers.DistilBertConfig, dim=SIZE, n_heads=4, n_layers=2, hidden_dim=64), t5_config(),
        config(transformers.ModernBertConfig, global_attn_every_n_layers=2, local_attention=8),
        llama_config(vocab_size=300, hidden_size=SIZE),
    ],
    ids=lambda encoder: encoder.model_type,
)  # fmt: skip
def test_a_batch_gives_each_text_its_own_embedding(encoder: Any, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, encoder)
    reference = Reference(folder)
    vectors = embed(folder, TEXTS)
    assert vectors.dtype == np.float32
    expected = np.array([reference.embedding(text) for text in TEXTS])
    assert np.abs(vectors - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # texts differ, or the line above would say little


def weighted(hidden: np.ndarray) -> np.ndarray:
    weights = np.arange(1, len(hidden) + 1)[:, None]
    return (hidden * weights).sum(0) / weights.sum()


@pytest.mark.parametrize(
    ("settings", "pool"),
    [
        (pooled("cls_token"), lambda hidden: hidden[0]),
        (pooled("max_tokens"), lambda hidden: hidden.max(0)),
        (pooled("mean_tokens"), lambda hidden: hidden.mean(0)),
        (pooled("mean_sqrt_len_tokens"), lambda hidden: hidden.sum(0) / len(hidden) ** 0.5),
        (pooled("weightedmean_tokens"), weighted),
        (pooled("lasttoken"), lambda hidden: hidden[-1]),
        (pooled("mean_tokens", "cls_token"), lambda hidden: np.concatenate([hidden[0], hidden.mean(0)])),
        ({"embedding_dimension": SIZE, "pooling_mode": "cls", "include_prompt": True}, lambda hidden: hidden[0]),
        (
            {"embedding_dimension": SIZE, "pooling_mode": ["max", "cls"]},
            lambda hidden: np.concatenate([hidden.max(0), hidden[0]]),
        ),
        (pooled(), lambda hidden: hidden.mean(0)),
    ],
)
def test_poolings_are_what_their_names_say(settings: dict[str, Any], pool: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, parts=[("Pooling", settings)])
    reference = Reference(folder)
    expected = np.array([pool(reference.hidden(reference.ids(text))) for text in TEXTS])
    assert np.abs(embed(folder, TEXTS) - expected).max() < 1e-4  # of numbers that are not normalised: up to 20
    assert np.abs(expected).max() > 1


def test_dense_layers_come_after_the_pooling(tmp_path: Path) -> None:
    dense = {
        "in_features": SIZE,
        "out_features": 12,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    last = {
        "in_features": 12,
        "out_features": 7,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    parts = [("Pooling", pooled("mean_tokens")), ("Dense", dense), ("Dense", last), ("Normalize", {})]
    folder = save_encoder(tmp_path, parts=parts)
    reference = Reference(folder)
    one, two = (safetensors.torch.load_file(folder / f"{part}/model.safetensors") for part in ("2_Dense", "3_Dense"))
    for text, vector in zip(TEXTS, embed(folder, TEXTS), strict=True):
        mean = reference.hidden(reference.ids(text)).mean(0)
        inner = np.tanh(one["linear.weight"].numpy() @ mean + one["linear.bias"].numpy())
        expected = two["linear.weight"].numpy() @ inner
        assert np.abs(vector - expected / np.linalg.norm(expected)).max() < 1e-5


def test_a_plain_encoder_is_averaged_and_normalised(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, parts=None)
    expected = [Reference(folder).embedding(text) for text in TEXTS]
    assert np.abs(embed(folder, TEXTS) - np.array(expected)).max() < 1e-5


def test_texts_are_read_as_the_model_wants_them(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "q: ", "doc": "the sea: "}, "default_prompt_name": "doc"}
    folder = save_encoder(tmp_path, reading={"do_lower_case": True}, prompts=prompts)
    expected = Reference(folder).embedding("the sea: hello world")
    assert np.abs(embed(folder, ["Hello WORLD"])[0] - expected).max() < 1e-5


def test_token_ids_are_taken_as_they_are(bert: Path) -> None:
    ids = Reference(bert).ids(TEXTS[1])
    text, tokens, others = embed(bert, [TEXTS[1], ids, ids[1:-1]])
    assert np.abs(text - tokens).max() < 1e-6
    assert np.abs(text - others).max() > 1e-3


@pytest.mark.parametrize("kind", [transformers.XLMRobertaConfig, transformers.MPNetConfig, transformers.BertConfig])
def test_the_longest_text_is_the_longest_that_the_model_has_positions_for(kind: type, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, config(kind), reading={"max_seq_length": None})
    longest = 202 if kind is transformers.BertConfig else 200  # RoBERTa's kind begins to count at 2
    with engine(folder) as made:
        assert asyncio.run(made.embed([[5] * longest])).tokens == longest
        with pytest.raises(RequestError, match=rf"input\[1\] is too long: {longest + 1} tokens, .* takes {longest}"):
            asyncio.run(made.embed(["sea", [5] * (longest + 1)]))


def test_the_limit_is_the_models_own_or_that_of_the_config(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, reading={"max_seq_length": 8})
    for options, limit in (({}, 8), ({"max_length": 5}, 5), ({"max_length": 20}, 20)):
        with engine(folder, **options) as made:
            asyncio.run(made.embed([[5] * limit]))
            with pytest.raises(RequestError, match=f"takes {limit}"):
                asyncio.run(made.embed([[5] * (limit + 1)]))
    with pytest.raises(UserError, match=r"Embedder\.max_length = 203: .* at most 202"):
        embed(folder, ["sea"], max_length=203)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("WordWeights", {}), ("Pooling", pooled("mean_tokens"))], "a Transformer at '' and a Pooling are needed"),
        ([("Pooling", pooled("mean_tokens")), ("LSTM", {})], "LSTM is not supported after the Pooling"),
        ([("Pooling", {"pooling_mode": "median"})], "pooling 'median' is not supported (choices: cls, max, mean"),
        ([("Pooling", pooled("mean_tokens") | {"pooling_mode_attention": True})], "pooling 'pooling_mode_attention'"),
        ([("Pooling", pooled("mean_tokens") | {"include_prompt": False})], "include_prompt = false is not supported"),
        (
            [
                ("Pooling", pooled("mean_tokens")),
                ("Dense", {"in_features": SIZE, "out_features": 2, "bias": True, "activation_function": "x.Softplus"}),
            ],
            "activation 'Softplus' is not supported (choices: Identity, Tanh",
        ),
        (
            [
                ("Pooling", pooled("mean_tokens")),
                (
                    "Dense",
                    {
                        "use_residual": True,
                        "in_features": SIZE,
                        "out_features": SIZE,
                        "bias": True,
                        "activation_function": "x.Tanh",
                    },
                ),
            ],
            "a Dense module that is residual, or of tokens, is not supported",
        ),
        (
            [
                ("Pooling", pooled("mean_tokens")),
                ("Dense", {"in_features": 3, "out_features": 2, "bias": True, "activation_function": "x.Tanh"}),
            ],
            "the embedder cannot serve BertModel: RuntimeError: mat1 and mat2 shapes",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(parts: Any, said: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, parts=parts)
    with pytest.raises(UserError) as caught:
        embed(folder, ["sea"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_writes_text_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM, which writes text: serve it with Torch\(\)"):
        embed(save_model(tmp_path), ["sea"])


def test_requests_that_come_together_share_batches_of_like_length(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(bert)
    texts = [text for text in TEXTS for _ in range(5)]
    shapes: list[tuple[int, int, int]] = []  # rows, tokens of a row with its padding, tokens without padding
    forward = transformers.BertModel.forward

    def counting(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        shapes.append((*input_ids.shape, int(attention_mask.sum())))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)

    async def ask(made: EncoderEngine) -> list[np.ndarray]:
        return [made.vectors[0] for made in await asyncio.gather(*(made.embed([text]) for text in texts))]

    with engine(bert, max_batch=8) as made:
        monkeypatch.setattr(transformers.BertModel, "forward", counting)
        vectors = asyncio.run(ask(made))
        monkeypatch.undo()
    expected = {text: reference.embedding(text) for text in TEXTS}
    assert max(np.abs(v - expected[text]).max() for text, v in zip(texts, vectors, strict=True)) < 1e-5
    assert sum(rows for rows, _, _ in shapes) == len(texts)
    assert max(rows for rows, _, _ in shapes) <= 8
    assert len(shapes) <= len(texts) / 2
    assert all(rows * width < 2 * tokens for rows, width, tokens in shapes)


def test_a_short_request_does_not_wait_for_a_long_one(bert: Path) -> None:
    async def ask() -> tuple[str, str]:
        ended: list[str] = []

        async def one(name: str, texts: list[str]) -> None:
            await made.embed(texts)
            ended.append(name)

        long = asyncio.create_task(one("long", TEXTS * 50))
        await asyncio.sleep(0)
        await asyncio.gather(long, one("short", ["sea"]))
        return ended[0], ended[1]

    with engine(bert, max_batch=4) as made:
        assert asyncio.run(ask()) == ("short", "long")


class Watched:
    """What an engine computes: how many texts so far, and when it has begun."""

    def __init__(self, made: EncoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts, self.begun = 0, threading.Event()
        self.compute = made._encoder.vectors
        monkeypatch.setattr(made._encoder, "vectors", self.watch)

    def watch(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        self.texts += len(rows)
        self.begun.set()
        return self.compute(rows)


def test_a_request_that_nobody_waits_for_is_not_computed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        watched = Watched(made, monkeypatch)
        left = asyncio.create_task(made.embed(TEXTS * 100))
        assert await asyncio.to_thread(watched.begun.wait, 20)
        left.cancel()
        await asyncio.wait([left])
        await made.embed(["sea"])
        assert watched.texts < len(TEXTS) * 100

    with engine(bert, max_batch=1) as made:
        asyncio.run(ask())


def test_an_engine_that_fails_says_so_and_so_does_its_health(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: Any) -> Any:
        raise ValueError("a bit fell over")

    async def ask() -> None:
        made.check()
        monkeypatch.setattr(made._encoder, "vectors", broken)
        answers = await asyncio.gather(*(made.embed([text]) for text in TEXTS), return_exceptions=True)
        assert {str(answer) for answer in answers} == {"the embedder has stopped: a bit fell over"}
        with pytest.raises(RuntimeError, match="a bit fell over"):
            made.check()

    with engine(bert) as made:
        asyncio.run(ask())


def test_a_batch_without_memory_fails_alone(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        compute = made._encoder.vectors

        def small(rows: Sequence[Sequence[int]]) -> torch.Tensor:
            if max(map(len, rows)) > 100:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB")
            return compute(rows)

        monkeypatch.setattr(made._encoder, "vectors", small)
        long, short = await asyncio.gather(made.embed([[5] * 150]), made.embed(["sea"]), return_exceptions=True)
        assert "20 GiB" in str(long)
        assert short.tokens == 3  # type: ignore[union-attr]
        made.check()

    with engine(bert) as made:
        asyncio.run(ask())


def test_who_waits_when_the_engine_closes_is_told(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        watched = Watched(made, monkeypatch)
        waiting = asyncio.create_task(made.embed(TEXTS * 100))
        assert await asyncio.to_thread(watched.begun.wait, 20)
        await made.close()
        for request in (waiting, made.embed(["sea"])):
            with pytest.raises(RuntimeError, match="closed"):
                await request

    with engine(bert, max_batch=1) as made:
        asyncio.run(ask())


# The endpoint


class Endpoint:
    """The app over an encoder `mini` and a text model `tiny`, asked through OpenAI's own client or plain HTTP."""

    def __init__(self, encoder: EncoderEngine, writer: Any) -> None:
        app = api({"tiny": []}, {"tiny": writer.generate}, {"mini": encoder.embed})
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta", timeout=60)

    def ask(self, call: Callable[[openai.AsyncOpenAI], Any]) -> Any:
        client = openai.AsyncOpenAI(base_url="http://manta/v1", api_key="none", max_retries=0, http_client=self.http)

        async def run() -> Any:
            return await call(client)

        return asyncio.run(run())

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        response: httpx.Response = asyncio.run(self.http.post(path, json=body))
        return response


@pytest.fixture(scope="module")
def endpoint(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    writer = Torch(max_length=64).start(ModelSource(str(save_model(tmp_path_factory.mktemp("llama"))), dtype="fp32"), 1)
    with engine(bert) as encoder:
        yield Endpoint(encoder, writer)
    asyncio.run(writer.close())


def test_openais_client_gets_the_embeddings_in_either_format(endpoint: Endpoint, bert: Path) -> None:
    reference = Reference(bert)
    expected = np.array([reference.embedding(text) for text in TEXTS])
    for encoding in ({}, {"encoding_format": "float"}):  # it asks for base64 by itself
        answer = endpoint.ask(lambda client, e=encoding: client.embeddings.create(model="mini", input=TEXTS, **e))
        assert [row.index for row in answer.data] == list(range(len(TEXTS)))
        assert np.abs(np.array([row.embedding for row in answer.data]) - expected).max() < 1e-5
        assert answer.model == "mini"
        assert (
            answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(reference.ids(text)) for text in TEXTS)
        )
    raw = endpoint.post("/v1/embeddings", {"model": "mini", "input": "sea", "encoding_format": "base64"}).json()
    row = raw["data"][0]
    assert row["object"] == "embedding"
    assert np.abs(np.frombuffer(base64.b64decode(row["embedding"]), "<f4") - expected[TEXTS.index("sea")]).max() < 1e-5


def test_texts_and_token_ids_alone_and_in_lists_mean_the_same(endpoint: Endpoint, bert: Path) -> None:
    ids = Reference(bert).ids("the sea")
    forms: list[Any] = ["the sea", ["the sea"], ids, [ids]]
    answers = [endpoint.ask(lambda client, f=form: client.embeddings.create(model="mini", input=f)) for form in forms]
    assert [len(answer.data) for answer in answers] == [1, 1, 1, 1]
    assert {answer.usage.prompt_tokens for answer in answers} == {len(ids)}
    vectors = np.array([answer.data[0].embedding for answer in answers])
    assert np.abs(vectors - vectors[0]).max() < 1e-6


def test_fewer_dimensions_are_the_first_ones_at_length_1(endpoint: Endpoint) -> None:
    def ask(**options: int) -> np.ndarray:
        answer = endpoint.ask(lambda client: client.embeddings.create(model="mini", input="sea", **options))
        return np.array(answer.data[0].embedding)

    whole, short, same = ask(), ask(dimensions=5), ask(dimensions=SIZE)
    assert short.shape == (5,)
    assert np.abs(short - whole[:5] / np.linalg.norm(whole[:5])).max() < 1e-6
    assert np.abs(same - whole).max() < 1e-6


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"input": ""}, 400, "input", "input is empty"),
        ({"input": []}, 400, "input", "input is empty"),
        ({"input": ["sea", ""]}, 400, "input", "input[1] is empty"),
        ({"input": [[5], []]}, 400, "input", "input[1] is empty"),
        ({"input": "sea " * 300}, 400, "input", "input is too long: 302 tokens, and this model takes 200"),
        ({"input": ["sea"] * 2049}, 400, "input", "at most 2048"),
        ({"input": [5, 300]}, 400, "input", "300 is not a token of this model (0 to 299)"),
        ({"input": [5, -1]}, 400, "input", "-1 is not a token"),
        ({"input": 5}, 400, "input", "must be a string, a list of strings, token ids, or a list of lists of token ids"),
        ({"input": ["sea", 5]}, 400, "input", "must be a string"),
        ({"input": {"text": "sea"}}, 400, "input", "must be a string"),
        ({"input": None}, 400, "input", "must be a string"),
        ({"dimensions": SIZE + 1}, 400, "dimensions", f"dimensions = {SIZE + 1}: this model has 1 to {SIZE}"),
        ({"dimensions": 0}, 400, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"truncate": "END"}, 400, "truncate", "not supported"),
        ({"model": "nope"}, 404, "model", "there are: tiny, mini"),
        ({"model": "tiny"}, 400, "model", "model 'tiny' makes text, not embeddings; models for embeddings: mini"),
    ],
)
def test_mistakes_get_openais_envelope(
    endpoint: Endpoint, body: dict[str, Any], status: int, param: str, said: str
) -> None:
    response = endpoint.post("/v1/embeddings", {"model": "mini", "input": "sea", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_embedding_model_writes_no_text_and_says_which_do(endpoint: Endpoint, stream: bool) -> None:
    said = "model 'mini' makes embeddings, not text; models for text: tiny"
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.BadRequestError, match=said):
        endpoint.ask(lambda client: client.chat.completions.create(model="mini", messages=messages, stream=stream))
    with pytest.raises(openai.BadRequestError, match=said):
        endpoint.ask(lambda client: client.completions.create(model="mini", prompt="hello", stream=stream))


def test_models_lists_both_kinds(endpoint: Endpoint) -> None:
    assert [model.id for model in endpoint.ask(lambda client: client.models.list()).data] == ["tiny", "mini"]
    assert endpoint.ask(lambda client: client.models.retrieve("mini")).id == "mini"


def test_an_embedding_model_takes_no_adapters() -> None:
    source = ModelSource("x")
    assert ServeConfig(models=(ServedModel(id="mini", source=source, engine=Embedder(max_batch=4)),))
    with pytest.raises(UserError, match="a model that makes embeddings takes none"):
        ServedModel(id="mini", source=source, engine=Embedder(), adapters=("outputs/*",))


@pytest.mark.cluster
def test_it_is_served_on_ray_beside_a_text_model(bert: Path, tmp_path: Path) -> None:
    port, llama = free_port(), save_model(tmp_path / "llama")
    (tmp_path / "config.py").write_text(
        f"""from serve import *
text = ServedModel(id="tiny", source=ModelSource({str(llama)!r}), cpus=0.5)
mini = ServedModel(id="mini", source=ModelSource({str(bert)!r}, dtype="fp32"), engine=Embedder(), cpus=0.5)
config = ServeConfig(models=(text, mini), port={port})
"""
    )
    shell = Shell({**os.environ, "HOME": str(tmp_path), "RAY_ADDRESS": "local"})
    process = shell.start(sys.executable, "-m", "ui.cli", "serve", str(tmp_path / "config.py"))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def answers() -> bool:
        assert process.poll() is None
        try:
            return {model.id for model in client.models.list()} == {"tiny", "mini"}
        except (openai.APIConnectionError, openai.APIStatusError):
            return False

    try:
        until(answers, seconds=120, what="the models")
        answer = client.embeddings.create(model="mini", input=TEXTS)
        reference = Reference(bert)
        expected = np.array([reference.embedding(text) for text in TEXTS])
        assert np.abs(np.array([row.embedding for row in answer.data]) - expected).max() < 1e-5
        assert client.completions.create(model="tiny", prompt="hello", max_tokens=3).usage.completion_tokens
        with pytest.raises(openai.BadRequestError, match="input is too long: 302 tokens, and this model takes 200"):
            client.embeddings.create(model="mini", input="sea " * 300)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        kill(process)
