"""LoRA: named low-rank adapters on a model's linear layers, and their files."""

from fast_diffusers.lora.files import load, read_header, save
from fast_diffusers.lora.layers import (
    LoRAConfig,
    LoRALinear,
    active,
    adapters,
    freeze,
    fuse,
    inject,
    parameters,
    remove,
    set_default,
    state_dict,
    unfuse,
)

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "active",
    "adapters",
    "freeze",
    "fuse",
    "inject",
    "load",
    "parameters",
    "read_header",
    "remove",
    "save",
    "set_default",
    "state_dict",
    "unfuse",
]
