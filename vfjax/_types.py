"""The types that signatures name."""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array
PyTree = Any
"""A nested container with arrays at its leaves."""
