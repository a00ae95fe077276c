"""`manta`: the console command, a face of Platform."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plugins import entry
from plugins.runs import Run
from plugins.spec import UserError
from ui.client import DEFAULT_URL, Platform

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from finetune.evaluate import Evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    options = entry.parse(_parser(), arguments)
    return entry.run(lambda: options.act(options), name="manta")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="manta", description="Finetune language models on Ray and serve them.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    verb = verbs.add_parser("finetune", help="finetune a model")
    entry.add_config_arguments(verb, "FinetuneConfig")
    verb.add_argument(
        "--submit", metavar="ADDRESS", help="run it as a job on this Ray cluster: http://HOST:8265 or auto"
    )
    verb.set_defaults(act=_finetune)

    verb = verbs.add_parser("evaluate", help="score finished runs on held-out rows")
    verb.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, or the name of a run")
    verb.add_argument(
        "--data", type=Path, metavar="FILE", help="rows of .jsonl, .json, .csv or .parquet instead of those held out"
    )
    verb.add_argument(
        "--rows", type=int, metavar="N", help="how many rows are asked at most (default: the run's, or 100)"
    )
    verb.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: the run's, or 128)")
    verb.add_argument("--base", action="store_true", help="also the model that the run began with")
    _add_output(verb)
    verb.set_defaults(act=_evaluate)

    verb = verbs.add_parser("data", help="show what a model will see of a config's rows")
    entry.add_config_arguments(verb, "FinetuneConfig")
    verb.add_argument("--rows", type=int, default=3, help="how many rows to show in full (default: 3)")
    verb.set_defaults(act=_data)

    verb = verbs.add_parser("serve", help="serve models over HTTP")
    entry.add_config_arguments(verb, "ServeConfig")
    verb.set_defaults(act=_serve)

    verb = verbs.add_parser("chat", help="talk to a served model")
    verb.add_argument("model", metavar="MODEL", help="an id that `manta models` lists")
    verb.add_argument("question", nargs="?", help="ask this and stop; without it, talk until Ctrl-D")
    _add_url(verb)
    verb.set_defaults(act=_chat)

    verb = verbs.add_parser("models", help="list the models that are served")
    _add_url(verb)
    verb.set_defaults(act=_models)

    verb = verbs.add_parser("engines", help="list the engines that can serve a model, and whether they are here")
    verb.set_defaults(act=_engines)

    verb = verbs.add_parser("runs", help="list finetuning runs")
    _add_output(verb)
    verb.set_defaults(act=_runs)

    verb = verbs.add_parser("export", help="hand out a finished run: as a whole model, or to the Hugging Face hub")
    verb.add_argument("run", metavar="RUN", help="a run's directory, or its name")
    _add_output(verb)
    verb.add_argument("--merged", type=Path, metavar="DIR", help="write base and adapter there, merged into one model")
    verb.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of its weights (default: as the base was saved)"
    )
    verb.add_argument(
        "--push", metavar="REPO", help="send the merged model, or without --merged the adapter, to the hub"
    )
    verb.add_argument("--private", action="store_true", help="make the repository a private one")
    verb.set_defaults(act=_export)

    verb = verbs.add_parser("quantize", help="write a model with smaller weights, and compare it with the original")
    verb.add_argument("model", metavar="MODEL", help="a model's directory or hub id, or a finished run")
    verb.add_argument("--engine", required=True, help="which serves it: ipex, openvino or torch")
    verb.add_argument("--weights", required=True, help="int8 or, for ipex and openvino, int4")
    verb.add_argument("--to", type=Path, metavar="DIR", help="a new directory (default: ./NAME-ENGINE-WEIGHTS)")
    verb.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="for the perplexity: plain text, or .jsonl (default: rows of the demo)",
    )
    _add_output(verb)
    verb.set_defaults(act=_quantize)

    verb = verbs.add_parser("status", help="show the cluster, its jobs and what it serves")
    verb.set_defaults(act=_status)

    verb = verbs.add_parser("logs", help="show what a job has printed")
    verb.add_argument("id", metavar="ID")
    verb.set_defaults(act=_logs)

    verb = verbs.add_parser("stop", help="stop a job or a served application")
    verb.add_argument("id", metavar="ID", nargs="?")
    verb.add_argument("--all", action="store_true", help="stop all jobs and all that is served")
    verb.set_defaults(act=_stop)

    verb = verbs.add_parser("ui", help="open the web page")
    verb.add_argument("--host", default="127.0.0.1")
    verb.add_argument("--port", type=int, default=7860)
    _add_url(verb)
    verb.set_defaults(act=_ui)
    return parser


def _add_output(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--output", default="outputs", help="the directory that holds the runs (default: outputs)")


def _add_url(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--url", default=DEFAULT_URL, help=f"where the models are served (default: {DEFAULT_URL})")


def _finetune(options: argparse.Namespace) -> None:
    from finetune.config import FinetuneConfig

    def act(config: "FinetuneConfig") -> None:
        platform = Platform()
        if options.submit is None:
            platform.finetune(config, config_file=options.config, overrides=options.overrides)
            return
        address = None if options.submit == "auto" else options.submit
        job = platform.submit(options.config, options.overrides, address=address)
        print(f"submitted job {job}: manta logs {job} shows it, manta stop {job} stops it")

    entry.with_config(options, FinetuneConfig, act)


def _evaluate(options: argparse.Namespace) -> None:
    evaluations = Platform().evaluate(
        options.runs,
        data=options.data,
        rows=options.rows,
        max_tokens=options.max_tokens,
        base=options.base,
        output=options.output,
    )
    head = ("RUN", "ROWS", "LOSS", "PERPLEXITY", "ASKED", "EXACT MATCH", "ROUGE-1", "ROUGE-2", "ROUGE-L")
    _table(head, [_evaluation_row(one) for one in evaluations], empty="")
    print(_verdict(evaluations, options.data), end="")


def _evaluation_row(one: "Evaluation") -> tuple[str, ...]:
    perplexity = "" if one.perplexity is None else f"{one.perplexity:.2f}"
    scores = (f"{one.scores[name]:.3f}" if one.scores else "" for name in ("exact_match", "rouge1", "rouge2", "rougeL"))
    return one.name, str(one.rows), f"{one.loss:.4f}", perplexity, str(one.asked), *scores


def _verdict(evaluations: Sequence["Evaluation"], data: Path | None) -> str:
    """Which is the best, or why that cannot be said; nothing of a single one."""
    from finetune.evaluate import best

    if len(evaluations) < 2:
        return ""
    if (winner := best(evaluations)) is not None:
        return f"best: {winner.name}, the lowest loss on the same rows\n"
    if data is None:
        return (
            "the runs held out different rows, so their losses are not compared: name rows for all with --data FILE\n"
        )
    return (
        "the runs make different tokens of these rows (another tokenizer, processor or max_length), "
        "so their losses are not compared\n"
    )


def _data(options: argparse.Namespace) -> None:
    from finetune.config import FinetuneConfig

    def act(config: "FinetuneConfig") -> None:
        for line in Platform().preview(config, rows=options.rows, color=sys.stdout.isatty()):
            print(line)

    entry.with_config(options, FinetuneConfig, act)


def _serve(options: argparse.Namespace) -> None:
    from serve.config import ServeConfig

    entry.with_config(options, ServeConfig, Platform().serve_until_interrupted)


def _chat(options: argparse.Namespace) -> None:
    platform = Platform(options.url)
    messages: list[dict[str, str]] = []
    if options.model not in (models := platform.models()):
        raise UserError(f"model {options.model!r} is not served; there are: {', '.join(models)}")
    while True:
        question = options.question if options.question is not None else _ask()
        if question is None:
            return
        messages.append({"role": "user", "content": question})
        pieces = []
        for piece in platform.chat(options.model, messages):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
        if options.question is not None:
            return


def _ask() -> str | None:
    """The user's next line that says something; None at the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        if line.strip():
            return line


