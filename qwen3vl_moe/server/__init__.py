"""A server with OpenAI's API around one model, and a page to look at.

It stands at the edge: nothing else of the package imports it. Start at :mod:`.app` (HTTP), then :mod:`.serving` (a
request's way to the engine) and :mod:`.engine_thread`. :mod:`.protocol` reads OpenAI's bodies, and needs none of the
others' libraries.
"""
