"""Serve language models on Ray Serve. These are the names that a config file needs."""

from plugins.engines import Embedder, OpenVino, Torch, Upstream, Vllm
from plugins.types import ModelSource
from serve.config import Replicas, ServeConfig, ServedModel

__all__ = ["Embedder", "ModelSource", "OpenVino", "Replicas", "ServeConfig", "ServedModel", "Torch", "Upstream", "Vllm"]
