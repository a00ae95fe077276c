"""Constraints: what an answer may still say, token by token, so that the whole of it matches a schema or an expression.

Byte-level grammars over any tokenizer's tokens, by llguidance.
"""

import functools
import json
from typing import Any

from plugins.pretrained import first_line
from plugins.types import Constraint, RequestError

KEPT = 64  # compiled grammars of one tokenizer; the one that was asked for longest ago goes

# Between the parts of JSON: a space, or a new line with its indent. Bounded: a model that begins with blanks may never end.
BLANK = r"(\x20|\r?\n[\x20\t]{0,32})"

ANY_OBJECT = '{"type": "object"}'

FUEL = (
    200_000  # steps to compile expressions: a schema of hundreds of fields takes half; (a{1000}){1000} stops in 0.1 s
)


class Matcher:
    """The state of one answer's grammar."""

    def __init__(self, matcher: Any, field: str) -> None:
        self._matcher, self._field = matcher, field

    def mask(self) -> bytes:
        """The tokens that may come next: a bit each, the lowest of each byte first."""
        found: bytes = self._matcher.compute_bitmask()
        return found

    def take(self, token: int) -> None:
        """The answer goes on with `token`. Raises RequestError where the grammar has outgrown its limits."""
        self._matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Raise RequestError where the grammar cannot go on."""
        if self._matcher.is_error():
            said = self._matcher.get_error().replace("<non-verbose/>", "").strip().split("\n")[0]
            raise RequestError(f"{self._field}: {said}", self._field)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """The constraints on the answers in one tokenizer's tokens, each compiled once. For one thread at a time.

    `ends`: the tokens that end an answer, allowed where the grammar may end.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        from llguidance import hf

        self._tokens = hf.from_tokenizer(tokenizer, eos_token=sorted(ends) or None)
        self._compiled = functools.lru_cache(maxsize=KEPT)(self._compile)

    def matcher(self, constraint: Constraint) -> Matcher:
        """Raises RequestError, which names the constraint's field, for what is no grammar or one too large."""
        return Matcher(self._compiled(constraint).deep_copy(), constraint.field)

    def _compile(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _grammar(constraint)
        except ValueError as error:
            raise RequestError(f"{constraint.field}: {first_line(error)}", constraint.field) from error
        limits = LLParserLimits(initial_lexer_fuel=FUEL, verbose_errors=False)
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        first = Matcher(matcher, constraint.field)
        first.check()
        first.mask()  # compiles most of it: better here than between two steps of the batch
        first.check()
        return matcher


def lark(constraint: Constraint) -> str:
    """An expression, or one of several texts, as a grammar in Lark's syntax."""
    from llguidance import regex_to_lark

    if constraint.kind == "regex":  # with \d and \w in ASCII, as in the patterns of a JSON schema
        return f"start: /{regex_to_lark(constraint.value, 'dw')}/"
    return "start: " + " | ".join(json.dumps(text) for text in constraint.value)


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own words. Raises ValueError for a schema that is not JSON."""
    from llguidance import LLMatcher

    if constraint.kind in ("regex", "choice"):
        return str(LLMatcher.grammar_from_lark(lark(constraint)))
    schema = constraint.value if constraint.kind == "json_schema" else ANY_OBJECT
    return str(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": BLANK}))
