"""Answers to images that were sent before."""

import numpy as np
import pytest

from cnnray.images.decode import BadImage
from cnnray.models.answers import NO_PROBABILITIES, Answer
from cnnray.serving.cache import Cache
from tests.awkward import bad_images
from tests.unit.serving.conftest import GOOD

ANSWER = Answer(np.arange(100, dtype=np.float32), (99,))
SIZE = ANSWER.nbytes + 600


def test_the_least_recently_used_answers_go_first():
    cache = Cache()
    for key in (b"a", b"b", b"c"):
        cache.put(key, ANSWER, 3 * SIZE)
    assert cache.get(b"a") is not None
    cache.put(b"d", ANSWER, 3 * SIZE)
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.bytes == 3 * SIZE
    cache.put(b"a", ANSWER, 3 * SIZE)  # it is there
    assert (len(cache), cache.bytes) == (3, 3 * SIZE)


def test_an_answer_does_not_hold_its_micro_batch_and_failures_are_not_kept():
    cache = Cache()
    batch = np.zeros((32, 100), np.float32)
    cache.put(b"a", Answer(batch[3], (0,)), 10**6)
    assert cache.get(b"a").probabilities.base is None
    cache.put(b"b", BadImage(NO_PROBABILITIES), 10**6)
    assert cache.get(b"b") is None
    try:
        raise BadImage("corrupt", "it ends early")
    except BadImage as error:
        cache.put(b"d", error, 10**6)
    assert (cache.get(b"d").detail, cache.get(b"d").__traceback__) == (
        "it ends early",
        None,
    )  # it would hold the image
    cache = Cache()
    cache.put(b"c", ANSWER, SIZE - 1)  # larger than everything that may be kept
    assert (len(cache), cache.bytes) == (0, 0)


def test_images_that_are_sent_again_are_not_computed(start_client, bundle, newer, monkeypatch):
    client = start_client(("a", bundle, 1.0), ("b", newer, 1.0), max_cache_bytes=10**6)
    service, computed, cached = client.app.service, [], []
    compute = service._compute

    async def count(served, values):
        computed.append((served.name, len(values)))
        return await compute(served, values)

    monkeypatch.setattr(service, "_compute", count)
    monkeypatch.setattr(service.metrics, "record_cache", lambda hits, misses: cached.append((hits, misses)))
    (_, (damaged, _)), *_ = bad_images().items()

    def ask(*images, model="a"):
        answers = client.post(f"/predict?model={model}", files=[("image", ("i", image)) for image in images]).json()
        return [{key: value for key, value in answer.items() if key != "request_id"} for answer in answers]

    first = ask(GOOD, damaged, GOOD + b" ")
    assert ask(GOOD, damaged, GOOD + b" ") == first
    assert computed == [("a", 3)]
    assert cached == [(0, 3), (3, 0)]
    ask(GOOD, GOOD, model="b")
    assert computed[1:] == [("b", 2)]  # another version has its own answers
    assert ask(GOOD, GOOD + b"  ")[0] == first[0]
    assert computed[2:] == [("a", 1)]
    client.portal.call(service.change_settings, service.settings)
    ask(GOOD, damaged)
    assert computed[3:] == [("a", 2)]


def test_without_a_bound_nothing_is_kept(start_client, monkeypatch):
    client = start_client()
    service = client.app.service
    monkeypatch.setattr(service.metrics, "record_cache", pytest.fail)
    for _ in range(2):
        assert client.post("/predict", files={"image": ("a", GOOD)}).status_code == 200
    assert len(service._cache) == 0
