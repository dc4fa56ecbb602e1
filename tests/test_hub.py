"""The default profile from a hub: what is downloaded, at which revision, and once."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.settings import Settings
from core.weights.profiles import load_profile
from tests.fake_hub import fake_hub
from tests.fake_runpod import environment, run_handler
from tests.tiny import TINY_MODELS

ROOT = Path(__file__).parents[1]
LOAD = "from core.pipeline import initialize_models; m = initialize_models(); m.use_direction('f1')"


@pytest.fixture
def hub():
    """The tiny models under the real models' names."""
    profile = load_profile(Settings())
    repositories = {
        profile.transformers["i2v"].location: TINY_MODELS / "framepack",
        profile.transformers["f1"].location: TINY_MODELS / "framepack_f1",
        profile.hunyuan.location: TINY_MODELS / "hunyuan",
        profile.redux.location: TINY_MODELS / "redux",
    }
    with fake_hub(repositories) as hub:
        yield hub


def load(hub, tmp_path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Load both transformers of the default profile in a process of its own."""
    own = {"MODEL_PROFILE": "framepack", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")}
    return subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=ROOT,
        env=environment(**{"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"} | own | variables),
        capture_output=True,
        text=True,
        check=False,
    )


def test_models_come_from_the_hub_at_their_pinned_revisions_and_only_once(hub, tmp_path):
    first = load(hub, tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    profile = load_profile(Settings())
    pinned = {
        s.location: s.revision for s in [*profile.transformers.values(), profile.hunyuan, profile.redux]
    }
    asked = {(repository, revision) for repository, revision, _ in hub.asked}
    assert asked == set(hub.listed) == set(pinned.items())

    hub.forget()
    again = load(hub, tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert not hub.tokens  # not a single request, though it may ask


def start_up_error(hub, tmp_path, **variables: str) -> str:
    """The one line with which a worker ends that cannot start."""
    own = {"MODEL_PROFILE": "framepack", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = run_handler(**{"HF_HUB_OFFLINE": "0"} | own | variables)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "cannot start" in line]
    return line


def test_a_repository_that_is_not_there_is_named_in_one_line(hub, tmp_path):
    hub.repositories.clear()
    assert "hunyuanvideo-community/HunyuanVideo" in start_up_error(hub, tmp_path)


def test_a_file_that_arrives_damaged_is_named_in_one_line(hub, tmp_path):
    hub.corrupt = {"hunyuanvideo-community/HunyuanVideo/vae/diffusion_pytorch_model.safetensors"}
    assert "vae/diffusion_pytorch_model.safetensors" in start_up_error(hub, tmp_path)
