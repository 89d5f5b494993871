"""Work that rank 0 does while the others wait: where it fails, every rank learns of it and stops alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hubert_fast.pretrain.distributed import Process

Result = TypeVar("Result")


def on_main(process: Process, work: Callable[[], Result]) -> Result:
    """Call ``work`` on rank 0; every rank returns its result, which must pickle.

    Raises:
        Exception: what ``work`` raised, on rank 0; on the others a RuntimeError with its message, because not every
            exception survives the way there, while ranks that wait in vain would bury the message under their own.
    """
    result, failure = None, None
    if process.is_main:
        try:
            result = work()
        except Exception as error:
            process.from_main((None, str(error)))
            raise
    result, failure = process.from_main((result, None))
    if failure is not None:
        raise RuntimeError(failure)
    return result
