"""What a flat graph says: layers, norms, taps, groups, effects, batch axis, cost."""
