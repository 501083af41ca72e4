"""The published files: which there are, what a hub says of them, and how they get into the folders of models."""