def _models(options: argparse.Namespace) -> None:
    for model in Platform(options.url).models():
        print(model)


def _engines(options: argparse.Namespace) -> None:
    rows = [
        (one.name, one.environment or "main", one.needs or "what Manta needs", one.problem or "yes")
        for one in Platform().engines()
    ]
    _table(("ENGINE", "ENVIRONMENT", "NEEDS", "HERE"), rows, empty="")


def _runs(options: argparse.Namespace) -> None:
    rows = [(run.name, run_state(run), run.manifest.base if run.manifest else "", str(run.path))
            for run in Platform().runs(options.output)]  # fmt: skip
    _table(("RUN", "STATE", "BASE", "DIRECTORY"), rows, empty=f"no runs in {options.output}")


def run_state(run: Run) -> str:
    """`finished, held-out loss 0.12`, with the scores of a run that was scored, or how far an unfinished run has come."""
    if run.manifest:
        metrics = run.manifest.metrics
        base = f" (base {metrics['base_eval_loss']:.4f})" if "base_eval_loss" in metrics else ""
        name, loss = ("held-out loss", metrics["eval_loss"]) if "eval_loss" in metrics else ("loss", metrics["loss"])
        labels = {"exact_match": "exact match", "rougeL": "ROUGE-L"}
        scores = "".join(f", {label} {metrics[key]:.3f}" for key, label in labels.items() if key in metrics)
        return f"finished, {name} {loss:.4f}{base}{scores}"
    return f"step {run.progress['step']} of {run.progress['steps']}" if run.progress else "begun"


