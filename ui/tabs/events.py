"""How the page's events behave: quietly, with a button that says what is going on, and a mistake in one line."""

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from plugins.spec import UserError

# Settings of an event: no veil over what it updates, and no entry in an API that the page does not mean to offer.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@contextmanager
def mistakes() -> Iterator[None]:
    """Within it, a UserError ends the event with its line shown in a corner, and no traceback."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), duration=15, print_exception=False) from error


def working(words: str) -> Callable[[], gr.Button]:
    """An event that makes a button say what is going on and take no more clicks, until `idle`."""
    return lambda: gr.Button(words, interactive=False)


def idle(words: str) -> Callable[[], gr.Button]:
    return lambda: gr.Button(words, interactive=True)
