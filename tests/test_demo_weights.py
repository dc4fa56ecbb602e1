"""The demo models' way into the repository and out of it, with files of no models; then the real ones."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builder import make_demo_models
from builder.make_demo_models import MIB, MOST_OF_A_FILE, MOST_OF_ALL, WEIGHTS, main, place, read_sums, take
from core.errors import ModelError
from core.pipeline import Models
from core.settings import Settings
from core.weights.profiles import HUNYUAN, REDUX, TRANSFORMER, load_profile
from tests.hub_files import NEEDED, make_files
from tests.tiny import models_at

ROOT = Path(__file__).parents[1]
SHARD = "framepack/diffusion_pytorch_model-00002-of-00002.safetensors"
VAE = "hunyuan/vae/diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12972350\n"


def make_run(folder: Path, seed: int = 0) -> Path:
    """What a training run leaves, in small."""
    for part, names in (("hunyuan", HUNYUAN), ("redux", REDUX), ("framepack", TRANSFORMER)):
        make_files(folder / part, NEEDED[names], seed)
    (folder / "training.json").write_text(f'{{"seed": {seed}}}')
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def weights(run, tmp_path):
    """As tracked: a run that was taken, and a card that is no part of it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "README.md").write_text("What they are.")
    take(run, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_of(folder)}


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refusal(act, *arguments) -> str:
    with pytest.raises(ModelError) as error:
        act(*arguments)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


