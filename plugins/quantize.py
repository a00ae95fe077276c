"""A model -> a directory of the same model with smaller weights, and what that costs: size, perplexity, tokens/s."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plugins.cluster import PROJECT
from plugins.data import Chat, Completion, DataProcessor, Instruct, Jsonl, processed
from plugins.engines import SPECS, Quantizer
from plugins.measure import Measured, Text, measure, python_of
from plugins.model_files import OPENVINO, WEIGHTS, check_model_files, quantization
from plugins.new_directory import check_free, whole
from plugins.pretrained import directory_of, load
from plugins.spec import UserError, choices
from plugins.template import PLAIN, Tokenizer
from plugins.types import Example, ModelSource

log = logging.getLogger(__name__)

HELD_OUT = PROJECT / "scripts/demo_base/heldout.jsonl"
TOKENS, LONGEST = 8192, 512  # of all texts together at most, and of one that is read as a whole
SHORTEST = 2  # the first token has no probability
SHAREGPT = Chat(messages="conversations", role="from", content="value", loss="all")
# What of a row makes it such a text.
PROCESSORS: Mapping[str, DataProcessor] = {
    "messages": Chat(loss="all"),
    "conversations": SHAREGPT,
    "instruction": Instruct(),
    "text": Completion(),
}


@dataclass(frozen=True)
class Model:
    """One of the two: `size` of its weights' files in bytes."""

    size: int
    measured: Measured


@dataclass(frozen=True)
class Comparison:
    """The original beside what was made of it, both as served by `engine`. `tokens`: of the texts that both have read."""

    engine: str
    original: Model
    quantized: Model
    tokens: int


def quantizer(engine: str, weights: str) -> Quantizer:
    """The spec of the engine that the user calls so. Raises UserError where it does not quantise, or not to `weights`."""
    known: dict[str, Any] = {spec.__name__.lower(): spec for spec in SPECS if hasattr(spec, "quantized")}
    if engine not in known:
        raise UserError(f"engine = {engine!r}: {choices(engine, known)}")
    found: Quantizer = known[engine]()
    if weights not in found.quantized:
        raise UserError(f"weights = {weights!r} for {engine}: {choices(weights, found.quantized)}")
    return found


def quantize(
    source: ModelSource, spec: Quantizer, weights: str, directory: Path, text: Path | None = None
) -> Comparison:
    """Write `source` with such weights to the new `directory`, once it has been served from there and measured.

    `text`: plain text, or .jsonl with conversations, instructions or texts, for the perplexity; None is rows that come
    with the project. Raises UserError for what is wrong with any of them.
    """
    check_free(directory, "to")
    python_of(spec)  # or what has been written could not be measured
    check_model_files(source, "model", (*WEIGHTS, OPENVINO))
    model = directory_of(source)
    check_model_files(replace(source, path=str(model)), "model", (*WEIGHTS, OPENVINO))  # what came from the hub too
    if by := quantization(model):
        raise UserError(f"model = {source.path!r}: its weights are quantised already, by {by}")
    source = replace(source, path=str(model), revision=None)
    texts = _texts(text or HELD_OUT, source)
    with whole(directory) as partial:
        log.info("quantising")
        spec.quantize(source, weights, partial)
        log.info("measuring the original")
        original = Model(_size(model), measure(spec, source, texts))
        log.info("measuring the quantised model")
        quantized = Model(_size(partial), measure(spec, replace(source, path=str(partial)), texts))
    return Comparison(type(spec).__name__, original, quantized, sum(map(len, texts)))


def _size(model: Path) -> int:
    """Of the files that are read: where there are weights in two formats, of the first."""
    found = (list(model.glob(pattern)) for pattern in ("openvino_model.bin", *WEIGHTS))
    return sum(file.stat().st_size for file in next(filter(None, found)))


def _texts(file: Path, source: ModelSource) -> list[Text]:
    """The beginning of what is in `file`, in pieces that the model reads as a whole."""
    from transformers import AutoConfig, AutoTokenizer  # the command line waits for it only here

    tokenizer = load(AutoTokenizer, source)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN
    longest = getattr(load(AutoConfig, source).get_text_config(), "max_position_embeddings", None) or LONGEST
    size = min(LONGEST, longest)
    pieces = (tuple(ids[at : at + size]) for ids in _tokenised(file, tokenizer) for at in range(0, len(ids), size))
    found: list[Text] = []
    left = TOKENS
    for piece in pieces:
        if len(piece) >= SHORTEST:
            found.append(piece[:left])
            left -= len(piece)
        if left < SHORTEST:
            break
    if not found:
        raise UserError(f"text = {str(file)!r}: there is no text in it")
    return found


def _tokenised(file: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if file.suffix == ".jsonl":
        for place, row in Jsonl(str(file)).read():
            if example := _example(row, tokenizer, place):
                yield example.input_ids
        return
    try:
        yield list(tokenizer(file.expanduser().read_text(), verbose=False)["input_ids"])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text = {str(file)!r} cannot be read: {error}") from error


def _example(row: Mapping[str, Any], tokenizer: Tokenizer, place: str) -> Example | None:
    kind = next((field for field in PROCESSORS if field in row), None)
    if kind is None:
        raise UserError(f"{place}: a row needs one of the fields {', '.join(PROCESSORS)}")
    example = processed(place, row, PROCESSORS[kind], tokenizer)
    assert example is None or isinstance(example, Example)
    return example
