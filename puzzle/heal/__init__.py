"""Healing: train a whole child against its parent until it behaves like it again (`puzzle.heal.run.heal`)."""
