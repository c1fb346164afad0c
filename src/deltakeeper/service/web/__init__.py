"""The web page: files as they are, and one module that serves them."""
