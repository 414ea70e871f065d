"""A Flask view that streams an answer: a program with threads and without an event loop.

    pip install flask
    python examples/flask_view.py [--url http://127.0.0.1:8000] [--port 5000]
    curl -N 'http://127.0.0.1:5000/ask?text=Hello'

One client serves all threads; their answers share its sockets. In Django the same generator goes
into a `StreamingHttpResponse`. With a server that forks (gunicorn, uWSGI) each worker makes a
client of its own.
"""

from __future__ import annotations

import argparse
from itertools import chain
from typing import TYPE_CHECKING

from flask import Flask, Response, request

from aioserver.client import AnswerError
from aioserver.client.sync import Answer, Client

if TYPE_CHECKING:
    from collections.abc import Generator


def pieces_of(answer: Answer) -> Generator[str]:
    """Yield the pieces of *answer*; closing this cancels it."""
    with answer:
        yield from answer


def make_app(client: Client) -> Flask:
    """Return an application whose view asks *client*."""
    app = Flask(__name__)

    @app.get("/ask")
    def ask() -> Response:
        """Stream the answer to `?text=`."""
        pieces = pieces_of(client.chat(request.args["text"], deadline=60.0))
        try:
            # A refusal still has its status; after the first piece an error can only break off the
            # response.
            first = next(pieces, "")
        except AnswerError as error:
            headers = {"Retry-After": str(round(error.retry_after or 5))}
            return Response(f"{error.message}\n", 503, headers, "text/plain")
        response = Response(chain([first], pieces), mimetype="text/plain")
        # Also when the browser has left: that cancels the answer, and nobody pays for the rest.
        response.call_on_close(pieces.close)
        return response

    return app


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args()
    with Client(options.url) as client:
        make_app(client).run(port=options.port, threaded=True)


if __name__ == "__main__":
    main()
