"""Serve language models on Ray Serve. These are the names that a config file needs."""

from plugins.engines import Embedder, Ipex, OpenVino, Torch, Upstream, Vllm
from plugins.types import ModelSource
from serve.config import Replicas, ServeConfig, ServedModel

__all__ = [
    "Embedder",
    "Ipex",
    "ModelSource",
    "OpenVino",
    "Replicas",
    "ServeConfig",
    "ServedModel",
    "Torch",
    "Upstream",
    "Vllm",
]
