"""Deployment of trained pipelines: compilation, static-graph export and the inference runtime."""

import fast_diffusers  # noqa: F401  (sets threads and kernels before paddle is imported)
from cinn_infer.compile import CompiledModel, compile
from cinn_infer.export import export
from cinn_infer.runtime import load

__all__ = ["CompiledModel", "compile", "export", "load"]
