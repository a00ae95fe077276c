"""What a finished model is worth: its loss on held-out rows, and its answers to them against the rows' own.

A run that ends calls `score`, `manta evaluate` calls `evaluate_runs`. Only what these two share, at the end of the file,
meets Ray.
"""

import hashlib
import itertools
import json
import logging
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, GenerationConfig

from finetune import model as models
from finetune.config import FinetuneConfig, Scoring
from finetune.learner import Learner
from finetune.logprobs import usual_attention
from finetune.loop import autocast
from finetune.tokenise import Examples, prepare
from plugins import cluster
from plugins.data import Csv, Json, Jsonl, Parquet, Source
from plugins.engines.text import Voice
from plugins.loading import load_config
from plugins.model_files import check_model_files
from plugins.pretrained import load
from plugins.runs import CONFIG, finished
from plugins.spec import UserError
from plugins.template import Tokenizer
from plugins.types import IGNORE

log = logging.getLogger(__name__)
T = TypeVar("T")


# Questions and answers


@dataclass(frozen=True)
class Question:
    """A held-out row as the model meets it when it is served: token ids to go on from, and what the row itself says."""

    prompt: list[int]
    reference: str


def questions(examples: Examples, tokenizer: Tokenizer, *, rows: int) -> list[Question]:
    """The first `rows` of the examples, in a random order that is always the same, as questions.

    The reference is the last stretch of labels that has anything to read in it, the prompt all that stands before. A row
    that is learned from its first token has no prompt and is left out. Raises UserError where all of them are.
    """
    found = _questions(examples, tokenizer, rows)
    if not found:
        raise UserError(
            f"scoring: not one of the {len(examples)} held-out rows has a prompt before what is learned of it "
            "(Completion learns all of a row), so the model cannot be asked anything"
        )
    return found


def _questions(examples: Examples, tokenizer: Tokenizer, rows: int) -> list[Question]:
    if examples.pairs:
        return []
    order = np.random.default_rng(0).permutation(len(examples))
    asked = (_question(*examples[int(index)][0], tokenizer) for index in order)
    return list(itertools.islice((question for question in asked if question is not None), rows))


def _question(tokens: NDArray[np.int32], labels: NDArray[np.int32], tokenizer: Tokenizer) -> Question | None:
    edges = np.flatnonzero(np.diff(labels != IGNORE, prepend=False, append=False))
    for start, stop in reversed(edges.reshape(-1, 2).tolist()):
        reference = _text(tokenizer, tokens[start:stop].tolist())
        if reference.strip():
            return Question(tokens[:start].tolist(), reference) if start else None
    return None


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.no_grad()
def answers(
    model: torch.nn.Module, tokenizer: Tokenizer, prompts: Sequence[list[int]], *, max_tokens: int, batch_size: int
) -> list[str]:
    """What `model` says after each prompt, always taking the likeliest token; without special tokens.

    `model` is PEFT's or transformers', whole on this rank; it is left in the mode in which it came. An answer ends where
    a served one would, after `max_tokens`, or with the model's last position. Prompts of like length share a batch.
    """
    # LoRA's layers are inside the base: its own generate goes through them.
    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    ends = sorted(Voice.of(tokenizer, base.generation_config.eos_token_id).ends)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def room(index: int) -> int:
        return int(min(max_tokens, positions - len(prompts[index])))

    said = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with _greedy(model, base, ends):
        for tokens, group in itertools.groupby(by_length, key=room):
            for batch in _portions(list(group), batch_size):
                for index, new in zip(batch, _generate(base, [prompts[index] for index in batch], tokens), strict=True):
                    answer = itertools.takewhile(lambda token: token not in ends, new)
                    said[index] = _text(tokenizer, list(answer))
    return said


def _portions(members: list[T], size: int) -> Iterator[list[T]]:
    return (members[first : first + size] for first in range(0, len(members), size))


@contextmanager
def _greedy(model: torch.nn.Module, base: Any, ends: list[int]) -> Iterator[None]:
    """Within it the model neither drops out nor samples, whatever its generation config asks for."""
    training, settings = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    try:
        yield
    finally:
        base.generation_config = settings
        model.train(training)


