"""A user's mistake on the page: its one line, in a corner, and no traceback."""

import html
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from plugins.spec import UserError


@contextmanager
def mistakes() -> Iterator[None]:
    """Within it, a UserError ends the event with its line shown."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), duration=15, print_exception=False) from error
