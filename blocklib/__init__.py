"""The block library: variants of sub-blocks, their training, their cost, and where they live on disk."""
