from qwen._moved import redirect

redirect(__name__)
