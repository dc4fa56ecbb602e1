"""Where LoRAs come from: plain names in a folder, URLs through the guard into a bounded cache."""

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core import guard
from core.deadline import Deadline
from core.errors import (
    CancelledError,
    DownloadError,
    DownloadTooLargeError,
    LoraError,
    RequestError,
    UrlRefusedError,
    WorkerError,
)
from core.lora_files import MAX_HEADER, locate_lora
from core.pipeline.loras import LoraCache, load_loras
from core.request import LoraChoice, parse_request
from core.settings import Settings, SettingsError
from tests.fake_site import Internet, Site, answer, make_certificates, serving
from tests.lora_formats import kohya

GOOD = "https://cdn.images.test/good.safetensors"
SECRET = "token=5ec4e7"


def lora(rank=1):
    return kohya({"transformer_blocks.0.attn.to_q": (torch.ones(rank, 32), torch.ones(32, rank))})


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "loras").mkdir()
    save_file(lora(), tmp_path / "loras" / "good.safetensors")
    return Settings(
        volume_dir=tmp_path, lora_cache_dir=str(tmp_path / "cache"), lora_hosts=("*.images.test",)
    )


def locate(settings, max_bytes=10**6, timeout_s=20, check=lambda: None, **choice):
    return locate_lora(LoraChoice(**choice), settings, max_bytes, timeout_s, check)


def refusal(settings, kind=LoraError, max_bytes=10**6, **choice) -> str:
    with pytest.raises(WorkerError) as raised:
        locate(settings, max_bytes, **choice)
    assert type(raised.value) is kind
    sentence = str(raised.value)
    assert sentence.endswith(".") and sentence.isprintable() and len(sentence) < 400
    assert SECRET not in sentence
    return sentence


class TestRequest:
    def refused(self, *loras, whole=None) -> str:
        data = {"input_image": "x", "prompt": "x", "loras": whole if whole is not None else [*loras]}
        with pytest.raises(RequestError) as raised:
            parse_request(data)
        assert raised.value.code == "invalid_request"
        return str(raised.value)

    def test_good_ones(self):
        loras = [{"name": "水墨 (v2).safetensors"}, {"url": GOOD, "weight": -4}] * 4
        request = parse_request({"input_image": "x", "prompt": "x", "loras": loras})
        assert [choice.weight for choice in request.loras] == [1.0, -4.0] * 4
        assert "cdn.images" not in repr(request)

    @pytest.mark.parametrize(
        "name",
        [
            *("../good.safetensors", "a/good.safetensors", "/etc/good.safetensors", "a\\b.safetensors"),
            *(
                ".safetensors",
                "..safetensors",
                ".hidden.safetensors",
                "good",
                "good.pt",
                "good.bin",
                "good.ckpt",
            ),
            *("good.safetensors.pt", "good.safetensors\n", "a\0.safetensors", "", "C:good.safetensors"),
            *("%2e%2e%2fgood.safetensors", "~.safetensors", "$HOME.safetensors", "a\u202e.safetensors"),
        ],
    )
    def test_only_plain_names(self, name):
        assert self.refused({"name": name}) == (
            "`loras.0.name` must be a plain file name that ends in .safetensors."
        )

    def test_every_other_fault_is_named(self):
        name = {"name": "a.safetensors"}
        assert self.refused(name, {}) == "`loras.1` must have a `name` or a `url`, and not both."
        assert "not both" in self.refused(name | {"url": GOOD})
        assert self.refused(name | {"weight": 4.1}) == "`loras.0.weight` must be at most 4 (got 4.1)."
        assert "at least -4" in self.refused(name | {"weight": -5})
        assert "a number" in self.refused(name | {"weight": "1"})
        assert "finite" in self.refused(name | {"weight": float("nan")})
        assert "`loras.0.wieght` is not a known field (did you mean `weight`?)" in self.refused(
            name | {"wieght": 1}
        )
        assert self.refused(*[name] * 9) == "`loras` must have at most 8 entries (got 9)."
        assert self.refused(whole="a.safetensors") == (
            '`loras` must be a list (got the string "a.safetensors").'
        )
        assert "must be an object" in self.refused("a.safetensors")
        assert "https" in self.refused({"url": "http://cdn.images.test/a"})
        assert "at most 255" in self.refused({"name": f"{'a' * 250}.safetensors"})
        assert "at most 4096" in self.refused({"url": f"https://{'a' * 4096}"})


