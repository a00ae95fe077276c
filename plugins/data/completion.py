"""Plain text, all of it learned."""

from plugins.spec import UserError, spec
from plugins.template import Tokenizer
from plugins.types import Example, Row


@spec
class Completion:
    """The field that holds the text. It ends with eos, so that the model learns where a text ends."""

    text: str = "text"

    def __call__(self, row: Row, tokenizer: Tokenizer) -> Example | None:
        text = row[self.text]
        if not isinstance(text, str):
            raise UserError(f"field {self.text!r} must be text, found {text!r}")
        if not text:
            return None
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token to end a text with")
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        return Example(ids, list(ids))
