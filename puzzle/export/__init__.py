"""From a library and an architecture to a checkpoint that engines serve."""
