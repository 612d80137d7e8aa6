"""The lock under which models are loaded and captured."""

from __future__ import annotations

from threading import RLock

LOADING = RLock()
"""Held by the thread that captures a model, or imports diffusers or transformers, or uses them.

Meanwhile torch.export, diffusers and transformers change the state of the whole process: classes,
functions, the choice of attention. Two threads that did this at once would break it. Their modules
import one another in circles, so a second thread could also find one that is half imported.
"""
