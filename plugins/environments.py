"""Environments of engines whose libraries contradict ours: where they lie, and whether they are what they should be.

Each is a group of pyproject.toml's [dependency-groups]; scripts/engine-env NAME makes it, .venv-NAME beside .venv. On a
cluster it lies at the same place on every node.
"""

import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from plugins.cluster import PROJECT
from plugins.spec import UserError

# How often a thread of GNU OpenMP looks whether the others are ready before it sleeps: more is quicker on idle cores, but
# beside one other busy process a step then took up to a second. Of 30, 100 and 300 thousand this served best.
SHORT_WAITS = {"GOMP_SPINCOUNT": "100000"}

# Asked of an environment's own Python: its version, and those of the distributions named (None: not there).
ASK = """
import json, sys
from importlib.metadata import distributions
found = {name: next((d.version for d in distributions(name=name)), None) for name in sys.argv[1:]}
print(json.dumps([".".join(map(str, sys.version_info[:2])), found]))
"""


@dataclass(frozen=True)
class Environment:
    """One environment. `needs`: what has to be installed in it; Ray has to be the one that runs here."""

    name: str
    needs: tuple[Requirement, ...]
    folder: Path

    @classmethod
    def find(cls, name: str, *, gpus: float = 0) -> "Environment":
        """Environment `name`; with `gpus` NAME-gpu, where there is such a group."""
        with (PROJECT / "pyproject.toml").open("rb") as file:
            groups = tomllib.load(file)["dependency-groups"]
        if gpus and f"{name}-gpu" in groups:
            name = f"{name}-gpu"
        # The code of a submitted job is a copy; the environments lie beside the one that it runs in.
        places = [root / f".venv-{name}" for root in (PROJECT, Path(sys.prefix).parent)]
        folder = next((place for place in places if place.is_dir()), places[0])
        return cls(name, tuple(map(Requirement, groups[name])), folder)

    @property
    def python(self) -> str:
        return str(self.folder / "bin/python")

    def problem(self) -> str | None:
        """What is wrong with it, and the command that mends it, in one line; None where it is as it should be."""
        makes = f"scripts/engine-env {self.name} makes it"
        if not self.folder.is_dir():
            return f"{self.folder} is not there: {makes}"
        wrong = self._wrong()
        return f"{self.folder} {wrong}: rm -r {self.folder}, and {makes} anew" if wrong else None

    def check(self, field: str) -> None:
        """Raise UserError, naming `field`, where something is wrong with it. Takes as long as a Python takes to start."""
        if problem := self.problem():
            raise UserError(f"{field} needs an environment of its own, and {problem}")

    def _wrong(self) -> str | None:
        needs = [need for need in self.needs if need.marker is None or need.marker.evaluate()]
        command = [self.python, "-I", "-c", ASK, *(need.name for need in needs)]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return "has no Python that runs"
        python, found = json.loads(asked.stdout)
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if python != here:
            return f"has Python {python}, and this is {here}"
        for need in needs:
            wanted = Requirement(f"ray=={version('ray')}") if need.name == "ray" else need
            if found[need.name] is None:
                return f"has no {need.name}"
            if not wanted.specifier.contains(found[need.name], prereleases=True):
                return f"has {need.name} {found[need.name]}, not {wanted.specifier}"
        return None
