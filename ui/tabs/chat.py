"""The Chat tab: talk to a served model. A conversation lives in its browser window and nowhere else."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from plugins.spec import UserError
from ui.client import Platform
from ui.tabs.events import QUIET

Conversation = list[dict[str, Any]]


def chat_tab(page: gr.Blocks, platform: Platform) -> None:
    """Render the tab into `page`."""

    def look(model: str | None) -> gr.Dropdown:
        return choice(platform, model)

    def reply(said: Conversation, model: str | None, temperature: float, max_tokens: int | None) -> Iterator[Any]:
        yield from answer(platform, said, model, temperature=temperature, max_tokens=max_tokens)

    with gr.Tab("Chat") as tab:
        with gr.Row(equal_height=True):
            refresh = gr.Button("Refresh", size="sm", render=False)
            model = gr.Dropdown([], label="Model", scale=3, buttons=[refresh])
            temperature = gr.Slider(0, 2, value=0.7, step=0.1, label="Temperature", scale=2)
            max_tokens = gr.Number(256, precision=0, minimum=1, label="Max tokens", scale=1, min_width=110)
        talk = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height=440,
            buttons=["copy"],
            feedback_options=None,
            placeholder="Nothing said yet.",
        )
        box = gr.Textbox(
            label="Message", show_label=False, placeholder="Say something", submit_btn=True, lines=1, max_lines=8
        )

    page.load(look, model, model, **QUIET)
    tab.select(look, model, model, **QUIET)
    refresh.click(look, model, model, **QUIET)
    asked = box.submit(ask, [box, talk], [box, talk], **QUIET)
    answering = asked.then(reply, [talk, model, temperature, max_tokens], [talk, box], concurrency_limit=None, **QUIET)
    for ended in (answering.success, answering.failure):
        ended(_ready, None, box, **QUIET)
    box.stop(_ready, None, box, cancels=[answering], **QUIET)
    talk.clear(_ready, None, box, cancels=[answering], **QUIET)


def choice(platform: Platform, model: str | None) -> gr.Dropdown:
    """The served models; the one that was chosen stays so while it is served."""
    try:
        models = platform.models()
    except UserError:
        return gr.Dropdown([], value=None, info=f"Nothing is served at {platform.url}: deploy a config in Serve")
    return gr.Dropdown(models, value=model if model in models else next(iter(models), None), info="")


def ask(text: str, said: Conversation) -> tuple[gr.Textbox, Conversation]:
    if not text.strip():
        return gr.Textbox(value=""), said
    return gr.Textbox(value="", submit_btn=False, stop_btn=True), [*said, {"role": "user", "content": text}]


def answer(
    platform: Platform, said: Conversation, model: str | None, **options: Any
) -> Iterator[tuple[Conversation, Any]]:
    """The conversation with the answer growing. A mistake gives the question back to the box."""
    if not said or said[-1]["role"] != "user":
        return
    text = ""
    try:
        if model is None:
            raise UserError("choose a model first; where there is none, deploy one in the Serve tab")
        for piece in platform.chat(model, plain(said), **options):
            text += piece
            yield [*said, {"role": "assistant", "content": text}], gr.skip()
    except UserError as error:
        gr.Warning(html.escape(str(error)), duration=15)
        yield said[:-1], gr.Textbox(value=plain(said)[-1]["content"])


def plain(said: Conversation) -> list[dict[str, str]]:
    """Messages as the endpoint takes them; the browser's carry their text in parts, and more."""
    return [{"role": message["role"], "content": _text(message["content"])} for message in said]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _ready() -> gr.Textbox:
    return gr.Textbox(submit_btn=True, stop_btn=False)
