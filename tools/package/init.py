"""Af-DCD: distilling semantic-segmentation networks."""
