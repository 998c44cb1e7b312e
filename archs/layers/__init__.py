"""Parts of networks, one idea a file."""
