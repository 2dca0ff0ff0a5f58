"""transformers' `from_pretrained` arguments that hasten hands on, and the type of each."""

from collections.abc import Mapping

PASSED: Mapping[str, str] = {
    "cache_dir": "str | None",
    "force_download": "bool",
    "local_files_only": "bool",
    "subfolder": "str",
    "config": "Any",
    "disable_mmap": "bool",
    "generation_config": "Any",
    "key_mapping": "dict[str, str] | None",
    "max_memory": "Any",
    "offload_buffers": "bool",
    "offload_folder": "str | None",
    "quantization_config": "Any",
    "variant": "str | None",
}
HUB = ("cache_dir", "force_download", "local_files_only", "subfolder")
"""Those among them that say where files come from."""