class TestPlacing:
    def test_the_models_are_a_runs(self, run, weights, tmp_path):
        place(tmp_path / "demo", weights)
        assert contents(tmp_path / "demo") == contents(run)

    def test_a_second_time_nothing_is_written(self, weights, tmp_path):
        place(tmp_path / "demo", weights)
        times = {path: path.stat().st_mtime_ns for path in files_of(tmp_path / "demo")}
        place(tmp_path / "demo", weights)
        assert {path: path.stat().st_mtime_ns for path in files_of(tmp_path / "demo")} == times

    def test_of_an_older_set_nothing_stays(self, run, weights, tmp_path):
        demo = tmp_path / "demo"
        make_files(demo / "framepack", ["config.json", "diffusion_pytorch_model.safetensors"], seed=7)
        make_files(demo / "framepack_f1", ["config.json", "diffusion_pytorch_model.safetensors"], seed=7)
        (demo / ".made").touch()
        place(demo, weights)
        assert contents(demo) == contents(run) | {".made": b""}

    def test_a_damaged_copy_is_mended(self, run, weights, tmp_path):
        place(tmp_path / "demo", weights)
        (tmp_path / "demo" / VAE).write_bytes(b"half")
        place(tmp_path / "demo", weights)
        assert contents(tmp_path / "demo") == contents(run)

    @pytest.mark.parametrize("name", [SHARD, "hunyuan/tokenizer_2/merges.txt"])
    @pytest.mark.parametrize(
        "damage",
        [lambda data: POINTER, lambda data: data[:-1], lambda data: data.replace(b"\n", b"\r\n") + b"\r"],
    )
    def test_what_is_not_as_hashed_is_named_and_nothing_written(self, name, damage, weights, tmp_path):
        data = damage((weights / name).read_bytes())
        (weights / name).write_bytes(data)
        sentence = refusal(place, tmp_path / "demo", weights)
        assert sentence.startswith(f"{weights / name} ({len(data)} bytes) is not as SHA256SUMS has it; ")
        assert "`git checkout -- builder/demo/weights`" in sentence
        assert not (tmp_path / "demo").exists()

    @pytest.mark.parametrize("name", [SHARD, "SHA256SUMS"])
    def test_what_is_missing_is_named_and_nothing_written(self, name, weights, tmp_path):
        (weights / name).unlink()
        assert refusal(place, tmp_path / "demo", weights).startswith(f"{weights / name} is missing; ")
        assert not (tmp_path / "demo").exists()

    @pytest.mark.parametrize("text", ["", POINTER.decode(), "0" * 63 + "  a\n"])
    def test_sums_that_are_none_are_damaged(self, text, weights, tmp_path):
        (weights / "SHA256SUMS").write_text(text)
        assert "SHA256SUMS is damaged; " in refusal(place, tmp_path / "demo", weights)

    def test_it_needs_no_torch(self):
        """So that it is done in no time."""
        code = "import sys, builder.make_demo_models; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestTaking:
    def test_a_new_run_replaces_the_last_one(self, run, weights, tmp_path):
        (weights / "framepack" / "of_the_last_run.json").write_text("{}")
        take(make_run(tmp_path / "new", seed=1), weights)
        taken = contents(weights)
        assert taken.pop("README.md") == b"What they are."
        assert taken.pop("SHA256SUMS") and taken == contents(tmp_path / "new") != contents(run)

    @pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
    def test_the_sums_are_sha256sums(self, run, weights):
        check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        done = subprocess.run(check, cwd=weights, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert len(done.stdout.splitlines()) == len(files_of(run))

    def test_taken_from_itself_only_the_sums_are_new(self, weights):
        (weights / "training.json").write_text('{"seed": 5}')
        before = contents(weights)
        take(weights, weights)
        after = contents(weights)
        assert before.pop("SHA256SUMS") != after.pop("SHA256SUMS")
        assert before == after
        assert read_sums(weights)["training.json"] == hashlib.sha256(b'{"seed": 5}').hexdigest()

    @pytest.mark.parametrize(
        "name", [SHARD, VAE, "redux/feature_extractor/preprocessor_config.json", "training.json"]
    )
    def test_what_a_run_lacks_is_named_and_nothing_taken(self, name, run, tmp_path):
        (run / name).unlink()
        assert f"{run / name} is missing." in refusal(take, run, tmp_path / "weights")
        assert not (tmp_path / "weights").exists()

    def test_a_half_written_file_is_named_and_nothing_taken(self, run, tmp_path):
        os.truncate(run / SHARD, 1000)
        assert f"{run / SHARD} is damaged or half-written" in refusal(take, run, tmp_path / "weights")
        assert not (tmp_path / "weights").exists()

    def test_too_large_a_file_is_named_and_nothing_taken(self, run, tmp_path):
        fill(run / "hunyuan" / "left_over.bin", MOST_OF_A_FILE + MIB // 2)
        sentence = refusal(take, run, tmp_path / "weights")
        assert sentence == f"{run / 'hunyuan' / 'left_over.bin'} has 16.5 MiB, and 16 may be tracked."
        assert not (tmp_path / "weights").exists()

    def test_too_large_a_set_is_refused_and_nothing_taken(self, run, tmp_path):
        for number in range(3):
            fill(run / "redux" / f"{number}.bin", 15 * MIB)
        assert (
            refusal(take, run, tmp_path / "weights") == f"All of {run} has 45.1 MiB, and 45 may be tracked."
        )
        assert not (tmp_path / "weights").exists()


def fill(path: Path, size: int) -> None:
    """Takes no room on the disk."""
    path.touch()
    os.truncate(path, size)


class TestCommand:
    @pytest.fixture(autouse=True)
    def elsewhere(self, weights, monkeypatch):
        """The repository's are not touched."""
        monkeypatch.setattr(make_demo_models, "WEIGHTS", weights)

    def test_it_places(self, run, tmp_path, capsys):
        assert main([str(tmp_path / "demo")]) == 0
        assert contents(tmp_path / "demo") == contents(run)
        assert capsys.readouterr().out == f"The demo models are in {tmp_path / 'demo'}\n"

    def test_it_takes(self, weights, tmp_path):
        new = make_run(tmp_path / "new", seed=1)
        assert main(["--take", str(new)]) == 0
        assert (weights / VAE).read_bytes() == (new / VAE).read_bytes()

    def test_it_fails_in_one_line(self, weights, tmp_path, capsys):
        (weights / VAE).write_bytes(POINTER)
        assert main([str(tmp_path / "demo")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert str(weights / VAE) in line

    def test_it_does_one_thing_at_a_time(self, tmp_path):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--take", str(tmp_path)])

    def test_make_runs_it_again_when_the_weights_are_others(self):
        rules = dict(re.findall(r"^([^\s:]+): (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert "builder/demo/weights/SHA256SUMS" in rules["models/demo/.made"].split()
        assert all("models/demo/.made" in rules[name].split() for name in ("demo", "test"))


class TestTracked:
    """The repository's own."""

    def test_every_file_is_hashed_and_small(self):
        sums = read_sums(WEIGHTS)
        sizes = {name: (WEIGHTS / name).stat().st_size for name in sums}
        assert max(sizes.values()) <= MOST_OF_A_FILE and sum(sizes.values()) <= MOST_OF_ALL
        parts = {path for path in contents(WEIGHTS) if "/" in path}
        assert parts | {"training.json"} == sums.keys()

    def test_they_load_and_serve_both_directions(self, tmp_path):
        place(tmp_path, WEIGHTS)
        settings = Settings.from_env(
            models_at(tmp_path) | {"FRAMEPACK_F1_MODEL": str(tmp_path / "framepack")}
        )
        models = Models(load_profile(settings), torch.device("cpu"))
        transformer = models.transformer
        models.use_direction("f1")
        assert models.transformer is transformer
        assert models.magnitudes.keys() == {"i2v", "f1"}  # measured: MagCache works for both
