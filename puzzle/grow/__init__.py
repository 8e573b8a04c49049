"""Growing: dense FFNs become mixtures of experts that start as the same function (`puzzle.grow.verb.grow_verb`)."""
