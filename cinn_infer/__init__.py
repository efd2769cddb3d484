"""Deployment of trained pipelines: compilation, static-graph export and the inference runtime."""
