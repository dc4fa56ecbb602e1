"""The image and the Hub's files: what can be checked of them without building anything."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import distribution
from pathlib import Path, PurePath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from core.images import decode_image
from core.request import parse_request
from core.settings import Settings
from tests.fake_runpod import environment, is_mp4, job_input

ROOT = Path(__file__).parents[1]
HUB = json.loads((ROOT / ".runpod" / "hub.json").read_text(encoding="utf-8"))
HUB_TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text(encoding="utf-8"))
PLATFORM_VARIABLES = {"RUNPOD_INIT_TIMEOUT"}  # read by RunPod, not by the worker
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")


@dataclass
class Stage:
    """A stage of the Dockerfile: what it copies from the repository, and all its instructions."""

    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    @property
    def copies(self) -> list[tuple[list[str], str]]:
        """Sources and target of each COPY that is not from another stage."""
        words = [shlex.split(text) for name, text in self.instructions if name == "COPY"]
        return [(sources, target) for *sources, target in words if not sources[0].startswith("--from=")]


def dockerfile() -> tuple[dict[str, str], dict[str, Stage]]:
    """The arguments before the first stage, and the stages by name; the last one is called `final`."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append(Stage(rest.split(" AS ")[1] if " AS " in rest else "final"))
        elif not stages:
            arguments |= [rest.split("=", 1)]
        else:
            stages[-1].instructions.append((name, rest))
    return arguments, {stage.name: stage for stage in stages}


ARGUMENTS, STAGES = dockerfile()


def is_sent(path: PurePath) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern for it or a parent decides."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        exception = pattern.startswith("!")
        if pattern and not pattern.startswith("#"):
            wanted = pattern.removeprefix("!")
            if any(fnmatch(str(part), wanted) for part in [path, *path.parents[:-1]]):
                sent = exception
    return sent


def copy_stage(stage: Stage, folder: Path) -> None:
    """Do a stage's COPY instructions into `folder`, as the build would; raises when a source is missing.

    Their targets are folders.
    """
    for sources, target in stage.copies:
        for source in sources:
            origin = ROOT / source
            base = origin if origin.is_dir() else origin.parent
            files = [path for path in origin.rglob("*") if path.is_file()] if origin.is_dir() else [origin]
            sent = [path for path in files if is_sent(path.relative_to(ROOT))]
            assert sent, f"nothing of {source} reaches the build"
            for path in sent:
                copy = folder / target / path.relative_to(base)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


