"""Pretext objectives: what a network learns from, one file each."""
