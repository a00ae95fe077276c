"""Model id in a request -> the deployment that answers it. Pure functions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from plugins.types import RequestError

Makes = Literal["text", "embeddings"]


@dataclass(frozen=True)
class Route:
    """The base model whose deployment answers, and the adapter it applies (None: the base itself)."""

    base: str
    adapter: str | None
    makes: Makes = "text"


class UnknownModelError(LookupError):
    """A model id that nothing serves."""


def model_routes(served: Mapping[str, Sequence[str]], embedders: Collection[str] = ()) -> dict[str, Route]:
    """Every model id that clients may name: `base` and `base:run`, from {base: its runs}; and the `embedders`."""
    routes = {base: Route(base, None) for base in served}
    routes |= {f"{base}:{run}": Route(base, run) for base, runs in served.items() for run in runs}
    return routes | {base: Route(base, None, "embeddings") for base in embedders}


def find_route(model: str, routes: Mapping[str, Route], makes: Makes | None = None) -> Route:
    """The route of `model`, which must make `makes` (None: whatever).

    Raises UnknownModelError, whose message lists what there is, and RequestError for a model that makes something else.
    """
    if model not in routes:
        raise UnknownModelError(f"model {model!r} does not exist here; there are: {', '.join(routes)}")
    route = routes[model]
    if makes is not None and route.makes != makes:
        able = ", ".join(name for name, other in routes.items() if other.makes == makes) or "none here"
        raise RequestError(f"model {model!r} makes {route.makes}, not {makes}; models for {makes}: {able}", "model")
    return route