def _export(options: argparse.Namespace) -> None:
    address = Platform().export(
        options.run,
        output=options.output,
        merged=options.merged,
        dtype=options.dtype,
        push=options.push,
        private=options.private,
    )
    if options.merged:
        print(f"the model is in {options.merged}")
    if address:
        print(f"pushed to {address}")


def _quantize(options: argparse.Namespace) -> None:
    directory, found = Platform().quantize(
        options.model,
        engine=options.engine,
        weights=options.weights,
        to=options.to,
        text=options.text,
        output=options.output,
    )
    rows = [
        (name, f"{one.size / 2**20:.1f} MiB", f"{one.measured.perplexity:.3f}", f"{one.measured.tokens_per_s:.1f}")
        for name, one in (("original", found.original), ("quantised", found.quantized))
    ]
    _table(("MODEL", "SIZE", f"PERPLEXITY OF {found.tokens} TOKENS", "TOKENS/S"), rows, empty="")
    print(f"it is in {directory}: name that as the source of a ServedModel, whose engine is {found.engine}()")


def _status(options: argparse.Namespace) -> None:
    status = Platform().status()
    if status is None:
        print("no Ray cluster runs here")
        return
    print(f"cluster: {status.size}, {status.free_cpus:g} CPUs free")
    for job in status.jobs:
        print(f"job {job.id}: {job.state.lower()}  {job.command}")
    for application in status.applications:
        print(f"serving {application.name}: {application.state.lower()}  {application.message}".rstrip())
    if not status.jobs and not status.applications:
        print("no jobs, nothing is served")


def _logs(options: argparse.Namespace) -> None:
    print(Platform().logs(options.id), end="")


def _stop(options: argparse.Namespace) -> None:
    platform = Platform()
    if options.all:
        names = platform.stop_all()
        print(f"stopped {', '.join(names)}" if names else "nothing was running")
    elif options.id:
        print(f"stopped {platform.stop(options.id)} {options.id}")
    else:
        raise UserError("name what to stop (manta status lists it), or --all")


def _ui(options: argparse.Namespace) -> None:
    from ui.app import open_page

    open_page(Platform(options.url), host=options.host, port=options.port)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, empty: str) -> None:
    if not rows:
        print(empty)
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
