"""The same client for a program without an event loop of its own.

    from aioserver.client.sync import Client

    with Client("http://127.0.0.1:8000") as client:
        for piece in client.chat("Hello"):
            print(piece, end="")

The asynchronous client runs in an event loop in a thread of its own, which begins with the first
question. A `Client` may be used from any number of threads at once, as in a web application that
has a thread for each request. After a `fork` the child needs a client of its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self, TypeVar

from aioserver.client import client as asynchronous
from aioserver.client.answer import Text
from aioserver.client.history import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from aioserver.client.answer import Answer as AsynchronousAnswer
    from aioserver.client.answer import Complete, Event
    from aioserver.client.history import Summary, Turn

T = TypeVar("T")

# Seconds for the thread to end.
JOIN_TIMEOUT = 5.0


class Client:
    """A client of one server. Its arguments are those of `aioserver.client.Client`, except the
    session.

    Raises:
        ValueError: an argument has no meaning.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", **arguments: Any) -> None:
        if "session" in arguments:
            raise ValueError("a session belongs to an event loop, and this client has its own")
        self._client = asynchronous.Client(url, **arguments)
        self._thread = LoopThread()
        # This also closes it at the exit of a program that forgets to.
        self._finalizer = weakref.finalize(self, self._thread.close, self._client.close)

    @property
    def url(self) -> str:
        """The address of the server."""
        return self._client.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the answers that run, close all connections, and end the thread."""
        self._finalizer()

    def chat(self, content: str | list[dict[str, Any]], **arguments: Any) -> Answer:
        """Return the answer to a question; the arguments are those of
        `aioserver.client.Client.chat`.

        Raises:
            ValueError: an argument can be no part of a question.
            RuntimeError: the client is closed.
        """

        async def make() -> AsynchronousAnswer:
            return self._client.chat(content, **arguments)

        return Answer(self, self._thread, self._thread.run(make()))

    def conversation(self, conversation_id: str | None = None) -> Conversation:
        """Return the conversation with this id, which need not exist yet; by default a new one."""
        return Conversation(self, self._client.conversation(conversation_id))

    def conversations(self, most: int = PAGE) -> list[Summary]:
        """Return the *most* conversations of this key that were used last, the newest first.

        Raises:
            AnswerError: they cannot be read.
        """
        return self._thread.run(self._client.conversations(most))

    def turns(self, conversation_id: str) -> list[Turn]:
        """Return the turns of a conversation that the server keeps, the oldest first.

        Raises:
            AnswerError: they cannot be read.
        """
        return self._thread.run(self._client.turns(conversation_id))

    def delete_conversation(self, conversation_id: str) -> None:
        """Delete a conversation.

        Raises:
            AnswerError: it may not be deleted.
        """
        self._thread.run(self._client.delete_conversation(conversation_id))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this client's asynchronous one."""
        return self._thread.run(work)


class Conversation:
    """Questions and answers that follow each other; the server keeps them."""

    def __init__(self, client: Client, conversation: asynchronous.Conversation) -> None:
        self.id = conversation.id
        self._client = client
        self._conversation = conversation

    def turns(self) -> list[Turn]:
        """Return the turns that the server keeps, the oldest first; none before the first turn has
        ended.

        Raises:
            AnswerError: they cannot be read.
        """
        return self._client.run(self._conversation.turns())

    def delete(self) -> None:
        """Delete the conversation at the server; of no effect if nothing is kept.

        Raises:
            AnswerError: it may not be deleted.
        """
        self._client.run(self._conversation.delete())

    def chat(self, content: str, **arguments: Any) -> Answer:
        """Return the answer to the next question.

        Raises:
            ValueError: an argument can be no part of a question.
        """
        return self._client.chat(content, conversation_id=self.id, **arguments)


class Answer:
    """The answer to a question, read once: its pieces, its `text`, or its `events`.

    Leaving the loop before its end cancels the answer at the server, and so does the end of a
    `with` block.
    """

    def __init__(self, client: Client, thread: LoopThread, answer: AsynchronousAnswer) -> None:
        # A client without references closes itself, but not before its answers have been read.
        self._client = client
        self._thread = thread
        self._answer = answer

    @property
    def request_id(self) -> str:
        """The id of the question; it changes when the question is asked again under a new id."""
        return self._answer.request_id

    @property
    def complete(self) -> Complete | None:
        """The last event of a whole answer."""
        return self._answer.complete

    @property
    def received(self) -> str:
        """The text so far."""
        return self._answer.received

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self.events() if isinstance(event, Text))

    def events(self) -> Iterator[Event]:
        """Read the answer as events.

        Raises:
            AnswerError: there is no whole answer.
        """
        try:
            while events := self._thread.run(self._answer.batch()):
                yield from events
        finally:
            self._thread.post(self._answer.leave)

    def text(self) -> str:
        """Read the answer to its end, and return its text.

        Raises:
            AnswerError: there is no whole answer.
        """
        return self._thread.run(self._answer.text())

    def cancel(self) -> None:
        """Cancel the answer at the server; a loop that reads it in another thread ends."""
        self._thread.run(self._answer.cancel())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._thread.post(self._answer.leave)


class LoopThread:
    """A thread with an event loop, which starts with the first coroutine that it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run *coroutine* to its end, and return its result. An interrupt (Ctrl-C) cancels it.

        Raises:
            RuntimeError: the client is closed, or belongs to the parent of this process.
        """
        try:
            loop = self._running()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        running = threading.Lock()
        running.acquire()
        future.add_done_callback(lambda _future: running.release())
        try:
            # An interrupt while `Future.result` waits can come out as another error: the condition
            # with which it waits is Python, and a lock is not.
            running.acquire()
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def post(self, function: Callable[[], object]) -> None:
        """Let the loop call *function* soon; of no effect if the loop is closed."""
        if self._loop is not None and not self._closed and self._process == os.getpid():
            self._loop.call_soon_threadsafe(function)

    def close(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `end()` last, and end the thread."""
        if self._loop is None or self._process != os.getpid():
            self._closed = True
            return
        try:
            self.run(end())
        finally:
            with self._lock:
                self._closed = True
            loop, thread = self._loop, self._thread
            loop.call_soon_threadsafe(loop.stop)
            if thread is not None:
                thread.join(JOIN_TIMEOUT)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._loop is None:
                self._process = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._work, args=(self._loop,), name="aioserver-client", daemon=True
                )
                self._thread.start()
            elif self._process != os.getpid():
                raise RuntimeError("after a fork the child needs a client of its own")
            return self._loop

    @staticmethod
    def _work(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
