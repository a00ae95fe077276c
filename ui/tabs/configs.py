"""Choosing a config on the page: a file, overrides, and a look at what they make together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from plugins import cluster
from plugins.spec import render
from ui.tabs.events import QUIET, mistakes

Load = Callable[[Path, list[str]], Any]


@dataclass(frozen=True)
class ConfigChoice:
    """The components: `inputs` are the path and the overrides as text, `act` is the button that uses them."""

    inputs: list[gr.components.Component]
    act: gr.Button


def config_choice(folder: str, load: Load, *, action: str, example: str) -> ConfigChoice:
    """Render the choice among the configs of `folder`. `load` makes the config of a path and overrides."""
    files = config_files(folder)
    path = gr.Dropdown(
        files,
        value=files[0] if files else None,
        allow_custom_value=True,
        label="Config",
        info="A file of this project, or type the path of another",
    )
    overrides = gr.Textbox(
        label="Overrides", info="Fields to change, one a line", placeholder=example, lines=3, max_lines=8
    )
    with gr.Row():
        show = gr.Button("Show config")
        act = gr.Button(action, variant="primary")
    resolved = gr.Code(label="The config, with the overrides applied", language="python", max_lines=24, visible=False)

    @mistakes()
    def preview(path: str | None, overrides: str) -> gr.Code:
        return gr.Code(render(load(*chosen(path, overrides))), visible=True)

    show.click(preview, [path, overrides], resolved, **QUIET)
    return ConfigChoice([path, overrides], act)


def chosen(path: str | None, overrides: str) -> tuple[Path, list[str]]:
    """What the user chose, as the command line would take it."""
    return Path((path or "").strip()), [line.strip() for line in overrides.splitlines() if line.strip()]


def config_files(folder: str) -> list[str]:
    """The config files in the project's `folder`, relative to the current directory where they are below it."""
    found = sorted((cluster.PROJECT / folder).glob("*.py"))
    here = Path.cwd()
    return [str(file.relative_to(here) if file.is_relative_to(here) else file) for file in found]
