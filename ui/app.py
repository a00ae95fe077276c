"""The web page: another face of Platform. It opens at once; Ray and models load when an action needs them."""

import asyncio
import logging
import os
import signal
import socket
import threading

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plugins.spec import UserError
from ui.client import Platform
from ui.tabs.chat import chat_tab
from ui.tabs.finetune import finetune_tab
from ui.tabs.serve import serve_tab

log = logging.getLogger(__name__)


def open_page(platform: Platform, *, host: str, port: int) -> None:
    """Serve the page on http://host:port until interrupted. A cluster that the page started stops with it."""
    if host not in ("127.0.0.1", "localhost", "::1"):
        # The page runs config files, so whoever reaches it runs programs here.
        raise UserError(
            f"--host {host}: the page has no login, so it opens on 127.0.0.1 only; reach it through an SSH tunnel"
        )
    # Read when Ray is imported. Else a call that is late, after Ray was shut down, would start a second cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    logging.getLogger("uvicorn.error").addFilter(_is_no_hanging_up)
    listener = _listen(host, port)
    server = uvicorn.Server(
        uvicorn.Config(application(platform), log_level="warning", timeout_graceful_shutdown=1, access_log=False)
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what Ray started is stopped then too
    log.info("the page is on http://%s:%d; Ctrl-C closes it", host, port)
    try:
        server.run(sockets=[listener])
    finally:
        signal.alarm(0)  # Ray takes SIGTERM for a failure, and would abort this process 3 seconds later
        platform.disconnect()


def application(platform: Platform) -> FastAPI:
    """The page as a web application that asks no host but its own."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = FastAPI(openapi_url=None)
    app.add_middleware(OnlyThisHost)

    @app.post("/gradio_api/upload")
    def upload() -> None:
        """Gradio would store any file for anyone; a config that was stored so could be run by its path."""
        raise HTTPException(404)

    return gr.mount_gradio_app(  # type: ignore[no-any-return]
        app,
        page(platform),
        path="/",
        theme=_theme(),
        css=_CSS,
        footer_links=[],
        run_history=False,  # the browser would keep every call
        ssr_mode=False,
        show_error=True,
    )


def page(platform: Platform) -> gr.Blocks:
    with gr.Blocks(title="Manta", analytics_enabled=False) as blocks:
        gr.Markdown("# Manta\nFinetune a language model, serve it, talk to it.")
        with gr.Tabs():
            finetune_tab(blocks, platform)
            serve_tab(blocks, platform)
            chat_tab(blocks, platform)
    # By default a function runs once at a time, for all the browsers together.
    blocks.queue(default_concurrency_limit=20)
    return blocks


class OnlyThisHost:
    """ASGI middleware: forbids the browser to ask other hosts, also for a picture that a model's answer names."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def _is_no_hanging_up(record: logging.LogRecord) -> bool:
    """Whether a record of the web server is worth showing: that open pages are cut off at the end is not."""
    cut_off = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut_off and not record.getMessage().startswith("Cancel ")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(f"port = {port} on {host!r} cannot be used: {error.strerror}; choose another --port") from error


def _theme() -> gr.themes.Base:
    return gr.themes.Default(
        primary_hue="cyan",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],  # what the machine has: a font from elsewhere needs the network
        font_mono=["ui-monospace", "monospace"],
    )


_CSS = """
footer {display: none !important}
.log textarea {font-family: var(--font-mono); font-size: var(--text-sm)}
"""
