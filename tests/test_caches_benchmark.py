"""The benchmark of step caches' latents, on the tiny models."""

import re

from benchmarks import caches
from benchmarks.quality import Choice
from tests.tiny import TINY_MODELS


def test_what_skips_more_is_further_away(monkeypatch, capsys):
    def cached(threshold: float) -> Choice:
        return Choice(f"teacache {threshold:g}", {"cache": "teacache", "cache_threshold": threshold})

    offered = [Choice("exact"), Choice("steps 20", {"steps": 20}), cached(1e-6), cached(0.3), cached(1.0)]
    monkeypatch.setattr(caches, "choices", lambda device: offered)
    monkeypatch.setattr(caches, "measure_magnitudes", lambda models, direction: None)
    caches.main(["--models", str(TINY_MODELS), "--scenes", "1"])
    rows = re.findall(r"^\| teacache (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", capsys.readouterr().out, re.M)
    (_, every, equal, _), (_, fewer, near, _), (_, least, far, _) = rows
    assert float(every) == 25 > float(fewer) > float(least)
    assert float(equal) == 100 > float(near) > float(far)
