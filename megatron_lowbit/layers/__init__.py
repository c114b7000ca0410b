"""Building blocks of the transformer; each knows how its weights are cut over tensor-parallel ranks."""
