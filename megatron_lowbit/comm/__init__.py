"""The low-bit all-reduce of row-parallel layers: formats, schemes, codecs, collectives (see README.md here)."""
