"""Finished models are asked and scored: questions, greedy answers, exact match and ROUGE, and runs side by side."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
import transformers
from test_cluster import Shell, alone, cluster, home  # noqa: F401  # the fixtures

from finetune import evaluate
from finetune.loop import autocast
from finetune.tokenise import Examples
from plugins.data import Chat, Completion, Instruct
from plugins.runs import Run
from plugins.spec import UserError
from plugins.types import Example, RunManifest
from ui.cli import main, run_state
from ui.client import Platform

CPU = torch.device("cpu")
TOKENIZER = small_models.tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def examples_of(processor: Any, rows: list[dict[str, Any]]) -> Examples:
    return Examples.of(processor(row, TOKENIZER) for row in rows)


# Questions


def test_a_question_is_the_row_up_to_its_last_answer() -> None:
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello world"},
                        {"role": "user", "content": "and 東京?"}, {"role": "assistant", "content": "naïve 🙂"}]}  # fmt: skip
    [asked] = evaluate.questions(examples_of(Chat(), [row]), TOKENIZER, rows=5)
    assert asked.reference.strip() == "naïve 🙂"
    text = TOKENIZER.decode(asked.prompt)
    assert text.endswith("<|im_start|>user\nand 東京?<|im_end|>\n<|im_start|>assistant\n")
    assert "hello world" in text


def test_an_end_that_stands_alone_is_no_answer() -> None:
    row = Example([5, 6, 7, 8, END], [-100, 6, 7, -100, END])
    [asked] = evaluate.questions(Examples.of([row]), TOKENIZER, rows=1)
    assert asked == evaluate.Question([5], TOKENIZER.decode([6, 7]))


def test_the_rows_asked_are_always_the_same_and_of_all_parts() -> None:
    examples = examples_of(Instruct(), [{"instruction": f"say {i}", "output": str(i)} for i in range(50)])
    ten, twenty = (evaluate.questions(examples, TOKENIZER, rows=rows) for rows in (10, 20))
    assert twenty[:10] == ten
    numbers = [int(question.reference) for question in twenty]
    assert min(numbers) < 15
    assert max(numbers) > 35
    assert len(evaluate.questions(examples, TOKENIZER, rows=1000)) == 50


def test_rows_without_a_prompt_cannot_be_asked() -> None:
    plain = examples_of(Completion(), [{"text": "hello world"}] * 3)
    with pytest.raises(UserError, match=r"^scoring: not one of the 3 held-out rows has a prompt") as caught:
        evaluate.questions(plain, TOKENIZER, rows=2)
    assert "\n" not in str(caught.value)


# Answers


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base with a LoRA adapter that drops out, in training mode, in fp32."""
    folder = tmp_path_factory.mktemp("tuned")
    base = small_models.save_model(folder / "base")
    run = small_models.save_lora_run(folder / "run", base, lora_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, run / "adapter", is_trainable=True).train()