class TestImage:
    @pytest.mark.parametrize(
        "source", sorted({s for stage in STAGES.values() for sources, _ in stage.copies for s in sources})
    )
    def test_what_it_copies_is_there(self, source):
        assert (ROOT / source).exists()

    def test_nothing_else_is_sent_to_its_build(self):
        for path in (
            "models/demo/.made",
            "builder/demo/weights/framepack/diffusion_pytorch_model-00001-of-00002.safetensors",
            "builder/make_demo_models.py",
            ".git/config",
            ".env",
            "outputs/a.mp4",
            "core/__pycache__/a.pyc",
        ):
            assert not is_sent(PurePath(path))

    def test_what_it_copies_is_enough_to_run_a_job(self, tmp_path):
        copy_stage(STAGES["final"], tmp_path)
        done = subprocess.run(
            [sys.executable, "handler.py", "--test_input", json.dumps({"id": "a", "input": job_input()})],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert is_mp4((tmp_path / "outputs" / "a.mp4").read_bytes())

    def test_what_fetches_the_weights_needs_no_more_than_their_stage_has(self, tmp_path):
        """None of the worker's other libraries and modules, so that their changes fetch nothing again."""
        copy_stage(STAGES["weights"], tmp_path)
        (install,) = [text for name, text in STAGES["weights"].instructions if "pip install" in text]
        absent = {Requirement(line).name for line in requirement_lines()} - with_dependencies(
            shlex.split(install)[2:]
        )
        assert {"torch", "diffusers", "transformers"} <= absent
        code = "import runpy, sys; sys.modules |= dict.fromkeys(sys.argv.pop().split(',')); " + (
            "runpy.run_module('builder.fetch_models', run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "--help", ",".join(absent)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "--models" in done.stdout

    def test_weights_and_dependencies_do_not_depend_on_the_handler(self):
        """Layers below a COPY are built anew when a file of it changes."""
        assert not {"handler.py", "core/"} & {s for sources, _ in STAGES["weights"].copies for s in sources}
        steps = [f"{name} {text}" for name, text in STAGES["final"].instructions]
        (install,) = [i for i, step in enumerate(steps) if "pip install -r" in step]
        copied_before = {step.split()[1] for step in steps[:install] if step.startswith("COPY")}
        assert copied_before == {"--from=weights", "requirements.txt"}

    def test_it_runs_as_the_user_asked_for_under_an_init(self):
        steps = STAGES["final"].instructions
        assert ("ARG", "RUN_AS=root") in steps and ("USER", "${RUN_AS}") in steps
        assert ("ENTRYPOINT", '["tini", "--"]') in steps and ("CMD", '["python", "handler.py"]') in steps

    def test_every_path_that_is_written_is_open_to_any_user_or_on_the_volume(self):
        (variables,) = [text for name, text in STAGES["final"].instructions if name == "ENV"]
        paths = {value for value in dict(re.findall(r"(\w+)=(\S+)", variables)).values() if "/" in value}
        assert len(paths) == 4
        assert all(path.startswith(("/tmp/", "/runpod-volume/")) for path in paths)

    def test_every_documented_build_argument_is_one_of_the_dockerfile(self):
        text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
        text += (ROOT / "Dockerfile").read_text(encoding="utf-8")
        steps = [step for stage in STAGES.values() for step in stage.instructions]
        known = ARGUMENTS.keys() | {rest.split("=")[0] for name, rest in steps if name == "ARG"}
        assert set(re.findall(r"--build-arg (\w+)=", text)) == known


def requirement_lines() -> list[str]:
    return [line for line in REQUIREMENTS.splitlines() if line and not line.startswith("#")]


def with_dependencies(lines: list[str]) -> set[str]:
    """The names of these requirements and of all that they bring."""
    names: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        if requirement.name not in names and (requirement.marker is None or requirement.marker.evaluate()):
            names.add(requirement.name)
            waiting += map(Requirement, distribution(requirement.name).requires or [])
    return names


class TestVersions:
    def test_torch_is_the_same_everywhere(self):
        (pin,) = [line for line in requirement_lines() if line.startswith("torch==")]
        assert f"install --quiet {pin}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")

    def test_the_hub_allows_the_cuda_versions_that_torch_can_use(self):
        """A wheel runs on drivers of its own CUDA version and newer ones of the same major."""
        image = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-base-ubuntu24\.04", ARGUMENTS["CUDA_IMAGE"])
        major, minor = map(int, image.groups())
        assert (major, minor) >= (12, 8)
        allowed = HUB["config"]["allowedCudaVersions"]
        assert f"{major}.{minor}" in allowed
        assert all(version.startswith(f"{major}.") and int(version[3:]) >= minor for version in allowed)
        assert HUB_TESTS["config"]["allowedCudaVersions"] == allowed


class TestHub:
    ENV = {variable["key"]: variable for variable in HUB["config"]["env"]}  # noqa: RUF012

    def test_the_listing_has_what_the_hub_requires(self):
        assert HUB.keys() >= {"title", "description", "type", "category", "config"}
        assert (HUB["type"], HUB["category"]) == ("serverless", "video")
        config = HUB["config"]
        assert (config["runsOn"], config["gpuCount"]) == ("GPU", 1)
        assert config["containerDiskInGb"] >= 80  # both models downloaded, and a tenth free, as the SDK asks
        assert len(self.ENV) == len(config["env"])

    @pytest.mark.parametrize("key", ENV)
    def test_every_variable_is_one_that_is_read(self, key):
        assert key.lower() in Settings.__dataclass_fields__ or key in PLATFORM_VARIABLES

    @pytest.mark.parametrize("key", [key for key, variable in ENV.items() if "input" in variable])
    def test_every_default_is_the_workers_own(self, key):
        field = self.ENV[key]["input"]
        assert field.keys() >= {"name", "type", "description", "default"}
        assert getattr(Settings.from_env({key: as_text(field, field["default"])}), key.lower()) == getattr(
            Settings(), key.lower()
        )

    @pytest.mark.parametrize("key", [key for key, variable in ENV.items() if "input" in variable])
    def test_every_choice_is_one_that_the_worker_takes(self, key):
        field = self.ENV[key]["input"]
        values = {
            "string": lambda: [option["value"] for option in field.get("options", [])],
            "number": lambda: [max(field["min"], 1e-9), field["max"]],
            "boolean": lambda: [True, False],
        }[field["type"]]()
        for value in values:
            Settings.from_env({key: as_text(field, value)})

    @pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
    def test_presets_set_what_there_is_to_set(self, preset):
        assert preset["defaults"].keys() <= self.ENV.keys()
        Settings.from_env(preset["defaults"])

    def test_there_is_a_preset_for_each_model(self):
        profiles = {preset["defaults"]["MODEL_PROFILE"] for preset in HUB["config"]["presets"]}
        assert profiles == {"framepack", "framepack-f1"}

    @pytest.mark.parametrize("test", HUB_TESTS["tests"], ids=lambda test: test["name"])
    def test_its_tests_send_valid_jobs(self, test):
        request = parse_request(test["input"])
        assert decode_image(request.input_image).shape == (64, 64, 3)
        assert request.total_second_length <= 2
        assert 60_000 <= test["timeout"] <= 3_600_000  # milliseconds

    def test_its_tests_run_on_a_gpu_with_variables_that_are_read(self):
        config = HUB_TESTS["config"]
        assert config["gpuTypeId"] and config["gpuCount"] == 1
        assert {variable["key"] for variable in config["env"]} <= self.ENV.keys()


def as_text(field: dict, value: object) -> str:
    """A value of a Hub input as the worker's environment has it."""
    return field["trueValue" if value else "falseValue"] if field["type"] == "boolean" else str(value)


class TestWorkflow:
    WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    TRIGGERS = WORKFLOW[True]  # YAML 1.1 reads `on` as true
    JOBS = WORKFLOW["jobs"]

    def test_a_push_runs_make_test_on_every_python_there_is_support_for(self):
        test = self.JOBS["test"]
        assert "push" in self.TRIGGERS and "if" not in test
        assert "make test" in [step.get("run") for step in test["steps"]]
        required = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
        versions = test["strategy"]["matrix"]["python"]
        assert versions == ["3.11", "3.12"]
        assert all(version in SpecifierSet(required) for version in versions)

    def test_a_release_builds_the_image_when_the_tests_pass(self):
        image = self.JOBS["image"]
        assert self.TRIGGERS["release"] == {"types": ["published"]}
        assert (image["if"], image["needs"]) == ("github.event_name == 'release'", "test")
        (build,) = [s for s in image["steps"] if s.get("uses", "").startswith("docker/build-push-action@")]
        assert build["with"]["push"] is True and build["with"]["context"] == "."

    def test_only_the_image_may_write_and_only_packages(self):
        assert self.WORKFLOW["permissions"] == {"contents": "read"}
        assert "permissions" not in self.JOBS["test"]
        assert self.JOBS["image"]["permissions"] == {"contents": "read", "packages": "write"}

    def test_actions_are_pinned_to_a_major_version(self):
        for job in self.JOBS.values():
            for step in job["steps"]:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
