"""The Serve tab: deploy a config, see what is served, stop it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import gradio as gr

from plugins.loading import load_config
from plugins.spec import UserError
from ui.client import Application, Platform, Status
from ui.tabs.configs import chosen, config_choice
from ui.tabs.events import QUIET, idle, mistakes, working

if TYPE_CHECKING:
    from serve.config import ServeConfig

T = TypeVar("T")


def serve_tab(page: gr.Blocks, platform: Platform) -> None:
    """Render the tab into `page`."""

    def begin(path: str | None, overrides: str) -> Iterator[str]:
        with mistakes():
            yield from deploy(platform, *chosen(path, overrides))

    def look() -> list[Any]:
        return served(platform)

    @mistakes()
    def connect_and_look() -> list[Any]:
        platform.attach()
        return served(platform)

    @mistakes()
    def stop(application: str) -> str:
        platform.stop(application)
        return f"Stopped `{application}`."

    with gr.Tab("Serve") as tab, gr.Row():
        with gr.Column(scale=2, min_width=360):
            choice = config_choice("configs/serve", load, action="Deploy", example="port=8001")
            progress = gr.Markdown()
        with gr.Column(scale=3, min_width=480):
            parts = _render()

    page.load(look, None, parts.outputs, **QUIET)
    tab.select(look, None, parts.outputs, **QUIET)
    parts.refresh.click(connect_and_look, None, parts.outputs, **QUIET)
    parts.stop.click(stop, parts.applications, progress, **QUIET).then(look, None, parts.outputs, **QUIET)
    deploying = choice.act.click(working("Deploying …"), None, choice.act, **QUIET)
    deployed = deploying.then(begin, choice.inputs, progress, concurrency_limit=1, **QUIET)
    for ended in (deployed.success, deployed.failure):
        ended(idle("Deploy"), None, choice.act, **QUIET).then(look, None, parts.outputs, **QUIET)


@dataclass(frozen=True)
class Parts:
    """The components that show what is served."""

    state: gr.Markdown
    models: gr.Dataframe
    applications: gr.Dropdown
    stop: gr.Button
    refresh: gr.Button

    @property
    def outputs(self) -> list[gr.components.Component]:
        """Those that `served` updates, in its order."""
        return [self.state, self.models, self.applications, self.stop]


def _render() -> Parts:
    state = gr.Markdown()
    models = gr.Dataframe(
        headers=["Model"], label="Models", show_label=False, interactive=False, buttons=[], visible=False
    )
    with gr.Row():
        applications = gr.Dropdown([], label="Application", show_label=False, container=False, scale=4, visible=False)
        stop = gr.Button("Stop serving", variant="stop", scale=1, min_width=120, visible=False)
    with gr.Row():
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=160)
    return Parts(state, models, applications, stop, refresh)


def load(path: Path, overrides: list[str]) -> "ServeConfig":
    from serve.config import ServeConfig

    return load_config(path, ServeConfig, overrides)


def deploy(platform: Platform, path: Path, overrides: list[str]) -> Iterator[str]:
    """Serve a config; yields how it goes."""
    config = load(path, overrides)
    deploying = _in_background(lambda: platform.serve(config))
    began, seen = time.monotonic(), False
    while not deploying.done():
        status = platform.status() if platform.is_connected() else None
        there = _application(status, config.name) is not None
        if seen and not there:  # Serve itself would wait for ever
            yield f"`{config.name}` was stopped."
            return
        seen = there
        free = f", free CPUs: {status.free_cpus:g}" if status else ""
        yield f"Deploying `{config.name}`: {time.monotonic() - began:.0f} s{free}"
        wait([deploying], timeout=1)
    yield ""
    models = ", ".join(f"`{model}`" for model in deploying.result())
    elsewhere = urlsplit(platform.url).port != config.port
    note = f" on port {config.port}; to chat here, open the page with `--url`" if elsewhere else ""
    yield f"Serving {models}{note}. It took {time.monotonic() - began:.0f} s."


def _application(status: Status | None, name: str) -> Application | None:
    return next((one for one in status.applications if one.name == name), None) if status else None


def _in_background(act: Callable[[], T]) -> Future[T]:
    """Run `act` on a thread of its own, which does not keep the page from closing."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:  # noqa: BLE001  # raised again where the result is wanted
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def served(platform: Platform) -> list[Any]:
    """What is served, as updates of Parts.outputs."""
    try:
        models, state = platform.models(), f"At {platform.url}/v1, in OpenAI's format."
    except UserError:
        models, state = [], f"Nothing is served at {platform.url} yet."
    status = platform.status() if platform.is_connected() else None
    applications = [(f"{one.name}, {one.state.lower()}", one.name) for one in status.applications] if status else []
    first = applications[0][1] if applications else None
    return [
        f"### Served\n{state}",
        gr.Dataframe([[model] for model in models], visible=bool(models)),
        gr.Dropdown(applications, value=first, visible=bool(applications)),
        gr.Button(visible=bool(applications)),
    ]
