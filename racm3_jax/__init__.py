"""racm3_jax: retrieval-augmented multimodal language modelling (RA-CM3) in JAX.

Public names load lazily; importing the package imports no jax.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Document": "racm3_jax.types",
    "Segment": "racm3_jax.types",
    "GenerationOutput": "racm3_jax.types",
    "read_documents": "racm3_jax.documents.readers",
    "Memory": "racm3_jax.memory.memory",
    "DocumentEmbedder": "racm3_jax.retrieval.embedder",
    "MixedTokenizer": "racm3_jax.tokenizers.mixed",
    "Generator": "racm3_jax.generation.tasks",
    "train": "racm3_jax.run",
    "evaluate": "racm3_jax.run",
    "load": "racm3_jax.run",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"racm3_jax has no {name!r}; public names: {__all__}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