class TestFolder:
    def test_a_name(self, settings, tmp_path):
        assert locate(settings, name="good.safetensors") == tmp_path / "loras" / "good.safetensors"
        elsewhere = replace(settings, lora_dir=str(tmp_path))
        assert "no LoRA good.safetensors" in refusal(elsewhere, name="good.safetensors")

    def test_the_folder_is_on_the_volume_unless_it_is_named(self):
        assert Settings().lora_folder == Path("/runpod-volume/loras")
        assert Settings.from_env({"LORA_DIR": "/data"}).lora_folder == Path("/data")

    def test_a_missing_one_a_folder_and_a_missing_folder(self, settings, tmp_path):
        (tmp_path / "loras" / "folder.safetensors").mkdir()
        os.mkfifo(tmp_path / "loras" / "pipe.safetensors")
        for name in ("nothing", "folder", "pipe", "a" * 200):
            assert "This worker has no LoRA" in refusal(settings, name=f"{name}.safetensors")
        gone = replace(settings, volume_dir=tmp_path / "gone")
        assert "no LoRA" in refusal(gone, name="good.safetensors")

    def test_links_must_stay_inside(self, settings, tmp_path):
        folder = tmp_path / "loras"
        save_file(lora(), tmp_path / "outside.safetensors")
        (folder / "out.safetensors").symlink_to(tmp_path / "outside.safetensors")
        (folder / "up.safetensors").symlink_to("../outside.safetensors")
        (folder / "circle.safetensors").symlink_to("circle.safetensors")
        (folder / "nowhere.safetensors").symlink_to("nothing.safetensors")
        (folder / "model.pt").write_bytes(b"x")
        (folder / "other.safetensors").symlink_to("model.pt")
        (folder / "in.safetensors").symlink_to("good.safetensors")
        for name in ("out", "up", "circle", "nowhere", "other"):
            assert "no LoRA" in refusal(settings, name=f"{name}.safetensors")
        assert locate(settings, name="in.safetensors").name == "good.safetensors"
        linked = tmp_path / "linked"
        linked.symlink_to(folder)  # the operator's own
        assert locate(replace(settings, lora_dir=str(linked)), name="good.safetensors")


def pickled(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def torch_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))


def with_header(length, text=b"{}", size=0):
    return lambda path: path.write_bytes(length.to_bytes(8, "little") + text + bytes(size))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


