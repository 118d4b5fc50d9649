"The cache against a model that does everything the slow way, in any order, on any bounds, from many threads."
import copy
import os
import pickle
import random
import signal
import threading
import time
from collections import Counter, OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmie.core import InputError
from mmie.tokenization.cache import LRUCache, entry_bytes, memory_pressure

KEYS = st.integers(0, 12)
FOREVER = 10**9


def weight(key: int, value: int) -> int:
    "A size that can be read off the value."
    return value


def compute(key: int) -> int:
    return key % 5 + 1


class CacheMachine(RuleBasedStateMachine):
    "Every call is made on the cache and on an `OrderedDict` from the least to the most recently used: key → (value, deadline, when stored)."

    @initialize(entries=st.none() | st.integers(1, 6), weights=st.none() | st.integers(3, 20), ttl=st.none() | st.integers(1, 9))
    def begin(self, entries: int | None, weights: int | None, ttl: int | None) -> None:
        if entries is None and weights is None:
            entries = 4
        self.now, self.short, self.unasked = 0, False, 0
        self.entries, self.weights, self.ttl = entries or FOREVER, weights or FOREVER, ttl or FOREVER
        self.cache: LRUCache[int, int] = LRUCache(max_entries=entries, max_bytes=weights, ttl=ttl, sizeof=weight,
            clock=lambda: self.now, pressure=lambda: self.short, ask_every=3)
        self.forget()

    def forget(self) -> None:
        self.model: OrderedDict[int, tuple[int, int, int]] = OrderedDict()
        self.hits = self.misses = self.stored = 0
        self.gone: Counter[str] = Counter()

    def expire(self) -> None:
        for key in [key for key, (_, deadline, _) in self.model.items() if deadline <= self.now]:
            del self.model[key]
            self.gone["ttl"] += 1

    def used(self) -> int:
        return sum(value for value, _, _ in self.model.values())

    def shrink_model(self, fraction: float, reason: str) -> int:
        count = -int(-fraction * len(self.model) // 1)
        for _ in range(count):
            self.model.popitem(last=False)
            self.gone[reason] += 1
        return count

    def insert(self, new: dict[int, int]) -> None:
        self.expire()
        for key, value in new.items():
            self.model.pop(key, None)
            if value > self.weights:
                self.gone["too large"] += 1
                continue
            while len(self.model) >= self.entries or self.used() + value > self.weights:
                self.gone["entries" if len(self.model) >= self.entries else "bytes"] += 1
                self.model.popitem(last=False)
            self.stored += 1
            self.model[key] = (value, self.now + self.ttl, self.stored)
        self.unasked += len(new)
        if self.unasked >= 3:
            self.unasked = 0
            if self.short:
                self.shrink_model(0.5, "pressure")

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        self.expire()
        there = key in self.model
        assert self.cache.get(key, -1) == (self.model[key][0] if there else -1)
        if there:
            self.model.move_to_end(key)
        self.hits, self.misses = self.hits + there, self.misses + (not there)

    @rule(key=KEYS, value=st.integers(1, 22))
    def put(self, key: int, value: int) -> None:
        self.cache.put(key, value)
        self.insert({key: value})

    @rule(keys=st.lists(KEYS, max_size=8), takes=st.integers(0, 2))
    def get_many(self, keys: list[int], takes: int) -> None:
        self.expire()
        found = {key: self.model[key][0] for key in keys if key in self.model}
        asked: list[int] = []
        def ask(key: int) -> int:
            asked.append(key)
            self.now += takes # meanwhile, something else may become too old
            return compute(key)
        assert self.cache.get_many(keys, ask) == [found.get(key, compute(key)) for key in keys]
        new = [key for key in dict.fromkeys(keys) if key not in found]
        assert asked == new, "each missing key is computed once, in order"
        for key in sorted(found, key=lambda key: self.model[key][2]): # used by the same call: the first stored goes first
            self.model.move_to_end(key)
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        if new:
            self.insert({key: compute(key) for key in new})

    @rule(key=KEYS)
    def get_or_compute(self, key: int) -> None:
        self.expire()
        there = key in self.model
        assert self.cache.get_or_compute(key, compute) == (self.model[key][0] if there else compute(key))
        self.hits, self.misses = self.hits + there, self.misses + (not there)
        if there:
            self.model.move_to_end(key)
        else:
            self.insert({key: compute(key)})

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(short=st.booleans())
    def memory(self, short: bool) -> None:
        self.short = short

    @rule(fraction=st.sampled_from([0.01, 0.25, 0.5, 1.0]))
    def shrink(self, fraction: float) -> None:
        self.expire()
        assert self.cache.shrink(fraction) == self.shrink_model(fraction, "shrink")

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.forget()

    @invariant()
    def same(self) -> None:
        self.expire()
        stats = self.cache.stats()
        assert (stats.hits, stats.misses) == (self.hits, self.misses)
        assert dict(stats.evictions) == dict(self.gone)
        assert stats.entries == len(self.cache) == len(self.model) <= self.entries
        assert stats.bytes == self.used() <= self.weights
        assert all((key in self.cache) == (key in self.model) for key in range(13))


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_the_least_recently_used_goes_first_at_length() -> None:
    cache: LRUCache[int, int] = LRUCache(max_entries=300)
    model: OrderedDict[int, int] = OrderedDict()
    generator = random.Random(0)
    for _ in range(60_000):
        key = int(generator.paretovariate(0.3)) % 5000
        assert (key in cache) == (key in model)
        cache.get_or_compute(key, compute)
        if key in model:
            model.move_to_end(key)
        else:
            if len(model) == 300:
                model.popitem(last=False)
            model[key] = key
    assert cache.shrink(1.0) == 300 and len(cache) == 0


@pytest.mark.parametrize("bounds", [{"max_entries": 50}, {"max_bytes": 20_000}, {"max_entries": 40, "ttl": 0.002}])
def test_eight_threads_on_one_cache(bounds: dict[str, float]) -> None:
    cache: LRUCache[str, tuple[int, ...]] = LRUCache(**bounds) # type: ignore[arg-type]
    words = [f"word {i}" * (1 + i % 3) for i in range(120)]
    def letters(word: str) -> tuple[int, ...]:
        if len(word) % 5 == 0:
            time.sleep(0) # let another thread in
        return tuple(map(ord, word))
    wrong: list[object] = []
    asked, started = [], threading.Barrier(8)
    def work(seed: int) -> None:
        generator = random.Random(seed)
        started.wait()
        for turn in range(150):
            keys = generator.choices(words, k=generator.randint(1, 30))
            try:
                if cache.get_many(keys, letters) != [tuple(map(ord, key)) for key in keys]:
                    wrong.append(keys)
                if cache.get_or_compute(keys[0], letters) != tuple(map(ord, keys[0])):
                    wrong.append(keys[0])
                stats = cache.stats()
                if stats.entries > bounds.get("max_entries", FOREVER) or stats.bytes > bounds.get("max_bytes", FOREVER):
                    wrong.append(stats)
                if turn % 50 == seed:
                    cache.shrink(0.3)
            except Exception as error: # whatever it is, the test must show it
                wrong.append(error)
            asked.append(len(keys) + 1)
    team = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert wrong == []
    with cache._lock:
        held = dict(cache._shelf.entries)
        assert cache._shelf.bytes == sum(entry_bytes(key, entry.value) for key, entry in held.items())
        assert cache._shelf.hits + cache._shelf.misses == sum(asked)
        assert len(held) + sum(cache._shelf.evictions.values()) <= cache._shelf.misses, "nothing is stored that was not missing"


def test_a_function_may_use_the_cache_it_is_called_by() -> None:
    cache: LRUCache[int, int] = LRUCache(max_entries=5)
    def fibonacci(n: int) -> int:
        return n if n < 2 else sum(cache.get_many([n - 1, n - 2], fibonacci))
    assert cache.get_or_compute(25, fibonacci) == 75025


def test_what_fails_to_compute_is_not_kept() -> None:
    cache: LRUCache[int, float] = LRUCache(max_entries=5)
    with pytest.raises(ZeroDivisionError):
        cache.get_many([1, 0], lambda n: 1 / n)
    assert len(cache) == 0 and cache.get_many([1, 2], lambda n: 1 / n) == [1, 0.5]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_while_another_thread_holds_the_lock() -> None:
    held, done = threading.Event(), threading.Event()
    def slow_clock() -> float: # read under the lock
        held.set()
        done.wait(20)
        return 0.0
    cache: LRUCache[str, int] = LRUCache(max_entries=5, ttl=1, clock=slow_clock)
    other = threading.Thread(target=cache.put, args=("a", 1))
    other.start()
    assert held.wait(10)
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(10) # ends the child if it hangs
            done.set()
            cache.put("b", 2)
            os._exit(0 if cache.get("b") == 2 and cache.get("a") is None else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        other.join()
    assert cache.get("a") == 1 and cache.get("b") is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forgets_what_was_being_changed() -> None:
    cache: LRUCache[str, int] = LRUCache(max_entries=5)
    cache.put("a", 1)
    with cache._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            os._exit(0 if len(cache) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0 and len(cache) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_inherits_what_nobody_was_changing() -> None:
    cache: LRUCache[str, int] = LRUCache(max_entries=5)
    cache.put("a", 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if cache.get("a") == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_copies_and_pickles_have_the_bounds_and_begin_empty() -> None:
    cache: LRUCache[int, int] = LRUCache(max_entries=7, max_bytes=1000, ttl=5, sizeof=weight, pressure=memory_pressure(0.5), ask_every=9)
    cache.put(1, 1)
    options = ("max_entries", "max_bytes", "ttl", "sizeof", "clock", "ask_every")
    for twin in (pickle.loads(pickle.dumps(cache)), copy.copy(cache), copy.deepcopy(cache)):
        assert type(twin) is LRUCache and len(twin) == 0 and twin.stats().misses == 0
        assert [getattr(twin, name) for name in options] == [getattr(cache, name) for name in options]
        twin.put(2, 2)
    assert 1 in cache and 2 not in cache


@pytest.mark.parametrize("name", ["sizeof", "clock", "pressure"])
def test_a_function_that_cannot_be_pickled_is_named(name: str) -> None:
    cache: LRUCache[int, int] = LRUCache(max_entries=1, **{name: lambda *arguments: 1}) # type: ignore[arg-type]
    with pytest.raises(InputError, match=name):
        pickle.dumps(cache)
    assert len(copy.deepcopy(cache)) == 0, "a copy stays in the process and needs no name"


@pytest.mark.parametrize("bounds", [{}, {"ttl": 1}, {"max_entries": 0}, {"max_entries": -3}, {"max_bytes": 0}, {"max_entries": 1, "ttl": 0},
    {"max_entries": float("inf")}, {"max_bytes": float("nan")}, {"max_entries": 1, "ask_every": 0}])
def test_bad_bounds_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(InputError):
        LRUCache(**bounds) # type: ignore[arg-type]
