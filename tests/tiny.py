"""The tiny random models in tests/golden, on which nearly every test runs: a job takes a second or two."""

from pathlib import Path

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