CONTENTS = {
    "a pickle": (pickled, "not a whole safetensors file"),
    "torch.save's": (lambda path: torch.save({"a": torch.ones(1)}, path), "not a whole safetensors file"),
    "a zip": (torch_zip, "not a whole safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "eight bytes": (lambda path: path.write_bytes(bytes(8)), "not a whole safetensors file"),
    "HTML": (lambda path: path.write_bytes(b"<!DOCTYPE html>" * 99), "not a whole safetensors file"),
    "a header longer than the file": (with_header(10**15), "not a whole safetensors file"),
    "a huge header": (with_header(MAX_HEADER + 1, size=MAX_HEADER + 1), "header of over 8 MB"),
    "a broken header": (with_header(2, b"{!"), "damaged"),
    "nested JSON": (with_header(100_001, b"{" + b'"a":{' * 20_000), "damaged"),
    "overlapping tensors": (
        with_header(
            129,
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],'
            b'"data_offsets":[0,4]}}'.ljust(129),
            4,
        ),
        "damaged",
    ),
    "cut short": (cut, "damaged"),
    "a byte more": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "damaged"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_only_whole_safetensors(settings, tmp_path, content):
    spoil, told = CONTENTS[content]
    spoil(tmp_path / "loras" / "good.safetensors")
    assert told in refusal(settings, name="good.safetensors")


def test_too_large_a_file_is_not_read(settings, tmp_path):
    path = tmp_path / "loras" / "good.safetensors"
    size = path.stat().st_size
    assert locate(settings, size, name="good.safetensors")
    assert "LORA_MAX_MB" in refusal(settings, max_bytes=size - 1, name="good.safetensors")
    with path.open("r+b") as file:
        file.truncate(10**13)  # a hole on the disk
    assert "10000000.0 MB" in refusal(settings, name="good.safetensors")


def test_settings_that_cannot_hold_are_refused():
    with pytest.raises(SettingsError, match="LORA_MAX_MB"):
        Settings(lora_max_mb=3000, lora_cache_gb=2)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def site(certificates, settings, tmp_path, monkeypatch):
    """`cdn.images.test`, behind a public address, with a LoRA."""
    site = Site(certificates[1])
    site.pages["/good.safetensors"] = answer((tmp_path / "loras" / "good.safetensors").read_bytes())
    internet = Internet(guard._resolve, guard._connect, site.port)
    monkeypatch.setattr("core.guard._resolve", internet.resolve)
    monkeypatch.setattr("core.guard._connect", internet.connect)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
    with serving(site):
        yield site


class TestUrl:
    def cached(self, settings):
        return sorted(path.name for path in settings.lora_cache.iterdir())

    def test_fetched_once(self, settings, site, tmp_path):
        first = locate(settings, url=GOOD)
        assert first.read_bytes() == (tmp_path / "loras" / "good.safetensors").read_bytes()
        assert locate(settings, url=GOOD) == first
        assert len(site.requests) == 1 and self.cached(settings) == [first.name]

    def test_only_where_hosts_are_allowed(self, settings, site):
        nowhere = replace(settings, lora_hosts=())
        locate(settings, url=GOOD)  # cached, and still not allowed
        assert "takes no LoRAs from URLs" in refusal(nowhere, UrlRefusedError, url=GOOD)
        refusal(settings, UrlRefusedError, url="https://images.test/good.safetensors")
        refusal(settings, UrlRefusedError, url="https://127.0.0.1/good.safetensors")
        site.pages["/moved"] = answer(b"", "302 Found", Location="https://s3.test/good.safetensors")
        assert "s3.test is not among" in refusal(
            settings, UrlRefusedError, url=f"https://cdn.images.test/moved?{SECRET}"
        )
        assert len(site.requests) == 2

    @pytest.mark.parametrize(
        ("page", "kind"),
        [
            (answer(b"<html>"), LoraError),
            (answer(pickle.dumps({"a": 1})), LoraError),
            (answer(b"", "404 Not Found"), DownloadError),
            (answer(bytes(2000)), DownloadTooLargeError),
            (answer(bytes(900), Content_Length=950), DownloadError),
        ],
    )
    def test_nothing_is_left_of_what_is_not_good(self, settings, site, page, kind):
        site.pages["/page"] = page
        refusal(settings, kind, max_bytes=1000, url=f"https://cdn.images.test/page?{SECRET}")
        assert self.cached(settings) == []
        locate(settings, url=GOOD)

    def test_a_cancel_leaves_nothing(self, settings, site):
        def half(connection):
            connection.sendall(answer(bytes(100), Content_Length=1000))
            connection.recv(1)  # until the worker hangs up

        site.pages["/half"] = half

        def check():
            if site.requests:
                raise CancelledError("The job was cancelled.")

        with pytest.raises(CancelledError):
            locate(settings, check=check, url="https://cdn.images.test/half")
        assert self.cached(settings) == []

    def test_a_full_disk_is_the_workers_fault(self, settings, site, monkeypatch):
        def full(handle, *_, **__):
            os.close(handle)
            return Path("/dev/full").open("wb", buffering=0)

        monkeypatch.setattr("core.lora_files.os.fdopen", full)
        assert "no room for the LoRA" in refusal(settings, WorkerError, url=GOOD)
        assert self.cached(settings) == []

    def test_a_cache_that_cannot_be_written_to(self, settings, site, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        blocked = replace(settings, lora_cache_dir=str(tmp_path / "file"))
        assert "cache of LoRAs" in refusal(blocked, WorkerError, url=GOOD)

    def test_the_least_used_ones_go(self, settings, site, tmp_path):
        save_file(lora(2000), tmp_path / "large.safetensors")  # half a megabyte
        site.pages["/large"] = answer((tmp_path / "large.safetensors").read_bytes())
        two = replace(settings, lora_max_mb=1, lora_cache_gb=0.0012)

        def get(number):
            path = locate(two, url=f"https://cdn.images.test/large?{number}")
            os.utime(path, (get.now, get.now))  # a file system's clock may be too coarse
            get.now += 1
            return path

        get.now = 1
        first, second = get(1), get(2)
        assert get(1) == first and len(site.requests) == 2
        third = get(3)
        assert sorted([first.name, third.name]) == self.cached(settings)
        left_over = settings.lora_cache / "stopped.part"
        left_over.write_bytes(bytes(600_000))
        os.utime(left_over, (0, 0))
        assert get(2) == second
        assert sorted([third.name, second.name]) == self.cached(settings)


class TestReading:
    def load(self, settings, *names, cache=None):
        choices = [LoraChoice(name=name) for name in names]
        return load_loras(choices, settings, cache or LoraCache(), Deadline(), lambda: None)

    def test_read_once_while_the_file_is_the_same(self, settings, tmp_path, monkeypatch):
        cache = LoraCache()
        (first,) = self.load(settings, "good.safetensors", cache=cache)
        (again,) = self.load(settings, "good.safetensors", cache=cache)
        assert first.lora is again.lora
        save_file(lora(2), tmp_path / "loras" / "good.safetensors")
        (changed,) = self.load(settings, "good.safetensors", cache=cache)
        assert changed.lora is not first.lora and changed.file != first.file

    def test_the_files_of_a_job_are_bounded_together(self, settings, tmp_path):
        save_file(lora(2000), tmp_path / "loras" / "large.safetensors")  # half a megabyte
        few = replace(settings, lora_max_mb=1)
        self.load(few, "large.safetensors")
        with pytest.raises(LoraError, match=r"takes 0\.5 MB more for one job"):
            self.load(few, "large.safetensors", "large.safetensors")

    def test_what_is_kept_in_memory_is_bounded(self, settings, tmp_path):
        cache = LoraCache()
        few = replace(settings, lora_max_mb=1)
        for number in range(5):
            save_file(lora(1000), tmp_path / "loras" / f"{number}.safetensors")
            self.load(few, f"{number}.safetensors", cache=cache)
            assert cache.nbytes <= 1_000_000
        assert cache.nbytes == 3 * 256_000

    def test_a_wrong_key_is_told_with_the_file(self, settings, tmp_path):
        tensors = lora()
        tensors.popitem()  # alpha
        tensors.popitem()
        save_file(tensors, tmp_path / "loras" / "good.safetensors")
        with pytest.raises(LoraError, match=r"good\.safetensors cannot be used: `lora_unet_.*without its up"):
            self.load(settings, "good.safetensors")

    def test_rewriting_the_file_does_not_reach_what_was_read(self, settings, tmp_path):
        (chosen,) = self.load(settings, "good.safetensors")
        (tmp_path / "loras" / "good.safetensors").write_bytes(b"")
        (layer,) = chosen.lora.layers.values()
        assert torch.equal(layer.up, torch.ones(32, 1))
