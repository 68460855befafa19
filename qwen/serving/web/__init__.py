"""The web demo, built with Gradio."""

from .proxies import bypass_proxies

with bypass_proxies():  # Gradio creates HTTP clients when it is imported
    import gradio as gradio
