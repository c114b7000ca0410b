"""Model weights on disk: one reader contract, one file per format, strict and without unpickling anything."""
