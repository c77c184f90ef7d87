"""A server with OpenAI's API around one model, and a page to look at.

It stands at the edge: nothing else of the package imports it. It is two processes, with an interpreter each: clients
talk to :mod:`.front`, which makes prompts of their requests and texts of their answers; the engine is in the process
that :mod:`.run` was called in. Start at :mod:`.app` (HTTP), then :mod:`.serving` (a request's way to the engine),
:mod:`.wire` (what goes between the two) and :mod:`.engine_thread`. :mod:`.protocol` reads OpenAI's bodies, and needs
none of the others' libraries.
"""
