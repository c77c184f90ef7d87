"""What happened while a program measured."""

from types import SimpleNamespace

import pytest

from benchmarking.watch import Watch


class Runner:
    def launch(self, chunks, after=None):
        return chunks


class Engine:
    """Each step takes as long as it is told, and launches what it is told."""

    def __init__(self, clock, watch_hook):
        self.runner, self.scheduler = Runner(), SimpleNamespace(running=[1], waiting=[])
        self.clock, self.plan, self.compiles = clock, [], watch_hook

    def step(self):
        seconds, chunks, compiled = self.plan.pop(0)
        self.runner.launch(chunks)
        for name in compiled:
            self.compiles(name)
        self.clock.now += seconds


@pytest.fixture
def watched():
    knobs = pytest.importorskip("triton").knobs
    clock = SimpleNamespace(now=0.0)
    engine = Engine(clock, lambda name: knobs.runtime.jit_post_compile_hook(fn=SimpleNamespace(name=name)))
    return engine, clock, Watch(SimpleNamespace(engine=engine), clock=lambda: clock.now)


def chunk(start, stop, images=0):
    sequence = SimpleNamespace(images_in=lambda start, stop: [None] * images)
    return SimpleNamespace(sequence=sequence, start=start, stop=stop, is_prefill=stop - start > 1)


def test_a_quiet_run_says_so(watched):
    engine, _, watch = watched
    engine.plan = [(0.02, [], []), (0.2, [], [])]
    with watch:
        engine.step()
        engine.step()
    assert watch.lines() == ["kernels compiled after the warm-up: none", "stalls over 250 ms: none"]


def test_stalls_are_named_with_their_causes(watched):
    engine, clock, watch = watched
    engine.plan = [
        (0.5, [], ["matmul", "norm", "norm"]),
        (0.3, [chunk(0, 4000, images=2), chunk(5, 6)], []),
        (0.01, [], []),
        (0.02, [], []),
    ]
    with watch:
        for wait in (0.0, 0.0, 0.4, 0.0):
            clock.now += wait
            engine.step()
    assert watch.lines() == [
        "kernels compiled after the warm-up: matmul (1), norm (2)",
        "stalls over 250 ms:",
        "  500 ms: compiling matmul, norm",
        "  300 ms: steps of 4000 prompt tokens, 2 images, 1 decoding",
        "  410 ms: 400 ms between two steps: the engine was not called",
    ]


def test_waiting_with_nothing_to_do_is_no_stall_and_nothing_is_left_behind(watched):
    engine, clock, watch = watched
    engine.plan = [(0.01, [], []), (0.01, [], [])]
    with watch:
        engine.scheduler.running = []
        engine.step()
        clock.now += 5
        engine.step()
    assert watch.stalls == []
    assert "step" not in engine.__dict__
    assert "launch" not in engine.runner.__dict__
