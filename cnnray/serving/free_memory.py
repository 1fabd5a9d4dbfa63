"""Free memory of a replica goes back to the system.

The C library keeps what was freed between blocks in use: tens of MiB after bursts, and after changes of the models.
"""

import ctypes
import threading
import time

_SECONDS = 60.0


def return_regularly() -> None:
    """Give free memory back each minute, in a thread; nothing where the C library is not glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return

    def run() -> None:
        while True:
            time.sleep(_SECONDS)
            trim(0)

    threading.Thread(target=run, name="free-memory", daemon=True).start()
