"""Training-free tensor-parallel LLM inference whose all-reduces travel at about 4 bits a value (arXiv 2411.07942)."""
