"""Model-level code over diffusers: tensors and modules, no request, no path, no environment."""
