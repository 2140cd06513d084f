"""How long and how much memory: one timer for each kind of device.

CUDA: events around each run, after warm-up; before each run a buffer of several times the L2 cache
is written, so that no input is found there. Runs are queued without waiting between them, as in
training: host time counts only where it exceeds the device's. ``graph`` replays one captured run.

CPU: perf_counter; all runs of a case take turns in one process, so that a slow second of the
machine falls on all of them.
"""

import dataclasses
import gc
import statistics
import time

import torch


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds: median, tenth and ninetieth percentile, and how many runs."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, ms):
        ms = sorted(ms)
        cuts = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms * 9
        return cls(statistics.median(ms), cuts[0], cuts[-1], len(ms))


class CudaTimer:
    """Times runs on the current CUDA device, for about ``seconds`` each."""

    def __init__(self, seconds=0.3, least=10, most=200):
        self.seconds, self.least, self.most = seconds, least, most
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device="cuda")

    def measure_all(self, runs, progress=None):
        """{name: Times, or the exception that a run ended in}; ``progress(name, result)`` as each
        is known."""
        results = {}
        for name, run in runs.items():
            results[name] = _caught(self.measure, run)
            if progress:
                progress(name, results[name])
        return results

    def measure(self, run):
        for _ in range(3):
            run()
        estimate = statistics.mean(self._events(run, 2))
        count = int(1e3 * self.seconds / max(estimate, 1e-3))
        return Times.of(self._events(run, min(self.most, max(self.least, count))))

    def measure_graph(self, run):
        """As measure, of replays of a CUDA graph of one run: the device's time alone."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.measure(graph.replay)

    def _events(self, run, count):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    @staticmethod
    def peak(run):
        """Most bytes allocated at once during a run, beyond what was before it."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class CpuTimer:
    """Times runs in turns: at least ``least`` rounds of all of them, then until ``seconds`` are
    over or ``most`` rounds done."""

    def __init__(self, seconds=20.0, least=3, most=50):
        self.seconds, self.least, self.most = seconds, least, most

    def measure_all(self, runs, progress=None):
        """{name: Times, or the exception that a run ended in}."""
        results = {name: _caught(run) for name, run in runs.items()}  # the first run warms up
        results = {name: r if isinstance(r, Exception) else [] for name, r in results.items()}
        live = [name for name, result in results.items() if result == []]
        end, rounds = time.perf_counter() + self.seconds, 0
        while live and rounds < self.most and (rounds < self.least or time.perf_counter() < end):
            rounds += 1
            for name in live:
                start = time.perf_counter()
                runs[name]()
                results[name].append(1e3 * (time.perf_counter() - start))
        for name in live:
            results[name] = Times.of(results[name])
        for name, result in results.items():
            if progress:
                progress(name, result)
        return results

    def measure(self, run):
        result = self.measure_all({"": run})[""]
        if isinstance(result, Exception):
            raise result
        return result

    def measure_graph(self, run):
        raise NotImplementedError("graphs are CUDA's")

    @staticmethod
    def peak(run):
        """Most bytes taken from torch's CPU allocator at once during a run, beyond what was before
        it. Buffers that a kernel takes elsewhere are not seen."""
        gc.collect()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(
            activities=activities, profile_memory=True, acc_events=True
        ) as profile:
            run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most


def make_timer(device, seconds=None, least=None):
    kind = CudaTimer if device.type == "cuda" else CpuTimer
    given = {"seconds": seconds, "least": least}
    return kind(**{name: value for name, value in given.items() if value is not None})


def _caught(function, *args):
    try:
        return function(*args)
    except Exception as error:  # one failing run is a row of the table, not the end of the others
        return error
