"""The web demo, built with Gradio."""
