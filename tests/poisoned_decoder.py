"""A process of `cnnray.images.decoder_process` that images with the content of `POISON` or `BUG` end."""

import os
import sys
from multiprocessing.connection import Connection

from cnnray.images import decoder_process, reading

POISON, BUG = b"poison", b"bug"


def _decode(data, geometry):
    if data == POISON:
        os._exit(1)
    if data == BUG:
        raise RuntimeError("a bug")
    return decode(data, geometry)


if __name__ == "__main__":
    decode, reading.decode = reading.decode, _decode
    decoder_process.main(Connection(int(sys.argv[1])), int(sys.argv[2]))
