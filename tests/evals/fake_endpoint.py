"""A chat endpoint on 127.0.0.1, in a thread, that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
    """The envelope of a chat completion."""
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


class Fake:
    """What was asked, and how to answer: `answer(body, count)` gives a text, a status, or (status, headers, text)."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.headers = []
        self.paths = []
        self.busiest = 0
        self.busy = 0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serving(answer):
    fake = Fake(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # header and body in one packet

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests.append(body)
                fake.headers.append(dict(self.headers))
                fake.paths.append(self.path)
                fake.busy += 1
                fake.busiest = max(fake.busiest, fake.busy)
                count = len(fake.requests)
            said = fake.answer(body, count)
            with fake.lock:
                fake.busy -= 1
            if isinstance(said, str):
                said = (200, {}, completion(said))
            elif isinstance(said, int):
                said = (said, {}, "no")
            status, headers, text = said
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
                self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up waiting

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def slow(seconds, text):
    def answer(body, count):
        time.sleep(seconds)
        return text

    return answer
