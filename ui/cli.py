"""`manta`: the console command, a face of Platform."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plugins import entry
from plugins.runs import Run
from plugins.spec import UserError
from ui.client import DEFAULT_URL, Platform

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig


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

    verb = verbs.add_parser("runs", help="list finetuning runs")
    verb.add_argument("--output", default="outputs", help="the directory that holds them (default: outputs)")
    verb.set_defaults(act=_runs)

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


def _runs(options: argparse.Namespace) -> None:
    rows = [(run.name, run_state(run), run.manifest.base if run.manifest else "", str(run.path))
            for run in Platform().runs(options.output)]  # fmt: skip
    _table(("RUN", "STATE", "BASE", "DIRECTORY"), rows, empty=f"no runs in {options.output}")


def run_state(run: Run) -> str:
    """`finished, held-out loss 0.12`, or how far an unfinished run has come."""
    if run.manifest:
        metrics = run.manifest.metrics
        base = f" (base {metrics['base_eval_loss']:.4f})" if "base_eval_loss" in metrics else ""
        name, loss = ("held-out loss", metrics["eval_loss"]) if "eval_loss" in metrics else ("loss", metrics["loss"])
        return f"finished, {name} {loss:.4f}{base}"
    return f"step {run.progress['step']} of {run.progress['steps']}" if run.progress else "begun"


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
