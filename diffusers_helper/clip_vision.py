"""Image → SigLIP hidden states, FramePack's image conditioning."""

import numpy as np
import torch
from transformers import SiglipImageProcessorPil, SiglipVisionModel


@torch.no_grad()
def encode_image(
    image: np.ndarray,
    feature_extractor: SiglipImageProcessorPil,
    image_encoder: SiglipVisionModel,
    device: torch.device,
) -> torch.Tensor:
    """(H, W, 3) uint8 → `last_hidden_state`, (1, patches, D), in the encoder's dtype."""
    inputs = feature_extractor.preprocess(images=image, return_tensors="pt")
    return image_encoder(inputs.pixel_values.to(device, image_encoder.dtype)).last_hidden_state
