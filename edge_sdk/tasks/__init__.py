"""Tasks: what a payload means to a model, and what its outputs mean to a person."""
