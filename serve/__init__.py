"""Serve language models on Ray Serve. These are the names that a config file needs."""

from plugins.engines import Embedder, Torch, Upstream, Vllm
from plugins.types import ModelSource
from serve.config import Replicas, ServeConfig, ServedModel

__all__ = ["Embedder", "ModelSource", "Replicas", "ServeConfig", "ServedModel", "Torch", "Upstream", "Vllm"]
