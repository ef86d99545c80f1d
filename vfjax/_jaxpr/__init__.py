"""A jaxpr made flat, and run."""
