"""Where metrics go besides metrics.jsonl: Weights & Biases and TensorBoard. Both are written to by the driver alone.

metrics.jsonl is the record; what is here repeats it. A step that is done again, after a worker was lost or the run was
interrupted, gives what it gave before: order, dropout and rate all follow from the step. So the first line of a step
stands, and a tracker gets every step once.
"""

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from finetune.config import FinetuneConfig, Track
from plugins.pretrained import first_line
from plugins.spec import UserError, plain

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id"  # in the run directory: which run of W&B this is
TENSORBOARD = "tensorboard"
WANDB_FINISH_S = 300.0  # to send what is left at the end; without a limit a lost network would hold the run for ever


class Tracker(Protocol):
    def log(self, line: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl. Of a run that is resumed, the lines that it has already come first."""

    def finish(self, metrics: dict[str, float] | None) -> None:
        """Take the metrics of run.json, and let go of everything. None: the run broke off."""


def check(track: Track) -> None:
    """Raise UserError where W&B would not take this run: a project that cannot be, no key, nobody there, key refused."""
    if track.wandb is None:
        return
    import wandb

    named = f"track.wandb = {track.wandb!r}"
    offline = "track.offline=true writes to the run directory only"
    try:
        settings = wandb.setup(wandb.Settings(project=track.wandb, mode="online", silent=True)).settings
        if track.offline:
            return
        # W&B itself would try for long, and not say why it gives up.
        httpx.get(settings.base_url, timeout=10)
        # No prompt: a run may be a job, and nobody there to answer.
        if not wandb.login(prompt=False, verify=True):
            raise UserError(f"{named}: no key for W&B: set WANDB_API_KEY or run wandb login; {offline}")
    except httpx.TransportError as error:
        raise UserError(f"{named}: {settings.base_url} cannot be reached ({first_line(error)}); {offline}") from error
    except wandb.Error as error:
        raise UserError(f"{named}: {first_line(error)}") from error
    finally:
        wandb.teardown()


@contextmanager
def opened(config: FinetuneConfig, run: Path) -> Iterator[list[Tracker]]:
    """The trackers that `config` asks for. The block finishes them; one that breaks off is marked so.

    A run that goes on goes on in the same run of W&B, and in the same directory of event files. Raises UserError.
    """
    trackers: list[Tracker] = []
    try:
        if config.track.wandb is not None:
            trackers.append(Wandb(config, run))
        if config.track.tensorboard:
            trackers.append(EventFiles(config, run))
        yield trackers
    except BaseException:
        for tracker in trackers:
            tracker.finish(None)
        raise


class Wandb:
    """A run of Weights & Biases, with the config, a step for each line, and the final metrics as its summary."""

    def __init__(self, config: FinetuneConfig, run: Path) -> None:
        import wandb

        assert config.track.wandb is not None
        if not (run / WANDB_ID).exists():
            (run / WANDB_ID).write_text(secrets.token_hex(4))
        name = (run / WANDB_ID).read_text()
        if config.track.offline:
            # Nobody can be asked what was sent: all lines come again, so what lies here of this run goes.
            for begun in (run / "wandb").glob(f"offline-run-*-{name}"):
                shutil.rmtree(begun)
        try:
            self.run = wandb.init(
                project=config.track.wandb,
                name=config.name,
                id=name,
                dir=run,
                config=plain(config),
                mode="offline" if config.track.offline else "online",
                resume=None if config.track.offline else "allow",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    finish_timeout=WANDB_FINISH_S,
                    finish_timeout_raises=True,
                ),
            )
        except wandb.Error as error:
            wandb.teardown()
            raise UserError(f"track.wandb = {config.track.wandb!r}: {first_line(error)}") from error
        self.files = Path(self.run.settings.sync_dir)
        log.info("W&B: %s", f"offline, in {self.files}" if config.track.offline else self.run.url)

    def log(self, line: dict[str, Any]) -> None:
        if line["step"] >= self.run.starting_step:  # what W&B has of a run that goes on ends before it
            self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def finish(self, metrics: dict[str, float] | None) -> None:
        import wandb

        try:
            self.run.summary.update(metrics or {})
            self.run.finish(exit_code=1 if metrics is None else 0)
        except TimeoutError:
            log.warning(
                "W&B has not taken everything in %g s: wandb sync %s sends the rest", WANDB_FINISH_S, self.files
            )
        finally:
            wandb.teardown()  # its service is a process of its own


class EventFiles:
    """TensorBoard's event files: a scalar for each number of a line; the config and the final metrics as text.

    They are made anew from metrics.jsonl when a run goes on: so no step is missing, and none is there twice.
    """

    def __init__(self, config: FinetuneConfig, run: Path) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(run / TENSORBOARD, ignore_errors=True)
        self.writer = SummaryWriter(str(run / TENSORBOARD), flush_secs=5)
        self._add_text("config", plain(config))

    def log(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, line["step"])

    def finish(self, metrics: dict[str, float] | None) -> None:
        if metrics is not None:
            self._add_text("summary", metrics)
        self.writer.close()

    def _add_text(self, name: str, value: Any) -> None:
        self.writer.add_text(name, f"```\n{json.dumps(value, indent=2)}\n```")
