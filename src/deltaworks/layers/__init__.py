"""Deltas in layers: an embedded encoding in which every layer refines the one before, down to the last bit."""
