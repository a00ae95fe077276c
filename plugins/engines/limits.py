"""What an engine holds a request against: the model's length, its vocabulary, and the rules about each field."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from plugins.engines.text import prompt_field
from plugins.spec import UserError
from plugins.types import GenerateRequest, RequestError

MOST_LOGPROBS = 20  # alternatives a token, as vLLM has it: each is looked up and sent
LONGEST = 4096  # tokens of prompt and answer where the user sets no max_length: what a cache for a batch may cost


def longest(config: Any, wanted: int | None, field: str) -> int:
    """Tokens of prompt and answer together: `wanted`, or what the model was made for. Raises UserError, naming `field`."""
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if wanted is not None and made_for is not None and wanted > made_for:
        raise UserError(f"{field} = {wanted}: this model was made for at most {made_for} tokens")
    return wanted or min(made_for or LONGEST, LONGEST)


def own_defaults(said: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults for the fields of a request, from what a model's generation config says.

    How to draw counts only where it says do_sample: as in transformers, the values are nothing without it. `said` is only
    what the file says: older versions of transformers fill in defaults of their own, such as 50 for top_k.
    """
    names = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    if said.get("do_sample"):
        names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
    return {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs) is not None}


def answer_length(
    request: GenerateRequest, prompt: Sequence[int], longest: int, defaults: Mapping[str, Any]
) -> tuple[int, int]:
    """How many tokens the answer has at most, and at least. Raises RequestError for what is more than `longest`."""
    room = longest - len(prompt)
    size = f"{len(prompt)} tokens of prompt, and this model takes {longest} of prompt and answer together"
    if room < (0 if request.max_tokens == 0 else 1):
        raise RequestError(f"{prompt_field(request)} is too long: {size}", prompt_field(request))
    for field in ("max_tokens", "min_tokens"):
        wanted: int | None = getattr(request, field)
        if wanted is not None and wanted > room:
            raise RequestError(f"{field} = {wanted}: at most {room} ({size})", field)
    limit = request.max_tokens
    if limit is None:
        limit = min(room, max(defaults.get("max_tokens", room), request.min_tokens or 1))
    min_tokens = request.min_tokens
    if min_tokens is None:  # a grammar ends where it ends
        min_tokens = 0 if request.constraint else min(defaults.get("min_tokens", 0), limit)
    return limit, min_tokens


def check_numbers(request: GenerateRequest, vocabulary: int) -> None:
    """Raise RequestError for the first field whose value no answer can heed. `vocabulary`: the model's tokens."""

    def within(field: str, low: float, high: float = sys.float_info.max) -> bool:
        value = getattr(request, field)
        return value is None or low <= value <= high

    # A prompt may be read for its own sake.
    least = 0 if request.echo or request.prompt_logprobs is not None else 1
    most = min(MOST_LOGPROBS, vocabulary)
    token = f"be tokens of this model (0 to {vocabulary - 1})"
    rules = (
        ("max_tokens", within("max_tokens", least), f"be at least {least}"),
        ("min_tokens", within("min_tokens", 0), "be at least 0"),
        ("stop", all(request.stop), "be without empty strings"),
        ("stop_token_ids", all(0 <= found < vocabulary for found in request.stop_token_ids), token),
        ("temperature", within("temperature", 0), "be at least 0"),
        ("top_p", within("top_p", 0, 1) and request.top_p != 0, "be above 0 and at most 1"),
        ("top_k", within("top_k", 0), "be at least 0 (0: all tokens)"),
        ("min_p", within("min_p", 0, 1), "be from 0 to 1"),
        ("repetition_penalty", within("repetition_penalty", 0) and request.repetition_penalty != 0, "be above 0"),
        ("frequency_penalty", within("frequency_penalty", -2, 2), "be from -2 to 2"),
        ("presence_penalty", within("presence_penalty", -2, 2), "be from -2 to 2"),
        ("logit_bias", all(-100 <= bias <= 100 for bias in request.logit_bias.values()), "be from -100 to 100"),
        ("logit_bias", all(0 <= found < vocabulary for found in request.logit_bias), token),
        ("logprobs", within("logprobs", 0, most), f"be from 0 to {most}"),
        ("prompt_logprobs", within("prompt_logprobs", 0, most), f"be from 0 to {most}"),
    )
    for field, holds, words in rules:
        if not holds:
            raise RequestError(f"{field} = {getattr(request, field)!r}: must {words}", field)
    if request.max_tokens is not None and (request.min_tokens or 0) > request.max_tokens:
        wrong = f"min_tokens = {request.min_tokens}: at most max_tokens, which is {request.max_tokens}"
        raise RequestError(wrong, "min_tokens")
    if request.constraint is not None:
        # The answer ends where the grammar does, be that early or late.
        for field, given in (("ignore_eos", request.ignore_eos), ("min_tokens", request.min_tokens)):
            if given:
                raise RequestError(f"{field} cannot be combined with {request.constraint.field}", field)
