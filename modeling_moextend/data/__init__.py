"""Data: files and formats that samples come in, and what makes batches of them."""
