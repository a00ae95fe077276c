"""The Finetune tab: start a run, watch its losses and its job, stop it."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from plugins.loading import load_config
from plugins.runs import Run, read_metrics
from plugins.spec import UserError
from ui.cli import run_state
from ui.client import Job, Platform
from ui.tabs.configs import chosen, config_choice
from ui.tabs.events import QUIET, idle, mistakes, working

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

REFRESH_S = 2.0
LOG_LINES = 200
RUN_COLUMNS = ["Run", "State", "Base"]
LOSS_COLUMNS = {"step": "quantitative", "loss": "quantitative", "of": "nominal"}
LOSS_COLORS = {"training rows": "#0891b2", "held-out rows": "#ea580c"}
NO_JOB = "No job yet. Starting a run connects to Ray on this machine, or starts it for as long as this page is open."
STATES = {
    "PENDING": "waits to start",
    "RUNNING": "is running",
    "SUCCEEDED": "is finished",
    "FAILED": "failed",
    "STOPPED": "was stopped",
}

# To the end of the log, unless its reader has gone back in it.
_SCROLL = """() => {
    const log = document.querySelector(".log textarea");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 400) log.scrollTop = log.scrollHeight;
}"""


@dataclass(frozen=True)
class View:
    """What the tab shows of the world. `run` and `job` are the chosen ones, or else the newest."""

    output: str
    runs: list[list[str]]
    run: str | None
    losses: list[tuple[int, float, str]]
    is_connected: bool
    jobs: list[Job]
    job: Job | None
    log: str


def finetune_tab(page: gr.Blocks, platform: Platform) -> None:
    """Render the tab into `page`."""

    def follow(output: str, run: str | None, job: str | None, shown: Mapping[str, Any]) -> list[Any]:
        try:
            return changes(look(platform, output, run, job), shown)
        except UserError as error:  # in place: a message in the corner would come back every other second
            return [f"### Runs\n{error}", *[gr.skip()] * (len(parts.outputs) - 1), {**shown, "title": None}]

    @mistakes()
    def begin(path: str | None, overrides: str) -> tuple[str, str, str]:
        return start(platform, *chosen(path, overrides))

    @mistakes()
    def find_jobs() -> None:
        if not platform.attach():
            raise UserError("no Ray cluster runs here")

    @mistakes()
    def stop(job: str) -> None:
        platform.stop(job)

    with gr.Tab("Finetune"), gr.Row():
        with gr.Column(scale=2, min_width=360):
            choice = config_choice("configs/finetune", load, action="Start run", example="optim.lr=1e-3")
        with gr.Column(scale=3, min_width=480):
            parts = _render()
        run, job, shown, timer = gr.State(None), gr.State(None), gr.State({}), gr.Timer(REFRESH_S)
    following = {"fn": follow, "inputs": [parts.output, run, job, shown], "outputs": [*parts.outputs, shown], **QUIET}

    page.load(**following)
    timer.tick(**following)
    parts.runs.select(_selected_run, None, run, **QUIET).then(**following)
    parts.jobs.input(lambda picked: picked, parts.jobs, job, **QUIET).then(**following)
    parts.find_jobs.click(find_jobs, None, None, **QUIET).success(**following)
    parts.log.change(None, js=_SCROLL, **QUIET)
    parts.stop.click(stop, parts.jobs, None, **QUIET).then(**following)
    starting = choice.act.click(working("Starting …"), None, choice.act, **QUIET)
    started = starting.then(begin, choice.inputs, [parts.output, run, job], **QUIET)
    for ended in (started.success, started.failure):
        ended(idle("Start run"), None, choice.act, **QUIET).then(**following)


@dataclass(frozen=True)
class Parts:
    """The components that show a View."""

    output: gr.Textbox
    title: gr.Markdown
    runs: gr.Dataframe
    losses: gr.LinePlot
    state: gr.Markdown
    find_jobs: gr.Button
    jobs: gr.Dropdown
    stop: gr.Button
    log: gr.Textbox

    @property
    def outputs(self) -> list[gr.components.Component]:
        """Those that `changes` updates, in its order."""
        return [self.title, self.runs, self.losses, self.state, self.find_jobs, self.jobs, self.stop, self.log]


def _render() -> Parts:
    title = gr.Markdown()
    runs = gr.Dataframe(
        headers=RUN_COLUMNS, label="Runs", show_label=False, interactive=False, buttons=[], visible=False
    )
    losses = gr.LinePlot(
        x="step", y="loss", color="of", color_title="", color_map=LOSS_COLORS, label="Losses", buttons=[], visible=False
    )
    output = gr.Textbox("outputs", label="Runs are kept in", max_lines=1)
    state = gr.Markdown()
    with gr.Row():
        find_jobs = gr.Button("Find running jobs", size="sm", scale=0, min_width=160)
        jobs = gr.Dropdown([], label="Job", show_label=False, container=False, scale=4, visible=False)
        stop = gr.Button("Stop job", variant="stop", scale=1, min_width=90, visible=False)
    log = gr.Textbox(
        label="Log", lines=12, max_lines=12, interactive=False, buttons=["copy"], visible=False, elem_classes="log"
    )
    return Parts(output, title, runs, losses, state, find_jobs, jobs, stop, log)


def load(path: Path, overrides: list[str]) -> "FinetuneConfig":
    from finetune.config import FinetuneConfig

    return load_config(path, FinetuneConfig, overrides)


def start(platform: Platform, path: Path, overrides: list[str]) -> tuple[str, str, str]:
    """Run a config as a job; returns where its runs are, the name of the run, and the job's id."""
    config = load(path, overrides)
    if platform.connect():
        gr.Info("Ray was started on this machine. It stops, and its jobs with it, when the page is closed.")
    return config.output, config.name, platform.submit(path, overrides)


