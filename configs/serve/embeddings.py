"""Embeddings from a small sentence-transformers model of the Hugging Face hub, on http://127.0.0.1:8000/v1/embeddings."""

from serve import Embedder, ModelSource, ServeConfig, ServedModel

config = ServeConfig(
    name="embeddings",
    models=(
        ServedModel(
            id="all-MiniLM-L6-v2",
            source=ModelSource("sentence-transformers/all-MiniLM-L6-v2"),
            engine=Embedder(),
        ),
    ),
)
