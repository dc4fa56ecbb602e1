"""Log lines: the job's id in each, in the SDK's form where RunPod reads them."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from core.logs import JsonFormatter, PlainFormatter, current_job

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[None, "job-7"])
def job(request):
    token = current_job.set(request.param)
    yield request.param
    current_job.reset(token)


def record(level=logging.INFO, message="text_encode: 0.05 s"):
    return logging.LogRecord("core.job", level, __file__, 1, message, None, None)


def test_json_has_the_sdks_keys(job):
    for level, name in ((logging.INFO, "INFO"), (logging.WARNING, "WARN"), (logging.ERROR, "ERROR")):
        line = JsonFormatter().format(record(level))
        assert json.loads(line) == {"requestId": job, "message": "text_encode: 0.05 s", "level": name}


def test_json_is_one_line_even_with_a_traceback():
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        failed = record(logging.ERROR, "job failed")
        failed.exc_info = sys.exc_info()
    line = JsonFormatter().format(failed)
    assert len(line.splitlines()) == 1
    assert "ZeroDivisionError" in json.loads(line)["message"]


def test_plain_is_like_the_sdks_own(job):
    expected = "INFO   | job-7 | text_encode: 0.05 s" if job else "INFO   | text_encode: 0.05 s"
    assert PlainFormatter().format(record()) == expected


@pytest.mark.parametrize("as_json", [True, False])
def test_chatty_libraries_are_heard_from_warnings_on(as_json):
    code = (
        f"import logging; from core import logs; logs.configure(as_json={as_json});"
        "logging.getLogger('botocore.auth').info('a-secret');"
        "logging.getLogger('httpx').info('https://host/?signature');"
        "logging.getLogger('core.job').debug('a prompt');"
        "logging.getLogger('core.job').info('stage')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert "stage" in line
