"""Which of several engines answers a request of a call."""

from __future__ import annotations

import pickle
import queue
from collections import deque
from collections.abc import Generator, Mapping
from typing import Any

from qwen3vl_moe.engine.feed import Feed
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.replicas import Replicas, Unsent, room_of
from qwen3vl_moe.engine.service import Answer, Answers, Going, Prepare, Service, first_error_raised
from qwen3vl_moe.inputs.workers import POOL

_BEGINNING = 256  # characters by which requests that begin alike are known
# Keys of a request's parts: nothing after one of these is looked at.
_PICTURES = ("image", "image_url", "video", "video_url", "multi_modal_data")


def answers_of_all(
    replicas: Replicas,
    service: Service,
    prepare: Prepare,
    how: tuple[str, Mapping[str, Any]],
    items: list,
    kind: str,
    params: list[SamplingParams],
    return_exceptions: bool,
) -> Answers:
    """As :meth:`.Service.answers`, by all engines.

    Args:
        service: of this process's own engine.
        how: ``prepare``, as :meth:`.LLM.preparing` makes it in another process.

    Raises:
        RankError: one of the engines has ended, or does so meanwhile.
    """
    replicas.check()
    dealer = _Dealer(replicas, service, prepare, how, list(zip(items, params, strict=True)))
    answers = service.serve(dealer, params.__getitem__, dealer.between)
    return answers if return_exceptions else first_error_raised(answers, kind, len(items))


class _Dealer(Feed):
    """The requests of a call: what this process's engine answers is taken from here, the rest is sent to others."""

    def __init__(
        self,
        replicas: Replicas,
        service: Service,
        prepare: Prepare,
        how: tuple[str, Mapping[str, Any]],
        pairs: list[tuple[Any, SamplingParams]],
    ):
        super().__init__(lambda pair: service.prepared(prepare, pair), service.ahead)
        self.open = False  # all that will come is known
        self._replicas, self._how, self._pairs = replicas, how, pairs
        self._todo, self._elsewhere = deque(range(len(pairs))), 0
        self._scheduler, self._own_room = service.engine.scheduler, room_of(service)
        self._call, self._mail = -1, queue.SimpleQueue()  # until the first answer is asked for

    @property
    def left(self) -> bool:
        return bool(self._todo) or self._elsewhere > 0 or super().left

    def between(self, going: Going) -> Generator[Answer, None, None]:
        """Deal requests out, and yield what others have answered; waits where nothing else is to do."""
        if self._call < 0:
            self._call, self._mail = self._replicas.new_call()
        while True:
            self._deal()
            idle = not going and not len(self) and self._elsewhere > 0
            try:
                answer = self._mail.get(block=idle)
            except queue.Empty:
                return
            if answer is None:
                self._replicas.check()
                continue
            (_, number), result = answer
            self._elsewhere -= 1
            if isinstance(result, Unsent):
                self.add(number, (result.item, self._pairs[number][1]))
            else:
                yield number, result

    def close(self) -> None:
        super().close()
        self._replicas.over(self._call)

    def _deal(self) -> None:
        while self._todo:
            # Requests of all calls, so that many calls of one request each are dealt out, too.
            own = len(self._scheduler.running) + len(self._scheduler.waiting) + len(self), self._own_room
            free = self._replicas.free(*own)
            if not free:
                return
            number = self._todo.popleft()
            item, _ = self._pairs[number]
            engine = self._replicas.choose(beginning(item), free, *own)
            if engine == 0:
                self.add(number, self._pairs[number])
                continue
            self._elsewhere += 1
            self._replicas.assign(engine, (self._call, number))
            # In a thread: it may have to read a file, and the caller's thread has steps to compute.
            POOL.submit(self._send, number)

    def _send(self, number: int) -> None:
        key, (item, params) = (self._call, number), self._pairs[number]
        item = _made(item)
        try:
            message = pickle.dumps((*self._how, item, params))
        except Exception:  # of an open file, say
            self._replicas.give_back(key, item)
        else:
            self._replicas.send(key, message)


def _made(item: Any) -> Any:
    """A request that was given as a function, which is called once: what it raises is raised where prompts are made."""
    if not callable(item):
        return item
    try:
        return item()
    except Exception as error:
        failed = error

    def fail() -> Any:
        raise failed

    return fail


def beginning(item: Any) -> str:
    """By which requests that may have much in common are known: their text up to some length, or to the first image."""
    found: list[str] = []
    _collect(item, found)
    return "\n".join(found)[:_BEGINNING]


def _collect(item: Any, found: list[str]) -> bool:
    """Whether the beginning goes on after ``item``."""
    if isinstance(item, str):
        found.append(item[:_BEGINNING])
        return sum(map(len, found)) < _BEGINNING
    if isinstance(item, Mapping):
        for key, value in item.items():
            if key in _PICTURES:
                _collect(value, found)
                return False
            if key != "type" and not _collect(value, found):
                return False
        return True
    if isinstance(item, list | tuple):
        if item and isinstance(item[0], int):
            found.append(str(item[: _BEGINNING // 4]))
            return False
        return all(_collect(each, found) for each in item)
    found.append(str(id(item)))  # a picture, say
    return False
