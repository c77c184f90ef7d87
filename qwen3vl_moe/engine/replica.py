"""What a process of another engine than the first does: make an LLM, and answer what it is sent (:mod:`.replicas`)."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
from collections.abc import Iterable
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any

from qwen3vl_moe.engine.feed import Feed
from qwen3vl_moe.engine.follower import end_with_the_first, loader_of
from qwen3vl_moe.engine.llm import LLM
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.replicas import room_of
from qwen3vl_moe.engine.service import Answer, Going
from qwen3vl_moe.errors import UserError, one_line


def main(descriptor: int) -> None:
    """Answer requests until the first process ends.

    Args:
        descriptor: of the pipe to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process decides
    threading.Thread(target=end_with_the_first, daemon=True).start()
    os.dup2(2, 1)  # what libraries print on standard output is no answer
    pipe = Connection(descriptor)
    try:
        maker, arguments = pipe.recv()
        llm = loader_of(maker)(**arguments)
        pipe.send(("ready", room_of(llm.service)))
        serve(llm, pipe)
    except EOFError:
        pass
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        with suppress(OSError):
            pipe.send(("failed", f"{kind}{one_line(str(error))}"))
        os._exit(1)
    os._exit(0)


def serve(llm: LLM, pipe: Connection) -> None:
    """Answer what comes through a pipe, in any order, until it is closed."""
    inbox = _Inbox(llm, pipe)
    with closing(llm.service.serve(inbox, inbox.params.__getitem__, inbox.between)) as answers:
        for key, answer in answers:
            inbox.params.pop(key, None)
            try:
                message = pickle.dumps(("done", key, answer, llm.stats))
            except Exception as error:  # an error with something in it that cannot be sent
                message = pickle.dumps(("done", key, UserError(f"{answer} ({error})"), llm.stats))
            pipe.send_bytes(message)


class _Inbox(Feed):
    """Requests as they come through a pipe. A thread empties it, so that the first process never waits for a step."""

    def __init__(self, llm: LLM, pipe: Connection):
        super().__init__(lambda message: self._prepared(message), llm.service.ahead)
        self._llm, self._messages = llm, queue.SimpleQueue[Any]()
        self.params: dict[Any, SamplingParams] = {}
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def between(self, going: Going) -> Iterable[Answer]:
        """Take in what has come; waits where nothing else is to do."""
        while True:
            try:
                message = self._messages.get(block=not going and not len(self))
            except queue.Empty:
                return
            if message is None:
                raise EOFError
            kind, *rest = message
            if kind == "add":
                key, packed = rest
                try:
                    how, asked, item, self.params[key] = pickle.loads(packed)
                except Exception as error:
                    yield key, UserError(f"the request cannot be read by another process: {one_line(str(error))}")
                else:
                    self.add(key, (how, asked, item, self.params[key]))
            else:
                [keys] = rest
                self.drop(keys)
                for key in keys:
                    self.params.pop(key, None)
                self._llm.service.give_up([going.pop(key) for key in keys if key in going])

    def _prepared(self, message: tuple) -> Any:
        how, asked, item, params = message
        return self._llm.service.prepared(self._llm.preparing(how, asked), (item, params))

    def _read(self, pipe: Connection) -> None:
        try:
            while True:
                self._messages.put(pipe.recv())
        except (EOFError, OSError):
            self._messages.put(None)
