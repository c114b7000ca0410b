"""Encode and decode kernels of the low-bit collectives: tensors and integers only, no ranks, groups or layers."""
