"""Other programs that call these models; each file is imported by those who use it."""
