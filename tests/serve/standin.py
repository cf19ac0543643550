"""A server with canned answers, for looking at the chat page alone."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jaxformers.serve.page import content_security_policy, page

KEY = "secret"
ANSWER = """Attention lets **every token look at every other** and take a weighted mean of what they *hold*.

## In code

```python
def attention(q, k, v):
    # [T, N] x [S, N] -> [T, S], a rather long line of comment to see how the block scrolls sideways when it must
    weights = jax.nn.softmax(q @ k.T / jnp.sqrt(q.shape[-1]))
    return weights @ v
```

1. Scores are dot products, `q @ k.T`.
2. The softmax makes them weights:
   - all positive,
   - with the sum 1.

| part | shape |
|---|---|
| query | `[T, N]` |
| value | `[S, N]` |

> See [the paper](https://arxiv.org/abs/1706.03762). <img src=x onerror="document.title='broken'">
[not a link](javascript:document.title='broken')
"""


def chunk(delta, finish=None):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, kind="application/json", **headers):
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path == "/":
            policy = {"Content-Security-Policy": content_security_policy()}
            self.reply(200, page(), "text/html; charset=utf-8", **policy)
        elif not self.allowed():
            self.reply(401, {"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}})
        else:
            self.reply(200, {"data": [{"id": name, "object": "model"} for name in ("SmolLM2-135M-Instruct", "other")]})

    def allowed(self):
        return not self.server.locked or self.headers.get("Authorization") == f"Bearer {KEY}"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        words = body["messages"][-1]["content"]
        if "busy" in words:
            error = {"error": {"message": "256 requests are waiting.", "type": "rate_limit", "code": None}}
            return self.reply(429, error, **{"Retry-After": 3})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.stream(words, body)
        except OSError:
            self.server.disconnected.set()

    def stream(self, words, body):
        def tell(event):
            self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        tell(chunk({"role": "assistant", "content": ""}))
        if "think" in words:
            tell(chunk({"reasoning_content": "The user wants me to think."}))
        answer = "word " * 2000 if "forever" in words else ANSWER
        for start in range(0, len(answer), 7):
            time.sleep(self.server.pause)
            tell(chunk({"content": answer[start : start + 7]}))
            if "break" in words and start > 20:
                return tell({"error": {"message": "the engine has failed"}})
        tell(chunk({}, "stop"))
        tell({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 150, "total_tokens": 159}})
        return tell("[DONE]")


class StandIn(ThreadingHTTPServer):
    """`bodies` are what it was asked; `disconnected` is set once a client has left in the middle of an answer."""

    daemon_threads = True

    def __init__(self, *, locked=False, pause=0.004):
        super().__init__(("127.0.0.1", 0), Handler)
        self.locked, self.pause, self.bodies, self.disconnected = locked, pause, [], threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def close(self):
        self.shutdown()
        self.server_close()
