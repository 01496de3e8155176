"""What `make test-real` needs: a tiny model and a real inference server around it. Must hold no test of `make test`."""
