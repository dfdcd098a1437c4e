"""Bundles: models of every operation of a space, to be timed on a device, and what they tell."""
