"""Streaming: session, pages, shot script, sampler, decode pipeline and runtimes."""
