"""OpenAI's bodies of /v1/embeddings (https://platform.openai.com/docs/api-reference/embeddings)."""

import base64
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from plugins.engines import Embeddings
from plugins.types import RequestError

Texts = tuple[str | tuple[int, ...], ...]  # each a text, or its token ids

MOST = 2048  # texts in a request, as OpenAI has it
HARMLESS = {"user"}  # changes nothing: taken and left alone


def _check_input(value: Any) -> Any:
    """In one line, where pydantic would say for each of the four kinds why it is not that."""
    items = value if isinstance(value, list) else [value]
    texts = all(isinstance(item, str) for item in items)
    tokens = isinstance(value, list) and all(type(item) is int for item in items)
    lists = all(isinstance(item, list) and all(type(token) is int for token in item) for item in items)
    if not (texts or tokens or (lists and isinstance(value, list))):
        raise PydanticCustomError(
            "input", "must be a string, a list of strings, token ids, or a list of lists of token ids"
        )
    return value


class EmbeddingBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    input: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_input)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    def texts(self) -> Texts:
        """What is to be embedded. Raises RequestError for too many texts, and for a field that nothing here heeds."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in HARMLESS:
                raise RequestError(f"{name} is not supported here; leave it out", name)
        # A string and one list of token ids are one text each.
        is_one = isinstance(self.input, str) or (self.input and isinstance(self.input[0], int))
        texts: list[Any] = [self.input] if is_one else list(self.input)
        if len(texts) > MOST:
            raise RequestError(f"input has {len(texts)} texts; at most {MOST} in a request", "input")
        return tuple(text if isinstance(text, str) else tuple(text) for text in texts)


def answer(body: EmbeddingBody, made: Embeddings) -> bytes:
    """The body of the answer, as JSON. base64 is of little-endian fp32."""
    if body.encoding_format == "base64":
        vectors: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in made.vectors]
    else:
        vectors = made.vectors.tolist()
    rows = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    whole = {"object": "list", "data": rows, "model": body.model, "usage": usage}
    return json.dumps(whole, separators=(",", ":")).encode()
