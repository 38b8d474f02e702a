"""What `tools/export.py` writes: traced networks, their check against PyTorch, the model card."""