def _generate(base: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The new tokens after each prompt, padded at the end. Prompts are padded at the left: they all end together."""
    device, length = next(base.parameters()).device, max(map(len, prompts))
    ids = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    made = base.generate(input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_tokens)
    new: list[list[int]] = made[:, length:].tolist()
    return new


# Scores

SCORES = ("exact_match", "rouge1", "rouge2", "rougeL")
# Written without spaces between words: every character counts as one.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


def compare(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How near the answers are to the references: the mean over rows of `SCORES`, from 0 to 1. There is at least one row.

    An exact match is one of all characters but the spaces around. ROUGE-1, -2 and -L (Lin 2004, aclanthology.org/W04-1013)
    are F-measures of shared words, pairs of words, and of the longest common subsequence of words.
    """
    from torchmetrics.functional.text.rouge import rouge_score

    same = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    rouge = rouge_score(
        list(answers),
        list(references),
        normalizer=_normal,
        tokenizer=_words(),
        rouge_keys=("rouge1", "rouge2", "rougeL"),
    )
    return {"exact_match": sum(same) / len(same)} | {
        name: float(rouge[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")
    }


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words() -> Callable[[str], list[str]]:
    """Words of letters and digits of any script; of ASCII text the same as ROUGE's own, which knows no other.

    A text that has none, such as a smiley, counts by what stands between its spaces.
    """
    import regex  # unlike `re` it knows scripts, and that vowel signs belong to a word

    word = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+", regex.VERSION1)
    return lambda text: word.findall(text) or text.split()


# Finished runs

EVALUATION = "evaluation.json"
HELD_OUT = "held_out"  # the run's own rows, as the key of an entry of evaluation.json
SOURCES: dict[str, Callable[[str], Source]] = {
    ".csv": Csv,
    ".json": Json,
    ".jsonl": Jsonl,
    ".parquet": Parquet,
}


@dataclass(frozen=True)
class Evaluation:
    """What a model made of `rows` rows, of which it was asked `asked`.

    `loss` is the objective's; `perplexity` that of a labelled token, None where the loss is not of tokens; `scores` are
    those of `compare`, none where no row could be asked. `digest` tells rows apart: losses compare where it is the same.
    """

    name: str
    rows: int
    asked: int
    loss: float
    perplexity: float | None
    digest: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A model that is to be evaluated, and its rows. `trained` is the run directory, None for the base itself."""

    name: str
    trained: Path | None
    config: FinetuneConfig
    examples: Examples
    asked: list[Question]
    scoring: Scoring

    @property
    def digest(self) -> str:
        rows = (self.examples.starts, self.examples.tokens, self.examples.labels)
        return hashlib.sha256(b"".join(part.tobytes() for part in rows)).hexdigest()[:16]

    @property
    def base(self) -> "Subject":
        name = "/".join(Path(self.config.model.path).parts[-2:])
        return replace(self, name=f"base {name}", trained=None)


def evaluate_runs(
    runs: Sequence[Path],
    *,
    data: Path | None = None,
    rows: int | None = None,
    max_tokens: int | None = None,
    base: bool = False,
) -> list[Evaluation]:
    """Evaluate finished runs one after another, each on one worker such as it was trained with, on Ray.

    The rows are those that each run held out, or those of file `data`. `rows` and `max_tokens`: as in Scoring; None is
    what the run says. `base` adds the models that the runs began with. Each run's result is also kept in its directory, in
    evaluation.json: an entry for its own rows and one for each file, the newest of each.

    Raises UserError before anything starts for what is wrong with a run, the file or the size of the cluster.
    """
    import ray

    subjects: list[Subject] = []
    for run in runs:
        subject = prepare_run(run, data=data, rows=rows, max_tokens=max_tokens)
        if base and not any(_same_model(subject.base, other) for other in subjects):
            subjects.append(subject.base)
        subjects.append(subject)
    found = []
    with cluster.connection():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for subject in subjects:
            _check_room(subject, nodes)
        for subject in subjects:
            asked, most = _by_length(subject.asked), subject.scoring.max_tokens
            evaluation = measure(subject, _on_ray(subject.config, subject.trained, subject.examples, asked, most))
            if subject.trained is not None:
                keep(evaluation, subject, HELD_OUT if data is None else str(data.expanduser().absolute()))
            found.append(evaluation)
    return found


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """That with the lowest loss; None where there are not two, or where their losses are not of the same rows."""
    if len(evaluations) < 2 or len({evaluation.digest for evaluation in evaluations}) > 1:
        return None
    return min(evaluations, key=lambda evaluation: evaluation.loss)


def prepare_run(run: Path, *, data: Path | None, rows: int | None, max_tokens: int | None) -> Subject:
    """All that evaluating the run in directory `run` takes. Raises UserError for what is not there."""
    manifest = finished(run)
    config = load_config(run / CONFIG, FinetuneConfig, manifest.overrides)
    config = replace(config, model=replace(config.model, path=manifest.base, revision=manifest.revision))
    check_model_files(config.model, "model.path")
    tokenizer = models.load_tokenizer(config.model)
    log.info("run %s: reading the rows", run.name)
    if data is None and config.data.validation == 0:
        raise UserError(
            f"run {run.name!r} held no rows out (data.validation = {config.data.validation}): name rows with --data FILE"
        )
    examples = _held_out(config, tokenizer, data)
    told = config.scoring or Scoring()
    scoring = Scoring(
        rows=told.rows if rows is None else rows, max_tokens=told.max_tokens if max_tokens is None else max_tokens
    )
    asked = _questions(examples, tokenizer, scoring.rows)
    return Subject(run.name, run.absolute(), config, examples, asked, scoring)


def _held_out(config: FinetuneConfig, tokenizer: Tokenizer, file: Path | None) -> Examples:
    source = config.data.validation if file is None else _source_of(file)
    if isinstance(source, float):
        return prepare(config.data, tokenizer, seed=config.train.seed).held_out
    # The rows that the run knows have been seen to fit into the model; these may be longer.
    positions = getattr(load(AutoConfig, config.model).get_text_config(), "max_position_embeddings", None)
    longest = min(config.data.max_length, positions or config.data.max_length)
    only = replace(config.data, source=source, validation=0.0, max_length=longest, packing=False, streaming=False)
    prepared = prepare(only, tokenizer, seed=config.train.seed)
    if said := prepared.counts.words(longest):
        log.info("%s", said)
    return prepared.train


def _source_of(file: Path) -> Source:
    if file.suffix not in SOURCES:
        raise UserError(f"--data {file}: the name must end in one of {', '.join(SOURCES)}")
    return SOURCES[file.suffix](str(file))


def _same_model(one: Subject, other: Subject) -> bool:
    return (one.trained, one.config.model, one.digest) == (other.trained, other.config.model, other.digest)


def work(
    config: FinetuneConfig, trained: Path | None, examples: Examples | None, prompts: list[list[int]], max_tokens: int
) -> Iterator[dict[str, float] | list[str]]:
    """The worker's part, in pieces as they come: what Learner.evaluate says of `examples`, if there are any, then the
    answers to the prompts in their order."""
    learner = Learner(config, trained=trained)
    if examples is not None:
        yield learner.evaluate(examples)
    tokenizer = models.load_tokenizer(config.model)
    for portion in _portions(prompts, config.train.batch_size):
        with usual_attention(learner.model), autocast(learner.device, learner.dtype):
            texts = answers(learner.model, tokenizer, portion, max_tokens=max_tokens, batch_size=len(portion))
        yield texts


def _by_length(asked: list[Question]) -> list[Question]:
    """In the order in which they are asked: those of like length share a batch."""
    return sorted(asked, key=lambda question: len(question.prompt))


def _on_ray(
    config: FinetuneConfig, trained: Path | None, examples: Examples | None, asked: list[Question], max_tokens: int
) -> Iterator[dict[str, float] | list[str]]:
    """`work` in a task of Ray that has what one worker of the run had."""
    import ray

    scaling = config.scaling
    task = ray.remote(num_cpus=scaling.cpus, num_gpus=scaling.gpus, max_retries=0)(work)
    pieces: Any = task.remote(config, trained, examples, [question.prompt for question in asked], max_tokens)
    try:
        for piece in pieces:
            yield ray.get(piece)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise


def score(config: FinetuneConfig, run: Path, held_out: Examples, tokenizer: Tokenizer) -> dict[str, float]:
    """What `config.scoring` asks for of the weights in directory `run`, on the cluster that this process is connected to."""
    assert config.scoring is not None
    asked = _by_length(questions(held_out, tokenizer, rows=config.scoring.rows))
    log.info("run %s: asking the model %d held-out rows", config.name, len(asked))
    return compare(
        _all_said(config.name, asked, _on_ray(config, run, None, asked, config.scoring.max_tokens)),
        [question.reference for question in asked],
    )


def _all_said(name: str, asked: list[Question], pieces: Iterator[Any]) -> list[str]:
    """All answers, with progress as they come."""
    said: list[str] = []
    told = time.monotonic()
    for texts in pieces:
        said += texts
        if time.monotonic() - told > 5:
            log.info("%s: %d of %d rows answered", name, len(said), len(asked))
            told = time.monotonic()
    return said


def _check_room(subject: Subject, nodes: Sequence[dict[str, float]]) -> None:
    scaling = subject.config.scaling
    if not cluster.room(nodes, cpus=scaling.cpus, gpus=scaling.gpus):
        asks = f"cpus = {scaling.cpus:g}" + (f" and gpus = {scaling.gpus:g}" if scaling.gpus else "")
        raise UserError(f"{subject.name}: its scaling asks for {asks}, and no node has so much ({cluster.size(nodes)})")


def measure(subject: Subject, pieces: Iterator[dict[str, float] | list[str]]) -> Evaluation:
    """What the pieces of `work` come to."""
    log.info("%s: the loss on %d rows", subject.name, len(subject.examples))
    found = next(pieces)
    assert isinstance(found, dict)
    asked = _by_length(subject.asked)
    said = _all_said(subject.name, asked, pieces)
    return Evaluation(
        name=subject.name,
        rows=len(subject.examples),
        asked=len(said),
        loss=found["loss"],
        perplexity=found.get("perplexity"),
        digest=subject.digest,
        scores=compare(said, [question.reference for question in asked]) if said else {},
    )


def keep(evaluation: Evaluation, subject: Subject, key: str) -> None:
    """Put the evaluation into the run's evaluation.json, in place of an older one of the same rows."""
    assert subject.trained is not None
    path = subject.trained / EVALUATION
    try:
        entries = json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    flat = {name: value for name, value in asdict(evaluation).items() if name not in ("name", "scores")}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    entries[key] = flat | evaluation.scores | {"max_tokens": subject.scoring.max_tokens, "created": when}
    partial = path.with_name(f".{EVALUATION}.partial")
    partial.write_text(json.dumps(entries, indent=2) + "\n")
    partial.replace(path)
