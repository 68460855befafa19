"""web_demo.py with a slowed-down model, which reports the number of running replies.

A forward pass takes at least PASS_SECONDS, so that a reply of thousands of tokens is still running when a test stops
it, even on the fastest machine. A connection to the port in the log returns the number of running replies.

    python tests/support/paced_web_demo.py     # same arguments as web_demo.py
"""

import socketserver
import sys
import threading
import time

from qwen.serving.engine import Engine
from qwen.serving.web import launch
from qwen_cli.web import main

PASS_SECONDS = 0.04

launch_page = launch.launch


def launch_paced(engine: Engine, **options: object) -> object:
    """Slow the engine down and serve its load on a port."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"%d" % engine.load().running)

    engine.model.transformer.ln_f.register_forward_pre_hook(lambda *_: time.sleep(PASS_SECONDS))
    server = socketserver.TCPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"Load at port {server.server_address[1]}", file=sys.stderr)
    return launch_page(engine, **options)


launch.launch = launch_paced
sys.exit(main())
