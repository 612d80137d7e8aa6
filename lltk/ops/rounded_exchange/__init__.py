"""An exchange between ranks that rounds what it sends."""
