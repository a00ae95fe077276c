"""Model id in a request -> the deployment that answers it. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """The base model whose deployment answers, and the adapter it applies (None: the base itself)."""

    base: str
    adapter: str | None


class UnknownModelError(LookupError):
    """A model id that nothing serves."""


def model_routes(served: Mapping[str, Sequence[str]]) -> dict[str, Route]:
    """Every model id that clients may name: `base` and `base:run`, from {base: its runs}."""
    routes = {base: Route(base, None) for base in served}
    return routes | {f"{base}:{run}": Route(base, run) for base, runs in served.items() for run in runs}


def find_route(model: str, routes: Mapping[str, Route]) -> Route:
    """Raises UnknownModelError, whose message lists what there is."""
    if model not in routes:
        raise UnknownModelError(f"model {model!r} does not exist here; there are: {', '.join(routes)}")
    return routes[model]
