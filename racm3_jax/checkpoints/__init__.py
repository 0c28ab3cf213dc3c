"""Weights as safetensors, and training state with Orbax; all verified before use.

Two formats, for two purposes:

- `save_weights` / `load_weights`: one directory with `model.safetensors` (flat
  `a/b/c` names), `config.json` (kind, config, fingerprint) and `manifest.json`, with
  the checksums. For finished models: portable, readable by any safetensors tool, no
  pickle.
- `Checkpoints`: the state of a run, saved asynchronously by Orbax and restored to any
  mesh. Orbax restores some corrupted checkpoints without an error, so each step has a
  sha256 manifest that is written last; `latest_good` verifies it, moves corrupted steps
  to `quarantine/` and falls back to the previous step.
"""

from __future__ import annotations

from racm3_jax.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    read_manifest,
    read_object,
    sealed_folder,
    verify_file,
    verify_folder,
    verify_manifest,
    write_manifest,
)
from racm3_jax.checkpoints.states import Checkpoints
from racm3_jax.checkpoints.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    build_config,
    compute_fingerprint,
    load_weights,
    read_config,
    round_to_half,
    save_weights,
    weights_folder,
    write_config,
    write_weights,
)

__all__ = [
    "CONFIG_NAME",
    "MANIFEST_NAME",
    "WEIGHTS_NAME",
    "CheckpointError",
    "Checkpoints",
    "build_config",
    "compute_fingerprint",
    "load_weights",
    "read_config",
    "read_manifest",
    "read_object",
    "round_to_half",
    "save_weights",
    "sealed_folder",
    "verify_file",
    "verify_folder",
    "verify_manifest",
    "weights_folder",
    "write_config",
    "write_manifest",
    "write_weights",
]
