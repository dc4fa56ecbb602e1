"""The tiny random models in tests/golden, on which nearly every test runs: a job takes a second or two.

And the trained demo models, which animate, for the tests that look at the video.
"""

from pathlib import Path

from builder.make_demo_models import WEIGHTS
from core.settings import Settings

TINY_MODELS = Path(__file__).parent / "golden" / "tiny"


def models_at(folder: Path) -> dict[str, str]:
    """The environment of a demo worker with its models in `folder`, one transformer for each direction."""
    return {
        "MODEL_PROFILE": "demo",
        "HUNYUAN_MODEL": str(folder / "hunyuan"),
        "REDUX_MODEL": str(folder / "redux"),
        "FRAMEPACK_MODEL": str(folder / "framepack"),
        "FRAMEPACK_F1_MODEL": str(folder / "framepack_f1"),
    }


TINY_ENV = models_at(TINY_MODELS)
TINY = Settings.from_env(TINY_ENV)

# whose one transformer knows both directions
TRAINED_ENV = models_at(WEIGHTS) | {"FRAMEPACK_F1_MODEL": str(WEIGHTS / "framepack")}
