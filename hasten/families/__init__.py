"""The supported model families, one data file each."""

from hasten.families import cohere, cohere2, gemma, gemma2, gemma3_text, granite, llama, mistral, qwen2, qwen3
from hasten.families.schema import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    "cohere": cohere.FAMILY,
    "cohere2": cohere2.FAMILY,
    "granite": granite.FAMILY,
}
