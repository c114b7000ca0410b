"""Decoder-only model families and the decoder they share."""
