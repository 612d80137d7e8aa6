"""Programs, capture, stages and their verifiers, the pass contract and its runner."""
