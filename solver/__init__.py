"""Numbers in, choices out: pick one variant per layer under resource limits."""
