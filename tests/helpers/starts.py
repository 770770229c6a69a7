"""A start server that is ready in two seconds, for tests that end it: it imports only what forking needs."""

from __future__ import annotations

from spin.alignment.pipeline import start_programs

LIGHT_SERVER = start_programs._SERVER.replace(
    "main(", "import spin.alignment.pipeline.start_server as s\ns.LIBRARIES = s.TRAINING_LIBRARIES = ()\nmain("
)
