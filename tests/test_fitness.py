"""What makes a worker refuse to start: each fault of a machine in one sentence."""

import tempfile
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from core import fitness
from core.errors import FitnessError
from core.settings import Settings, SettingsError

DEMO = Settings(model_profile="demo")
FULL = Settings()
GIB = 1024**3
DiskUsage = namedtuple("DiskUsage", "total used free")


def test_a_good_machine_passes_in_silence():
    assert fitness.run_checks(DEMO) is None


def test_every_check_is_run(monkeypatch):
    ran = []
    for name in ("check_disk", "check_ffmpeg", "check_gpu"):
        monkeypatch.setattr(fitness, name, lambda *settings, name=name: ran.append((name, *settings)))
    fitness.run_checks(FULL)
    assert ran == [("check_disk", FULL), ("check_ffmpeg",), ("check_gpu", FULL)]


def test_the_error_has_its_code():
    assert FitnessError.code == "unfit_worker"


class TestDisk:
    def test_a_full_one_is_named_with_what_is_needed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(fitness.shutil, "disk_usage", lambda folder: DiskUsage(10**10, 0, 15 * 10**8))
        with pytest.raises(FitnessError) as caught:
            fitness.check_disk(DEMO)
        assert str(caught.value) == (
            f"The temporary folder {tmp_path} has 1.5 GB free, and 2 GB are needed (MIN_FREE_DISK_GB)."
        )
        fitness.check_disk(Settings.from_env({"MIN_FREE_DISK_GB": "1"}))

    def test_a_folder_that_takes_no_files_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(FitnessError, match=r"^The temporary folder cannot be written to: .*gone.*\.$"):
            fitness.check_disk(DEMO)

    @pytest.mark.parametrize("text", ["-1", "nan", "much"])
    def test_a_senseless_need_is_refused(self, text):
        with pytest.raises(SettingsError, match="MIN_FREE_DISK_GB must be"):
            Settings.from_env({"MIN_FREE_DISK_GB": text})


class TestFfmpeg:
    @pytest.fixture
    def ffmpeg(self, monkeypatch, tmp_path):
        """Puts a shell script in ffmpeg's place."""

        def replace(script: str) -> None:
            path = tmp_path / "ffmpeg"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
            monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

        return replace

    def test_a_missing_one_is_refused(self, monkeypatch):
        def none():
            raise RuntimeError("No ffmpeg exe could be found.")

        monkeypatch.setattr(fitness.ffmpeg.imageio_ffmpeg, "get_ffmpeg_exe", none)
        with pytest.raises(FitnessError, match=r"^There is no ffmpeg"):
            fitness.check_ffmpeg()

    def test_a_wrong_path_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
        with pytest.raises(FitnessError, match=r"^ffmpeg does not run: .*nowhere"):
            fitness.check_ffmpeg()

    def test_one_that_fails_is_refused(self, ffmpeg):
        ffmpeg("exit 3")
        with pytest.raises(FitnessError, match=r"^ffmpeg does not run: .* exit status 3\.$"):
            fitness.check_ffmpeg()

    def test_one_that_hangs_is_refused(self, ffmpeg, monkeypatch):
        monkeypatch.setattr(fitness.ffmpeg, "PROBE_TIMEOUT_S", 0.2)
        ffmpeg("exec sleep 60")
        with pytest.raises(FitnessError, match=r"^ffmpeg does not run: .* timed out"):
            fitness.check_ffmpeg()

    def test_one_without_libx264_is_refused(self, ffmpeg):
        ffmpeg("echo ' V....D mpeg4'")
        with pytest.raises(FitnessError, match=r"^The ffmpeg at \S+ has no libx264\.$"):
            fitness.check_ffmpeg()

    def test_one_that_writes_no_video_is_refused(self, ffmpeg):
        ffmpeg("echo ' V....D libx264'; case $* in *encoders) ;; *) cat > /dev/null ;; esac")
        with pytest.raises(FitnessError, match=r"^ffmpeg cannot write a video: [^\n]*\.$"):
            fitness.check_ffmpeg()


class TestGpu:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A GPU in every answer but the computation, which the CPU does in its place."""
        properties = SimpleNamespace(name="NVIDIA Test", major=8, minor=9)
        memory = SimpleNamespace(free=23 * GIB, reserved=0)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory.free, 24 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory.reserved)
        multiplies = fitness._multiplies
        monkeypatch.setattr(fitness, "_multiplies", lambda device: multiplies(torch.device("cpu")))
        return SimpleNamespace(properties=properties, memory=memory)

    def test_a_good_one_passes(self, gpu):
        fitness.check_gpu(FULL)

    @pytest.mark.parametrize(
        ("raised", "reason"),
        [
            ("No CUDA GPUs are available", "No CUDA GPUs are available"),
            (
                "The NVIDIA driver on your system is too old (found version 12080). Please update it.\nMore.",
                "The NVIDIA driver on your system is too old (found version 12080)",
            ),
        ],
    )
    def test_none_and_a_driver_too_old_are_told(self, monkeypatch, raised, reason):
        def init():
            raise RuntimeError(raised)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with pytest.raises(FitnessError) as caught:
            fitness.check_gpu(FULL)
        assert str(caught.value) == f"No GPU can be used: {reason} (PyTorch is built for CUDA 13.0)."

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
    def test_a_pytorch_for_the_cpu_is_told(self):
        with pytest.raises(
            FitnessError, match=r"^No GPU can be used: .* \(PyTorch is built for the CPU\)\.$"
        ):
            fitness.check_gpu(FULL)

    def test_one_without_bfloat16_is_refused(self, gpu):
        gpu.properties.major, gpu.properties.minor = 7, 5
        with pytest.raises(FitnessError) as caught:
            fitness.check_gpu(FULL)
        assert str(caught.value) == (
            "The GPU NVIDIA Test has compute capability 7.5, and bfloat16 needs 8.0."
        )

    def test_one_that_others_fill_is_refused_but_not_for_the_workers_own_models(self, gpu):
        gpu.memory.free = 4 * GIB
        with pytest.raises(FitnessError, match=r"has 4\.0 GiB of memory to use, and 11 are needed\.$"):
            fitness.check_gpu(FULL)
        gpu.memory.reserved = 18 * GIB
        fitness.check_gpu(FULL)

    def test_one_that_cannot_run_its_kernels_is_refused(self, gpu, monkeypatch):
        def fail(device):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore.")

        monkeypatch.setattr(fitness, "_multiplies", fail)
        with pytest.raises(FitnessError, match=r"cannot compute: CUDA error: no kernel image [^\n]*\.$"):
            fitness.check_gpu(FULL)

    def test_one_that_computes_wrongly_is_refused(self, gpu, monkeypatch):
        times = torch.Tensor.__matmul__

        def wrong_in_bfloat16(left, right):
            return times(left, right) + (left.dtype == torch.bfloat16)

        monkeypatch.setattr(torch.Tensor, "__matmul__", wrong_in_bfloat16)
        with pytest.raises(FitnessError, match="computes wrong results"):
            fitness.check_gpu(FULL)

    @pytest.mark.gpu
    def test_this_one_passes(self):
        fitness.check_gpu(FULL)
