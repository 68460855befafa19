"""web_demo.py with a model that takes its time, which tells how many replies it writes.

A pass through the model takes PASS_SECONDS at least: a reply of thousands of tokens is still being written, on the
fastest machine, when a test stops it. The number of replies is answered to whoever connects to the port in the log.

    python tests/support/paced_web_demo.py     # takes what web_demo.py does
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
    """Slow the engine down, and let others ask for its load."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"%d" % engine.load().running)

    engine.model.transformer.register_forward_pre_hook(lambda *_: time.sleep(PASS_SECONDS))
    server = socketserver.TCPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"Load at port {server.server_address[1]}", file=sys.stderr)
    return launch_page(engine, **options)


launch.launch = launch_paced
sys.exit(main())
