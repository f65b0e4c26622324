"""A calibration written down: YAML for llm-compressor, JSON for vLLM, and checkpoints."""

from .checkpoint import check_savable, packed_tensors, save_quantized, stored_bytes, stored_modules, to_config
from .config import from_config, override, recipe_of
from .files import check_file, free_folder, json_of, writable_file, write_text, write_whole
from .plain import args_to_dict, scheme_to_dict
from .sizes import bytes_with, module_bytes
from .yaml import from_yaml, observers_of, production_note, to_yaml

__all__ = [
    "args_to_dict",
    "bytes_with",
    "check_file",
    "check_savable",
    "free_folder",
    "from_config",
    "from_yaml",
    "json_of",
    "module_bytes",
    "observers_of",
    "override",
    "packed_tensors",
    "production_note",
    "recipe_of",
    "save_quantized",
    "scheme_to_dict",
    "stored_bytes",
    "stored_modules",
    "to_config",
    "to_yaml",
    "writable_file",
    "write_text",
    "write_whole",
]
