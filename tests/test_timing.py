"""The timer on a clock that the test moves."""

from core.timing import JobTimer


class Clock:
    def __init__(self):
        self.now = 0.0
        self.waits = 0

    def __call__(self):
        return self.now

    def wait(self):
        self.waits += 1


def test_spans_add_up_and_wait_for_the_device():
    clock = Clock()
    timer = JobTimer(clock, clock.wait)
    for seconds in (1.0, 2.5):
        with timer.span("text_encode"):
            clock.now += seconds
    assert timer.seconds("text_encode") == 3.5
    assert timer.seconds("never") == 0.0
    assert clock.waits == 4
    assert timer.total() == 3.5


def test_a_span_counts_even_when_its_stage_fails():
    clock = Clock()
    timer = JobTimer(clock)
    try:
        with timer.span("decode"):
            clock.now += 2
            raise ValueError
    except ValueError:
        pass
    assert timer.seconds("decode") == 2


def test_sections_and_steps():
    clock = Clock()
    timer = JobTimer(clock)
    for section in range(2):
        timer.start_section()
        with timer.section_span("sample"):
            for step in range(10):
                clock.now += 10 if (section, step) == (1, 9) else 1
                timer.step_done()
    assert [s["sample"] for s in timer.sections] == [10, 19]
    assert timer.step_summary() == {"median": 1, "p95": 1}
    assert max(timer.steps) == 10


def test_no_steps():
    assert JobTimer(Clock()).step_summary() == {"median": 0.0, "p95": 0.0}


def test_restart_forgets_the_failed_attempt():
    clock = Clock()
    timer = JobTimer(clock)
    timer.start_section()
    timer.step_done()
    clock.now += 5
    timer.restart()
    assert timer.sections == [] and timer.steps == [] and timer.total() == 5
