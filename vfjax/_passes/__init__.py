"""One pass over data: checked, placed on devices, streamed, pooled."""
