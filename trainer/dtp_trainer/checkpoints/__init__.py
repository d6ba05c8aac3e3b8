"""Checkpoints: written in the background, committed behind a fence, verified when loaded."""
