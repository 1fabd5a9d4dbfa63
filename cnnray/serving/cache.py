"""Answers to images that were sent before."""

import dataclasses
import hashlib
from collections import OrderedDict

from cnnray.images.decode import BadImage
from cnnray.models.answers import NO_PROBABILITIES, Answer
from cnnray.serving.models import ServedModel

_OVERHEAD = 600
"""Bytes of an entry besides `Answer.nbytes`: the key, the objects of the answer, the dictionary's slot."""


class Cache:
    """The last answers, by the bytes of the image and the version that answered. The least recently used go first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, Answer | BadImage] = OrderedDict()
        self.bytes = 0
        """Size of all entries."""

    def __len__(self) -> int:
        return len(self._answers)

    @staticmethod
    def key(served: ServedModel, image: bytes) -> bytes:
        """The key of an image, as it was sent, for a version."""
        digest = hashlib.sha256(f"{served.name} {served.version} {served.engine}\n".encode())
        digest.update(image)
        return digest.digest()

    def get(self, key: bytes) -> Answer | BadImage | None:
        """The answer to an image; None: it is not known."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: Answer | BadImage, limit: int) -> None:
        """Keep an answer, and at most `limit` bytes in all. An engine's failure is not kept."""
        if key in self._answers or (isinstance(answer, BadImage) and answer.reason == NO_PROBABILITIES):
            return
        # A row would hold its whole micro-batch, and an error, by its traceback, the image.
        kept = (
            BadImage(answer.reason, answer.detail)
            if isinstance(answer, BadImage)
            else dataclasses.replace(answer, probabilities=answer.probabilities.copy())
        )
        self._answers[key] = kept
        self.bytes += _size(kept)
        while self.bytes > limit:
            _, oldest = self._answers.popitem(last=False)
            self.bytes -= _size(oldest)


def _size(answer: Answer | BadImage) -> int:
    return _OVERHEAD + (len(answer.detail or "") if isinstance(answer, BadImage) else answer.nbytes)
