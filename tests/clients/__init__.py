"""Scripts that call the server with the newest versions of its clients; see run.py."""
