"""The web page: what its tabs do with a Platform, and the main path in a real browser, on a real cluster."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from small_models import save_model

from ui.app import application
from ui.client import Application, Job, Platform, Status
from ui.tabs import chat, configs, finetune, serve

ROOT = Path(__file__).resolve().parents[1]
MANTA = Path(sys.executable).parent / "manta"
SLOW_MS = 120_000  # the longest that two busy cores may take for one step of the main path
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
OPENING = """
import sys
from starlette.testclient import TestClient
from ui.app import application
from ui.client import Platform
from ui.tabs import chat, finetune, serve

platform = Platform("http://127.0.0.1:1")
assert TestClient(application(platform)).get("/").status_code == 200
finetune.look(platform, "outputs", None, None), serve.served(platform), chat.choice(platform, None)
print([name for name in ("ray", "torch", "transformers", "finetune", "serve") if name in sys.modules])
"""


@pytest.mark.slow
def test_opening_the_page_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", OPENING], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([MANTA, "ui", "--port", str(port)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"manta: port = {port} on '127.0.0.1' cannot be used")


def test_the_shipped_configs_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert "configs/finetune/demo_lora.py" in configs.config_files("configs/finetune")
    monkeypatch.chdir(tmp_path)
    assert str(ROOT / "configs/serve/demo.py") in configs.config_files("configs/serve")


def test_overrides_are_one_a_line() -> None:
    assert configs.chosen(" my.py ", "a=1\n\n  b.c=x y \n") == (Path("my.py"), ["a=1", "b.c=x y"])


class Stub(Platform):
    """A Platform whose cluster and endpoint are only said to be there."""

    def __init__(self, *, jobs: Sequence[Job] = (), log: str = "", statuses: Sequence[Status] = ()) -> None:
        super().__init__("http://127.0.0.1:1")
        self.the_jobs, self.log, self.statuses = list(jobs), log, iter(statuses)
        self.deployed: Future[list[str]] = Future()

    def is_connected(self) -> bool:
        return True

    def jobs(self) -> list[Job]:
        return self.the_jobs

    def logs(self, job: str) -> str:
        return self.log

    def status(self) -> Status | None:
        return next(self.statuses)

    def serve(self, config: Any) -> list[str]:
        return self.deployed.result(timeout=60)


def write_metrics(run: Path, *losses: float) -> None:
    run.mkdir(parents=True)
    lines = [{"step": step, "steps": 9, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines[-1]["eval_loss"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_finetune_tab_shows_runs_losses_and_the_newest_job(tmp_path: Path) -> None:
    write_metrics(tmp_path / "mine", 2.0, 1.0)
    job = Job("job_1", "FAILED", "python -m finetune configs/finetune/demo_lora.py a=1", None)
    view = finetune.look(Stub(jobs=[job], log="at work\nfinetune: no rows\n"), str(tmp_path), None, None)
    assert view.runs == [["mine", "step 2 of 9", ""]]
    assert view.losses == [(1, 2.0, "training rows"), (2, 1.0, "training rows"), (2, 0.5, "held-out rows")]
    assert finetune.job_state(view.job, view.log) == "`job_1` failed: finetune: no rows"
    assert finetune.job_label(job) == "demo_lora.py failed"


def test_a_run_that_has_just_been_started_shows_no_other_run(tmp_path: Path) -> None:
    write_metrics(tmp_path / "old", 2.0)
    view = finetune.look(Stub(), str(tmp_path), "new", None)
    assert (view.run, view.losses) == ("new", [])


def test_only_what_has_changed_goes_to_the_browser(tmp_path: Path) -> None:
    view = finetune.look(Stub(), str(tmp_path), None, None)
    *first, shown = finetune.changes(view, {})
    write_metrics(tmp_path / "mine", 2.0)
    *second, _ = finetune.changes(finetune.look(Stub(), str(tmp_path), None, None), shown)
    skipped = [isinstance(update, dict) and set(update) == {"__type__"} for update in second]
    assert len(first) == len(second) == 8
    assert skipped == [False, False, False, True, True, True, True, True]  # title, runs and losses are new


SERVE_CONFIG = """
from serve import *
config = ServeConfig(models=(ServedModel(id="tiny", source=ModelSource("/tmp")),))
"""


def serving(*applications: Application) -> Status:
    return Status("2 CPUs", 1.0, [], list(applications))


@pytest.mark.slow
def test_a_deployment_that_is_stopped_ends_the_wait(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(SERVE_CONFIG)
    platform = Stub(statuses=[serving(), serving(Application("manta", "DEPLOYING", "")), serving()])
    said = list(serve.deploy(platform, tmp_path / "s.py", []))
    assert [line.partition(":")[0] for line in said] == ["Deploying `manta`"] * 2 + ["`manta` was stopped."]


def test_a_deployment_on_another_port_than_the_page_asks_says_so(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(SERVE_CONFIG)
    platform = Stub()
    platform.deployed.set_result(["tiny"])
    assert list(serve.deploy(platform, tmp_path / "s.py", ["port=8123"]))[-1].startswith(
        "Serving `tiny` on port 8123; to chat here, open the page with `--url`."
    )


def test_a_question_that_cannot_be_answered_comes_back() -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    with pytest.warns(UserWarning, match="nothing answers at http://127.0.0.1:1"):
        [(conversation, box)] = chat.answer(Platform("http://127.0.0.1:1"), said, "tiny", temperature=0)
    assert conversation == []
    assert box.value == "Hello?"


class Parrot(Platform):
    """Says what it was told, for ever; knows when it was interrupted."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.interrupted = threading.Event()

    def models(self) -> list[str]:
        return ["parrot"]

    def chat(self, model: str, messages: Sequence[dict[str, str]], **options: Any) -> Iterator[str]:
        try:
            for number in itertools.count():
                yield f"{messages[-1]['content']} {len(messages)}.{number} "
                time.sleep(0.05)
        finally:
            self.interrupted.set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = filter(None, (os.environ.get("MANTA_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"))
    path = next((found for name in names if (found := shutil.which(name))), None)  # None: Playwright's own
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield launched
        launched.close()


class Window:
    """A browser window of its own, with what it asked for and what went wrong in it."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.url = url
        self.page: Page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        # gradio's plot measures itself once more after its tab was left
        self.page.on("pageerror", lambda error: "offsetWidth" in str(error) or self.errors.append(str(error)))
        self.page.goto(url)
        expect(self.labelled("Config")).to_be_visible(timeout=30_000)

    def labelled(self, label: str) -> Locator:
        return self.page.get_by_label(label).filter(visible=True).first

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).filter(visible=True).click()

    def sees(self, text: str, *, timeout: float = 20_000) -> None:
        expect(self.page.get_by_text(text).filter(visible=True).first).to_be_visible(timeout=timeout)

    def configure(self, path: Path, overrides: str) -> None:
        self.labelled("Config").fill(str(path))
        self.labelled("Config").press("Enter")
        self.labelled("Overrides").fill(overrides)

    def say(self, text: str) -> None:
        box = self.page.get_by_placeholder("Say something")
        box.fill(text)
        box.press("Enter")

    @property
    def answers(self) -> Locator:
        return self.page.get_by_test_id("bot")

    def asked_elsewhere(self) -> list[str]:
        return [url for url in self.asked if not url.startswith((self.url, "data:", "blob:"))]


@pytest.fixture
def parrot() -> Iterator[tuple[Parrot, str]]:
    """The page of a Parrot, and its address."""
    platform = Parrot()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(platform), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield platform, f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.browser
def test_two_windows_chat_apart_and_an_answer_can_be_stopped(browser: Browser, parrot: tuple[Parrot, str]) -> None:
    platform, url = parrot
    one, other = Window(browser, url), Window(browser, url)
    for window, word in ((one, "apple"), (other, "pear")):
        window.tab("Chat")
        expect(window.labelled("Model")).to_have_value("parrot")
        window.say(word)
    expect(one.answers).to_contain_text("apple 1.9")  # while the other's answer goes on as well
    expect(other.answers).to_contain_text("pear 1.9")
    assert "pear" not in one.page.inner_text("body")
    assert "apple" not in other.page.inner_text("body")

    one.page.locator("button.stop-button").click()
    assert platform.interrupted.wait(10)
    time.sleep(0.5)
    left = one.answers.inner_text()
    one.say("plum")
    expect(one.answers.nth(1)).to_contain_text("plum 3.9")  # the turns before it were sent along
    assert one.answers.first.inner_text() == left
    assert one.errors == other.errors == []


@pytest.mark.browser
def test_a_click_on_a_run_shows_its_losses(
    browser: Browser, parrot: tuple[Parrot, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, url = parrot
    monkeypatch.setenv("MANTA_ROOT", str(tmp_path))
    for name in ("older", "newer"):
        write_metrics(tmp_path / "outputs" / name, 2.0, 1.0)
    window = Window(browser, url)
    window.sees("Losses of newer")
    window.page.get_by_role("gridcell", name="older").filter(visible=True).click()
    window.sees("Losses of older")


@pytest.mark.browser
def test_a_picture_in_an_answer_is_not_fetched_from_another_host(browser: Browser, parrot: tuple[Parrot, str]) -> None:
    _, url = parrot
    window = Window(browser, url)
    replies: list[str] = []
    window.page.on("response", lambda response: replies.append(response.url))
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(2)
        window.tab("Chat")
        expect(window.labelled("Model")).to_have_value("parrot")
        window.say(f"![x](http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png)")
        expect(window.answers.locator("img").first).to_be_attached()
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert any("Content Security Policy" in error for error in window.errors)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and configs that finetune and serve them."""
    folder = tmp_path_factory.mktemp("project")
    save_model(folder / "base")
    rows = [{"instruction": f"say {i}", "output": f"fox {i}"} for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "finetune.py").write_text(
        "from finetune import *\n"
        "config = FinetuneConfig(\n"
        f"    name='fox', model=ModelSource({str(folder / 'base')!r}, dtype='fp32'),\n"
        f"    data=Data(source=Jsonl({str(folder / 'rows.jsonl')!r}), processor=Instruct(), validation=0.25),\n"
        f"    train=Train(max_steps=100, batch_size=4, log_every=2), output={str(folder / 'outputs')!r})\n"
    )
    (folder / "serve.py").write_text(
        "from serve import *\n"
        f"config = ServeConfig(models=(ServedModel(id='base', source=ModelSource({str(folder / 'base')!r}, dtype='fp32'),\n"
        f"    adapters=({str(folder / 'outputs' / 'fox')!r},)),))\n"
    )
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def endpoint() -> int:
    """The port where models will be served."""
    return free_port()


@pytest.fixture
def manta_ui(endpoint: int, tmp_path: Path) -> Iterator[str]:
    """The address of `manta ui` as a process, for a user who has no Ray token and runs no cluster."""
    port = free_port()
    command = [MANTA, "ui", "--port", str(port), "--url", f"http://127.0.0.1:{endpoint}"]
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                httpx.get(url, timeout=30)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
    finally:
        print((tmp_path / "log").read_text())
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# Notes how long the answer was each time it grew.
WATCH = """() => {
    window.lengths = [];
    new MutationObserver(() => {
        const length = document.querySelector("[data-testid=bot]")?.innerText.length ?? 0;
        if (length > (window.lengths.at(-1) ?? 0)) window.lengths.push(length);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.mark.browser
def test_the_main_path_from_a_config_to_a_chat(browser: Browser, manta_ui: str, endpoint: int, project: Path) -> None:
    window = Window(browser, manta_ui)
    window.configure(project / "finetune.py", "train.max_stepz=6")
    window.press("Start run")
    window.sees("train.max_stepz: Train has no field 'max_stepz'; did you mean 'max_steps'?")

    window.configure(project / "finetune.py", "train.max_steps=6\ntrain.eval_every=2")
    window.press("Show config")
    window.sees("max_steps=6")
    window.press("Start run")
    window.sees("is running", timeout=SLOW_MS)
    window.sees("finished, held-out loss", timeout=SLOW_MS)
    window.sees("Losses of fox")
    window.sees("held-out rows")

    window.tab("Serve")
    window.configure(project / "serve.py", f"port={endpoint}")
    window.press("Deploy")
    window.sees("Deploying manta")
    window.sees("base:fox", timeout=SLOW_MS)

    window.tab("Chat")
    expect(window.labelled("Model")).to_have_value("base")
    window.labelled("Model").click()
    window.page.get_by_role("option", name="base:fox").click()
    window.labelled("Max tokens").fill("100")
    window.page.evaluate(WATCH)
    window.say("the quick brown")
    expect(window.answers).to_be_visible(timeout=60_000)
    expect(window.page.locator("button.submit-button")).to_be_visible(timeout=60_000)
    assert len(window.page.evaluate("window.lengths")) > 2  # it grew as it came

    window.tab("Serve")
    window.press("Stop serving")
    window.sees("Nothing is served")
    window.tab("Finetune")
    window.configure(project / "finetune.py", "name=long\ntrain.max_steps=100000")
    window.press("Start run")
    window.sees("is running", timeout=SLOW_MS)
    window.press("Stop job")
    window.sees("was stopped")
    assert window.asked_elsewhere() == []
    assert window.errors == []
