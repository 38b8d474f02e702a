"""Fused implementations of losses, each beside its plain-PyTorch twin."""