PROMPTS = [
    TOKENIZER(text)["input_ids"] for text in ("the quick brown fox", "hello", "a question about 東京 " * 4, "one")
]


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from a forward of its own over one row."""
    model.eval()
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    model.train()
    return ids[len(prompt) :]


def test_an_answer_does_not_depend_on_its_batch(tuned: Any) -> None:
    expected = [TOKENIZER.decode(by_hand(tuned, prompt, 12)) for prompt in PROMPTS]
    for batch_size in (1, 3, 4):
        assert evaluate.answers(tuned, TOKENIZER, PROMPTS, max_tokens=12, batch_size=batch_size) == expected


def test_the_model_is_left_as_it_was_and_its_own_generation_settings_do_not_count(tuned: Any) -> None:
    plain = evaluate.answers(tuned, TOKENIZER, PROMPTS, max_tokens=12, batch_size=4)
    theirs = transformers.GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=4)
    base = tuned.get_base_model()
    before, base.generation_config = base.generation_config, theirs
    try:
        assert evaluate.answers(tuned, TOKENIZER, PROMPTS, max_tokens=12, batch_size=4) == plain
        assert base.generation_config is theirs
    finally:
        base.generation_config = before
    assert tuned.training
    assert all(module.training for module in tuned.modules())
    tuned.eval()
    evaluate.answers(tuned, TOKENIZER, PROMPTS[:1], max_tokens=1, batch_size=1)
    assert not tuned.training
    tuned.train()
    assert all(parameter.grad is None for parameter in tuned.parameters())


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_with_its_turn_or_with_eos(tmp_path: Path, end: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(small_models.save_model(tmp_path))
    model.generation_config.eos_token_id = None
    free = by_hand(model, PROMPTS[0], 8)
    last = next(index for index in range(3, 8) if free[index] not in free[:index])
    head, end_id = model.get_output_embeddings().weight, TOKENIZER.convert_tokens_to_ids(end)
    with torch.no_grad():  # where it said the one token it now ends
        head[end_id], head[free[last]] = head[free[last]].clone(), 0
    [answer, _] = evaluate.answers(model, TOKENIZER, PROMPTS[:2], max_tokens=8, batch_size=2)
    assert answer == TOKENIZER.decode(free[:last])


def test_an_answer_stops_at_the_models_last_position() -> None:
    """GPT-2 learns a vector for each position: one more would be an error."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=20, initializer_range=1.0
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    prompts = [[3 + i % 7 for i in range(length)] for length in (5, 15, 19)]
    said = evaluate.answers(model, TOKENIZER, prompts, max_tokens=8, batch_size=3)
    assert said == [
        TOKENIZER.decode(by_hand(model, prompt, count), skip_special_tokens=True)
        for prompt, count in zip(prompts, (8, 5, 1), strict=True)
    ]


def test_a_frozen_base_in_bf16_answers_under_autocast(tuned: Any, tmp_path: Path) -> None:
    base = small_models.save_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.bfloat16, torch.float32}
    examples = examples_of(Instruct(), [{"instruction": f"say {i}", "output": f"fox {i}"} for i in range(5)])
    asked = evaluate.questions(examples, TOKENIZER, rows=5)
    with autocast(CPU, torch.bfloat16):
        said = evaluate.answers(model, TOKENIZER, [one.prompt for one in asked], max_tokens=6, batch_size=2)
    assert evaluate.compare(said, [one.reference for one in asked]).keys() == set(evaluate.SCORES)
    assert {parameter.dtype for parameter in model.parameters()} == kinds


# Scores


