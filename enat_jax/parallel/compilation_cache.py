"""Compiled programs kept between processes, so that a restart does not compile again."""

import os

import jax


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, unless the user has chosen one."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "enat_jax", "xla"))
