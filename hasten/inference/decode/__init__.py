"""The decode engine: one CUDA graph per batch size, over a KV cache that grows in blocks."""

from hasten.inference.decode.engine import DecodeEngine

__all__ = ["DecodeEngine"]