@pytest.mark.parametrize(
    ("answer", "reference", "rouge1", "rouge2", "rouge_l"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 4 / 6, 1 / 5, 4 / 6),
        ("police kill the gunman", "the gunman police kill", 1, 2 / 3, 1 / 2),
        ("A cat, a CAT!", "a cat", 2 * (1 / 2) / (1 / 2 + 1), 2 * (1 / 3) / (1 / 3 + 1), 2 * (1 / 2) / (1 / 2 + 1)),
        ("no word in common", "other things", 0, 0, 0),
        ("", "something", 0, 0, 0),
        ("今天天气很好。", "今天天气不好", 5 / 6, 3 / 5, 5 / 6),  # character by character
        ("Кот спит дома", "кот ест дома", 2 / 3, 0, 2 / 3),
        ("मेरा नाम राम है", "मेरा नाम श्याम है", 3 / 4, 1 / 3, 3 / 4),  # vowel signs belong to their words
        ("สวัสดีครับ", "สวัสดีครับ", 1, 1, 1),
        ("使用GPU训练", "使用 gpu 訓練", 3 / 5, 2 / 4, 3 / 5),  # 使 用 gpu 训 练
        ("CAFÉ", "cafe\u0301", 1, 0, 1),
        ("🙂", "🙂", 1, 0, 1),
    ],
)  # fmt: skip
def test_rouge_by_hand(answer: str, reference: str, rouge1: float, rouge2: float, rouge_l: float) -> None:
    scores = evaluate.compare([answer], [reference])
    assert [scores[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([rouge1, rouge2, rouge_l])


def test_scores_are_means_over_rows_and_spaces_around_do_not_count() -> None:
    scores = evaluate.compare([" fox 1\n", "fox 2", "Fox 3", ""], ["fox 1", "fox 3", "fox 3", "x"])
    assert scores == pytest.approx({"exact_match": 1 / 4, "rouge1": 2.5 / 4, "rouge2": 2 / 4, "rougeL": 2.5 / 4})


# Finished runs


def save_run(project: Path, name: str, *overrides: str, seed: int = 1, config: str | None = None) -> Path:
    """A finished LoRA run as `manta finetune` leaves it."""
    run = small_models.save_lora_run(project / "outputs" / name, project / "base", seed=seed)
    text = (
        "from finetune import *\n"
        f"config = FinetuneConfig(name='x', model=ModelSource({str(project / 'base')!r}, dtype='fp32'),\n"
        f"    data=Data(source=Jsonl({str(project / 'rows.jsonl')!r}), processor=Instruct(), validation=0.25),\n"
        "    method=Lora(rank=4, alpha=8), train=Train(batch_size=4), scoring=Scoring(rows=6, max_tokens=5))\n"
    )
    (run / "config.py").write_text(config or text)
    manifest = {"name": name, "base": str(project / "base"), "revision": None, "method": "lora", "created": "",
                "seconds": 1, "steps": 1, "metrics": {"loss": 1.0}, "overrides": list(overrides)}  # fmt: skip
    (run / "run.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, rows, and where the user stands."""
    small_models.save_model(tmp_path / "base")
    rows = [{"instruction": f"say {'very ' * (i % 7)}{i}", "output": "fox " * (1 + i % 5) + str(i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(run: Path, **options: Any) -> evaluate.Subject:
    return evaluate.prepare_run(run, **{"data": None, "rows": None, "max_tokens": None} | options)


def measured(subject: evaluate.Subject) -> evaluate.Evaluation:
    """What the cluster would have made of it, in this process."""
    prompts = [question.prompt for question in sorted(subject.asked, key=lambda question: len(question.prompt))]
    pieces = evaluate.work(subject.config, subject.trained, subject.examples, prompts, subject.scoring.max_tokens)
    return evaluate.measure(subject, pieces)


@torch.no_grad()
def loss_by_hand(model: Any, examples: Examples) -> float:
    total, count = 0.0, 0
    for index in range(len(examples)):
        ids, labels = (torch.from_numpy(part).long()[None] for part in examples[index][0])
        learned = int((labels[:, 1:] != -100).sum())
        total, count = total + float(model(ids, labels=labels).loss) * learned, count + learned
    return total / count


def test_a_run_is_measured_with_its_adapter_and_its_base_without(project: Path) -> None:
    subject = prepared(save_run(project, "swift"))
    run, base = measured(subject), measured(subject.base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(project / "base")
    assert base.loss == pytest.approx(loss_by_hand(plain, subject.examples), rel=1e-4)
    adapted = peft.PeftModel.from_pretrained(plain, project / "outputs" / "swift" / "adapter").eval()
    assert run.loss == pytest.approx(loss_by_hand(adapted, subject.examples), rel=1e-4)
    assert run.perplexity == pytest.approx(math.exp(run.loss))
    assert (run.rows, run.asked, run.scores.keys()) == (10, 6, set(evaluate.SCORES))
    said = evaluate.answers(adapted, TOKENIZER, [one.prompt for one in subject.asked], max_tokens=5, batch_size=1)
    assert run.scores == pytest.approx(evaluate.compare(said, [one.reference for one in subject.asked]))


def test_the_best_has_the_lowest_loss_of_the_same_rows(project: Path) -> None:
    one, two = (measured(prepared(save_run(project, f"run{seed}", seed=seed), rows=1)) for seed in (1, 2))
    assert evaluate.best([one, two]) == min((one, two), key=lambda run: run.loss)
    assert evaluate.best([one]) is None
    other = prepared(save_run(project, "other", "train.seed=1"))  # holds out other rows
    assert evaluate.best([one, replace(two, digest=other.digest)]) is None
    assert other.digest != prepared(project / "outputs" / "run1").digest


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_of_a_file_are_made_by_the_runs_own_processor(project: Path, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"instruction": "say one", "input": "", "output": "one"},
        {"instruction": "two", "input": "", "output": "2"},
    ]
    file = project / f"test{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".csv":
        file.write_text("instruction,input,output\nsay one,,one\ntwo,,2\n")
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    subject = prepared(save_run(project, "swift"), data=file)
    assert sorted(question.reference for question in subject.asked) == ["2", "one"]
    assert len(subject.examples) == 2


def test_rows_of_a_file_are_cut_to_the_models_positions(project: Path) -> None:
    (project / "long.jsonl").write_text(json.dumps({"instruction": "say", "output": "word " * 400}))
    subject = prepared(save_run(project, "swift"), data=project / "long.jsonl")
    assert len(subject.examples.tokens) == 256
    assert math.isfinite(measured(subject).loss)


def test_a_run_of_plain_text_has_a_loss_and_no_scores(project: Path) -> None:
    (project / "text.jsonl").write_text("\n".join(json.dumps({"text": f"hello {i}"}) for i in range(8)))
    config = (
        "from finetune import *\n"
        f"config = FinetuneConfig(name='x', model=ModelSource({str(project / 'base')!r}),\n"
        f"    data=Data(source=Jsonl({str(project / 'text.jsonl')!r}), processor=Completion(), validation=0.25),\n"
        "    method=Lora(rank=4, alpha=8), train=Train())\n"
    )
    evaluation = measured(prepared(save_run(project, "plain", config=config)))
    assert (evaluation.rows, evaluation.asked, evaluation.scores) == (2, 0, {})


def test_a_run_keeps_its_newest_evaluation_of_each_rows(project: Path) -> None:
    subject = prepared(save_run(project, "swift"))
    scores = dict.fromkeys(evaluate.SCORES, 0.5)
    first = evaluate.Evaluation("swift", rows=10, asked=6, loss=1.0, perplexity=2.7, digest="d", scores=scores)
    evaluate.keep(first, subject, evaluate.HELD_OUT)
    evaluate.keep(replace(first, loss=3.0), subject, "/rows/test.jsonl")
    evaluate.keep(replace(first, loss=2.0), subject, evaluate.HELD_OUT)
    found = json.loads((project / "outputs" / "swift" / "evaluation.json").read_text())
    assert {key: entry["loss"] for key, entry in found.items()} == {"held_out": 2.0, "/rows/test.jsonl": 3.0}
    assert found["held_out"]["rougeL"] == 0.5
    assert found["held_out"]["max_tokens"] == 5


@pytest.mark.parametrize(
    ("digest", "data", "said"),
    [
        ("d", None, "best: two, the lowest loss on the same rows"),
        ("e", None, "the runs held out different rows, so their losses are not compared"),
        ("e", "test.csv", "the runs make different tokens of these rows"),
    ],
)
def test_runs_are_shown_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], digest: str, data: str | None, said: str
) -> None:
    one = evaluate.Evaluation(
        "one", rows=10, asked=4, loss=2.0, perplexity=7.389, digest="d", scores=dict.fromkeys(evaluate.SCORES, 0.25)
    )
    two = evaluate.Evaluation("two", rows=10, asked=0, loss=1.0, perplexity=None, digest=digest)
    monkeypatch.setattr(Platform, "evaluate", lambda *given, **options: [one, two])
    assert main(["evaluate", "one", "two", *(["--data", data] if data else [])]) == 0
    _, first, second, verdict = capsys.readouterr().out.splitlines()
    assert first.split() == ["one", "10", "2.0000", "7.39", "4", "0.250", "0.250", "0.250", "0.250"]
    assert second.split() == ["two", "10", "1.0000", "0"]
    assert verdict.startswith(said)


def test_the_list_of_runs_shows_the_scores_of_a_run_that_was_scored() -> None:
    metrics = {"loss": 1.0, "eval_loss": 0.5, "base_eval_loss": 2.0}
    manifest = RunManifest(
        name="x", base="b", revision=None, method="lora", created="", seconds=1, steps=1, metrics=metrics
    )
    assert run_state(Run(Path("x"), manifest, None)) == "finished, held-out loss 0.5000 (base 2.0000)"
    scored = replace(manifest, metrics=metrics | {"exact_match": 0.25, "rouge1": 0.7, "rougeL": 0.625})
    assert run_state(Run(Path("x"), scored, None)).endswith("(base 2.0000), exact match 0.250, ROUGE-L 0.625")


WRONG = {
    "no such run": (["nope"], r"no run 'nope' here or in \S+outputs; choices: bare, begun, swift"),
    "near": (["swft"], r"no run 'swft' .*did you mean 'swift'\?"),
    "unfinished": (["begun"], r"run 'begun' is not finished \(step 4 of 12\)"),
    "no rows": (["swift", "bare"], r"run 'bare' held no rows out \(data\.validation = 0\.0\): .* --data FILE"),
    "no file": (["swift", "--data", "nope.jsonl"], r"manta: no file at nope\.jsonl"),
    "bad suffix": (
        ["swift", "--data", "rows.txt"],
        r"--data rows\.txt: the name must end in one of \.csv, .*\.parquet",
    ),
    "no weights": (["hollow"], r"run 'hollow' has lost its weights: no \S+adapter"),
    "no rows asked": (["swift", "--rows", "0"], r"Scoring\.rows = 0: must be at least 1"),
    "wrong fields": (["swift", "--data", "other.jsonl"], r"other\.jsonl line 1: has no field 'instruction'"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_one_line_before_anything_starts(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    save_run(project, "swift")
    save_run(project, "bare", "data.validation=0.0", "scoring=none")
    (project / "other.jsonl").write_text('{"question": "x"}')
    (project / "outputs" / "begun").mkdir()
    (project / "outputs" / "begun" / "metrics.jsonl").write_text('{"step": 4, "steps": 12}\n')
    if arguments == ["hollow"]:
        (save_run(project, "hollow") / "adapter").rename(project / "elsewhere")
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error


@pytest.mark.cluster
def test_two_runs_and_their_base_are_evaluated_on_ray(cluster: Shell, project: Path) -> None:  # noqa: F811
    (project / "finetune.py").write_text(
        "from finetune import *\n"
        "class Loud:\n"
        "    '''A processor of the user's own, which the workers have never heard of.'''\n"
        "    def __call__(self, row, tokenizer):\n"
        "        return Instruct()({**row, 'output': row['output'].upper()}, tokenizer)\n"
        f"config = FinetuneConfig(name='good', model=ModelSource({str(project / 'base')!r}, dtype='fp32'),\n"
        f"    data=Data(source=Jsonl({str(project / 'rows.jsonl')!r}), processor=Loud(), validation=0.25),\n"
        "    train=Train(max_steps=12, batch_size=4), optim=Optim(lr=1e-2), scoring=Scoring(rows=7, max_tokens=8),\n"
        f"    output={str(project / 'outputs')!r})\n"
    )
    finetune = (sys.executable, "-m", "finetune", str(project / "finetune.py"))
    cluster.run(*finetune)
    cluster.run(*finetune, "name=slow", "optim.lr=1e-6")
    manta = (sys.executable, "-m", "ui.cli", "evaluate", "--output", str(project / "outputs"))
    shown = cluster.run(*manta, str(project / "outputs" / "good"), "slow", "--base")
    table = {
        line.split()[0]: re.split("  +", line) for line in shown.splitlines() if line.endswith(tuple("0123456789"))
    }
    for name in ("good", "slow"):
        trained = json.loads((project / "outputs" / name / "run.json").read_text())["metrics"]
        kept = json.loads((project / "outputs" / name / "evaluation.json").read_text())["held_out"]
        assert kept["loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)
        assert [kept[score] for score in evaluate.SCORES] == [trained[score] for score in evaluate.SCORES]
        assert kept["asked"] == 7
        assert table[name][1:3] == ["10", f"{kept['loss']:.4f}"]
        assert table["base"][1:3] == ["10", f"{trained['base_eval_loss']:.4f}"]
    assert "best: good, the lowest loss on the same rows" in shown

    other = shutil.copytree(project / "outputs" / "good", project / "outputs" / "other")
    manifest = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(manifest | {"overrides": ["train.seed=1"]}))  # it holds other rows out
    (project / "test.jsonl").write_text('{"instruction": "say 7", "output": "fox 7"}')
    together = cluster.run(*manta, "good", "other", "--data", str(project / "test.jsonl"))
    assert "best: good" in together  # the two are one model: the first of equals
    kept = json.loads((project / "outputs" / "good" / "evaluation.json").read_text())
    assert kept.keys() == {"held_out", str(project / "test.jsonl")}
