"""The kinds of sub-block in vLLM's own layers, one file each; imported inside an engine alone (`puzzle.serving.vllm_model`)."""
