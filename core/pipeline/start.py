"""A worker's models, ready for its first job."""

import logging

import diffusers
import torch
import transformers

from core.pipeline.compiling import warm_up
from core.pipeline.models import Models
from core.settings import Settings
from core.weights.profiles import load_profile

log = logging.getLogger(__name__)


def initialize_models(settings: Settings | None = None) -> Models:
    """Load the models the environment (or `settings`) asks for, on the GPU when there is one.

    Raises SettingsError or ModelError, each with one sentence.
    """
    settings = settings or Settings.from_env()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    models = Models(load_profile(settings), torch.device(device), settings.memory_mode, settings)
    log.info("%s models loaded in %.1f s (%s)", models.profile.name, models.load_seconds, models.memory_mode)
    warm_up(models, settings.compile_cache)
    return models