def look(platform: Platform, output: str, run: str | None, job: str | None) -> View:
    """The world as it is, for one who has chosen the run `run` and the job of id `job`, or nothing yet."""
    runs = platform.runs(output)
    chosen_run = _newest(runs) if run is None else next((one for one in runs if one.name == run), None)
    is_connected = platform.is_connected()
    jobs = platform.jobs() if is_connected else []
    chosen_job = next((one for one in jobs if one.id == job), jobs[0] if jobs else None)
    return View(
        output=output,
        runs=[[one.name, run_state(one), one.manifest.base if one.manifest else ""] for one in runs],
        run=chosen_run.name if chosen_run else run,
        losses=loss_points(chosen_run),
        is_connected=is_connected,
        jobs=jobs,
        job=chosen_job,
        log=platform.logs(chosen_job.id) if chosen_job else "",
    )


def _newest(runs: Sequence[Run]) -> Run | None:
    return max(runs, key=lambda run: run.path.stat().st_mtime, default=None)


def loss_points(run: Run | None) -> list[tuple[int, float, str]]:
    """(step, loss, which loss) of every line of metrics.jsonl."""
    lines = read_metrics(run.path) if run else []
    names = dict(zip(("loss", "eval_loss"), LOSS_COLORS, strict=True))
    return [(line["step"], line[key], name) for line in lines for key, name in names.items() if key in line]


def changes(view: View, shown: Mapping[str, Any]) -> list[Any]:
    """An update for each of Parts.outputs, none where the browser shows it already; and what it shows then."""
    job, tail = view.job, "\n".join(view.log.splitlines()[-LOG_LINES:])
    labels = [(job_label(one), one.id) for one in view.jobs]
    can_stop = job is not None and job.state in ("PENDING", "RUNNING")
    wanted: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "title": (gr.Markdown, {"value": "### Runs" if view.runs else f"### Runs\nNo runs in `{view.output}` yet."}),
        "runs": (gr.Dataframe, {"value": view.runs, "visible": bool(view.runs)}),
        "losses": (gr.LinePlot, _plot(view.run, view.losses)),
        "state": (gr.Markdown, {"value": f"### Job\n{job_state(job, view.log)}"}),
        "find_jobs": (gr.Button, {"visible": not view.is_connected}),
        "jobs": (gr.Dropdown, {"choices": labels, "value": job.id if job else None, "visible": job is not None}),
        "stop": (gr.Button, {"interactive": can_stop, "visible": job is not None}),
        "log": (gr.Textbox, {"value": tail, "visible": job is not None}),
    }
    updates = [
        gr.skip() if shown.get(name) == settings else make(**settings) for name, (make, settings) in wanted.items()
    ]
    return [*updates, {name: settings for name, (_, settings) in wanted.items()}]


def job_label(job: Job) -> str:
    """`demo_lora.py of 12:03 is running`."""
    words = shlex.split(job.command)
    what = next((Path(word).name for word in words if word.endswith(".py")), job.command[:40])
    when = f" of {job.started:%H:%M}" if job.started else ""
    return f"{what}{when} {STATES[job.state]}"


def job_state(job: Job | None, log: str) -> str:
    if job is None:
        return NO_JOB
    said = [line for line in log.splitlines() if line.strip()]
    why = f": {said[-1]}" if job.state == "FAILED" and said else ""
    return f"`{job.id}` {STATES[job.state]}{why}"


def _plot(run: str | None, points: Sequence[tuple[int, float, str]]) -> dict[str, Any]:
    """The settings of the plot. Its points go as the browser takes them; gradio would else want a data frame."""
    # The browser makes the legend, and with it the lines, of the first points that it gets: so both are among them.
    unseen = [(points[0][0], None, name) for name in LOSS_COLORS] if points else []
    value = {"columns": list(LOSS_COLUMNS), "data": [*unseen, *points], "datatypes": LOSS_COLUMNS, "mark": "line"}
    return {"value": value, "label": f"Losses of {run}", "visible": bool(points)}


def _selected_run(event: gr.SelectData) -> str:
    return str(event.row_value[0])
