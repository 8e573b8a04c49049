"""Global axes: one hidden width, one depth, one size of Mamba-2 for a whole parent."""
