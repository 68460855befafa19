"""Fused operations of a decoding step: defined in torch, written in C and Triton, used by the layers of the network."""
