"""What Rivulet costs, measured beside two peers: `python -m bench`, see bench/README.md."""
