"""Offline statistics of every sync point, and the constants schemes derive from them (METHOD: paper section 3)."""
