"""Models on disk: which there are, where they lie, whether they are whole. Imports no torch."""
